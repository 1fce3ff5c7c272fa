"""What all tests share."""

import json
import os
import random
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before torch is imported: a second thread waits for the first in a loop, which costs minutes where cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from safetensors.numpy import save_file

from chameleon_ray.adapters.modules import Module, ModuleTable

if TYPE_CHECKING:
    from chameleon_ray.demo import DemoPaths

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The same examples in every run, however slow the machine is.
settings.register_profile("certain", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("certain")

WriteAdapter = Callable[..., Path]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws without a generator of its own is the same in every run, whatever ran before."""
    random.seed(0)
    np.random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def demo() -> "DemoPaths":
    """The random model and adapters, made once per checkout (``CHAMELEON_DEMO_DIR`` names another place)."""
    from chameleon_ray.random_demo import make_random_demo  # brings torch: only tests that use the demo wait for it

    default = Path(__file__).parent.parent / ".chameleon/random-demo"
    return make_random_demo(Path(os.environ.get("CHAMELEON_DEMO_DIR", default)))


@pytest.fixture
def tiny_table() -> ModuleTable:
    """A base model of two layers that ``write_adapter``'s adapters fit."""
    in_layer = {"self_attn.q_proj": (16, 32), "mlp.down_proj": (32, 24)}
    shapes = {f"model.layers.{n}.{name}": shape for n in range(2) for name, shape in in_layer.items()}
    return ModuleTable({name: Module(name, *shape) for name, shape in shapes.items()})


@pytest.fixture
def as_future() -> Callable[[ModuleTable], Future[ModuleTable]]:
    """A table as the library takes it, from an engine that has started."""

    def as_future(table: ModuleTable) -> Future[ModuleTable]:
        future: Future[ModuleTable] = Future()
        future.set_result(table)
        return future

    return as_future


@pytest.fixture
def write_adapter(tiny_table: ModuleTable) -> WriteAdapter:
    """Writes an adapter of a few kB in PEFT layout: ``write_adapter(folder, rank=4, seed=0, config={}, tensors={})``.

    config and tensors replace entries of what PEFT would write (a tensor of None: leave it out).
    """

    def write(
        folder: Path,
        *,
        rank: int = 4,
        seed: int = 0,
        config: Mapping[str, Any] | None = None,
        tensors: Mapping[str, np.ndarray | None] | None = None,
    ) -> Path:
        rng = np.random.default_rng(seed)
        weights: dict[str, np.ndarray | None] = {}
        for name, module in tiny_table.modules.items():
            prefix = f"base_model.model.{name}"
            weights[f"{prefix}.lora_A.weight"] = rng.standard_normal((rank, module.in_features), np.float32)
            weights[f"{prefix}.lora_B.weight"] = rng.standard_normal((module.out_features, rank), np.float32)
        weights |= tensors or {}
        settings = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": ["q_proj", "down_proj"],
            "base_model_name_or_path": "tiny",
            "bias": "none",
        } | (config or {})
        folder.mkdir(parents=True, exist_ok=True)
        kept = {name: array for name, array in weights.items() if array is not None}
        save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        return folder

    return write
