"""The base model's shapes, from weights and from configuration."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from chameleon_ray.adapters.base_model import BaseModelShapes
from chameleon_ray.adapters.validate import validate_adapter
from chameleon_ray.demo import DemoPaths


def test_reads_the_weights_whole_or_in_shards(demo: DemoPaths, tmp_path: Path) -> None:
    shapes = BaseModelShapes.from_folder(demo.model)
    assert shapes.num_layers == 4 and len(shapes.modules) == 4 * 7
    assert shapes.modules["model.layers.3.self_attn.k_proj"] == (128, 256)
    assert shapes.modules["model.layers.0.mlp.down_proj"] == (256, 512)

    weights = load_file(demo.model / "model.safetensors")
    halves = {"a.safetensors": dict(list(weights.items())[:20]), "b.safetensors": dict(list(weights.items())[20:])}
    for name, half in halves.items():
        save_file(half, tmp_path / name)
    index = {key: name for name, half in halves.items() for key in half}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert BaseModelShapes.from_folder(tmp_path) == shapes


def test_falls_back_to_the_configuration(demo: DemoPaths, tmp_path: Path) -> None:
    shapes = BaseModelShapes.from_folder(demo.model)
    (tmp_path / "config.json").write_bytes((demo.model / "config.json").read_bytes())
    assert BaseModelShapes.from_folder(tmp_path) == shapes, "no weights"
    packed = {"model.layers.0.self_attn.q_proj.weight": np.zeros((32, 256), np.uint8)}
    save_file(packed, tmp_path / "model.safetensors")
    assert BaseModelShapes.from_folder(tmp_path) == shapes, "quantised weights"


def test_unknown_models_are_not_checked_against(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for config in ("", "[]", '{"model_type": "novel"}', '{"model_type": "llama", "hidden_size": "x"}'):
        (tmp_path / "config.json").write_text(config)
        caplog.clear()
        assert BaseModelShapes.from_folder(tmp_path) == BaseModelShapes()
        assert "not checked" in caplog.text


def test_the_demo_adapters_fit_the_demo_model(demo: DemoPaths) -> None:
    shapes = BaseModelShapes.from_folder(demo.model)
    for name in demo.adapter_names():
        info = validate_adapter(demo.adapters / name, shapes, max_rank=128, max_bytes=1 << 30, check_finite=True)
        assert f"-r{info.rank}-" in name and len(info.target_modules) == 7
