"""Adapters for vLLM's slots: each module's own rank and scale, whatever vLLM's reader makes of the configuration."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

from chameleon_ray.engine.slots.lora import SlotWorkerLoRAManager
from chameleon_ray.engine.slots.worker import PlatformWorker, SlotsWorker
from chameleon_ray.engine.slots_loading import ScaledLoRAModel

LAYER = "model.layers.0"
MODULES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
WRITTEN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
EXPERTS = {f"experts.{number}.w{projection}" for number in (0, 1) for projection in (1, 2, 3)}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(ranks: dict[str, int], infix: str = "", **config: Any) -> Path:
        rng = torch.Generator().manual_seed(0)
        tensors = {}
        for module, rank in ranks.items():
            key = f"base_model.model.{LAYER}.{module}.lora_{{}}{infix}.weight"
            tensors[key.format("A")] = torch.randn(rank, 16, generator=rng)
            tensors[key.format("B")] = torch.randn(24, rank, generator=rng)
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(WRITTEN | config))
        return tmp_path

    return write


def load(folder: Path, kind: type[LoRAModel] = ScaledLoRAModel, expected: Any = MODULES, **options: Any) -> LoRAModel:
    """As vLLM's worker does it."""
    names = {name.rsplit(".", 1)[-1] if "experts" not in name else name for name in expected}
    given = {"lora_model_id": 1, "device": "cpu", "dtype": torch.float32, "model_vocab_size": 64} | options
    given |= {"weights_mapper": None, "skip_prefixes": None, "moe_ep_spec": None, "tensorizer_config_dict": None}
    return kind.from_local_checkpoint(str(folder), names, PEFTHelper.from_local_dir(str(folder), 512), **given)


def deltas(model: LoRAModel) -> dict[str, torch.Tensor]:
    """What each module's output changes by, per input: scaling * B @ A."""
    return {
        name.removeprefix(f"{LAYER}."): lora.scaling * (lora.lora_b @ lora.lora_a) for name, lora in model.loras.items()
    }


def test_plain_adapters_are_loaded_as_vllm_does(write: Write) -> None:
    folder = write(dict.fromkeys(MODULES, 4), use_rslora=True)
    theirs = deltas(load(folder, LoRAModel))
    ours = deltas(load(folder))
    assert ours.keys() == theirs.keys() == set(MODULES)
    for name, delta in ours.items():
        torch.testing.assert_close(delta, theirs[name])


def test_every_module_has_its_own_rank_and_scale(write: Write) -> None:
    ranks = {"self_attn.q_proj": 2, "self_attn.v_proj": 4, "mlp.down_proj": 6}
    patterns = {
        "rank_pattern": {"q_proj": 2, r"mlp\..*": 6},
        "alpha_pattern": {r"0\.self_attn\.q_proj": 3, "down_proj": 1},
    }
    folder = write(ranks, infix=".default", **patterns)
    tensors = load_file(folder / "adapter_model.safetensors")
    model = load(folder)
    scales = {"self_attn.q_proj": 3 / 2, "self_attn.v_proj": 8 / 4, "mlp.down_proj": 1 / 6}
    for name, delta in deltas(model).items():
        key = f"base_model.model.{LAYER}.{name}.lora_{{}}.default.weight"
        torch.testing.assert_close(delta, scales[name] * tensors[key.format("B")] @ tensors[key.format("A")])
    assert {lora.scaling for lora in model.loras.values()} == {1}, "folded in, where vLLM packs layers"
    assert [lora.rank for lora in model.loras.values()] == [lora.lora_a.shape[0] for lora in model.loras.values()]


def test_vllm_still_needs_this(write: Write) -> None:
    folder = write(dict.fromkeys(MODULES, 4), alpha_pattern={"q_proj": 80})
    wrong, right = deltas(load(folder, LoRAModel)), deltas(load(folder))
    assert not torch.allclose(wrong[MODULES[0]], right[MODULES[0]]), "vLLM knows patterns now: remove slots_loading.py"


def test_experts_come_whole_or_not_at_all(write: Write) -> None:
    whole = {f"mlp.{expert}": 4 for expert in EXPERTS}
    assert len(load(write(whole), expected=EXPERTS).loras) == 6
    assert len(load(write({"self_attn.q_proj": 4}), expected={*MODULES, *EXPERTS}).loras) == 1
    with pytest.raises(ValueError, match=r"mlp\.experts\.1\.w2 has no weights: vLLM needs all experts"):
        load(write({name: rank for name, rank in whole.items() if "1.w2" not in name}), expected=EXPERTS)
    with pytest.raises(ValueError, match=r"ranks \[2, 4\]"):
        load(write(whole | {"mlp.experts.0.w1": 2}, rank_pattern={"0.w1": 2}), expected=EXPERTS)


@pytest.mark.parametrize(("tags", "forgets"), [(None, True), (["weights"], True), (["kv_cache"], False)])
def test_a_worker_that_wakes_with_lost_memory_describes_the_next_step_anew(
    monkeypatch: pytest.MonkeyPatch, tags: list[str] | None, forgets: bool
) -> None:
    """vLLM leaves out a description that is like the last one, whatever has become of the memory it lay in."""
    manager = object.__new__(SlotWorkerLoRAManager)
    manager._adapter_manager = SimpleNamespace(_last_mapping="the last step's")
    worker = object.__new__(SlotsWorker)
    worker.model_runner = SimpleNamespace(lora_manager=manager)
    monkeypatch.setattr(PlatformWorker, "wake_up", lambda *_: None)
    worker.wake_up(tags)
    assert (manager._adapter_manager._last_mapping is None) == forgets
