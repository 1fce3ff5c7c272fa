"""Configured adapters of experts, which KV memory does not take, are found before an engine starts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chameleon_ray.config import AppConfig
from chameleon_ray.engine.configured import first_with_experts

EXPERT = {
    f"base_model.model.model.layers.0.mlp.experts.1.w1.lora_{half}.weight": np.ones((4, 4), np.float32)
    for half in ("A", "B")
}


@pytest.mark.parametrize(
    ("model", "found"),
    [({"num_local_experts": 4}, True), ({"text_config": {"num_experts": 8}}, True), ({"hidden_size": 8}, False)],
)
def test_only_models_with_experts_are_looked_at(
    write_adapter: Any, tmp_path: Path, model: dict[str, Any], found: bool
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(model))
    write_adapter(tmp_path / "adapters/a")
    (tmp_path / "adapters/not-an-adapter").mkdir()
    expert = write_adapter(tmp_path / "adapters/z", tensors=EXPERT)

    def first(**adapters: Any) -> Path | None:
        return first_with_experts(
            AppConfig.from_args({"model": {"source": str(tmp_path / "model")}, "adapters": adapters})
        )

    assert first(folder=str(tmp_path / "adapters")) == (expert if found else None)
    assert first(preload=[{"name": "z", "uri": str(expert)}]) == (expert if found else None)
    assert first(preload=[{"name": "a", "uri": str(tmp_path / "adapters/a")}]) is None
    assert first(folder=str(tmp_path / "nowhere"), preload=[{"name": "s", "uri": "s3://bucket/x"}]) is None
