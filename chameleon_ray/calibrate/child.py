"""The process of the engine that is measured: makes it, measures, writes a pickled ``Measured`` to a file."""

import argparse
import pickle
import statistics
from dataclasses import fields
from pathlib import Path
from typing import Any

from vllm import EngineArgs
from vllm import __version__ as vllm_version
from vllm.platforms import current_platform
from vllm.v1.engine.llm_engine import LLMEngine

from chameleon_ray.calibrate.live import CLOCKS, LiveAdapter, LiveEngine
from chameleon_ray.calibrate.measure import (
    measure_loads,
    measure_steps,
    serve_workload,
    single_steps,
    some_adapters,
)
from chameleon_ray.calibrate.measured import CalibrationError, Effort, Measured
from chameleon_ray.engine.paged.options import PagedSettings, paged_arguments
from chameleon_ray.engine.paged.storage import PagedStorage
from chameleon_ray.sim.parallel import show_progress
from chameleon_ray.sim.scenario import PolicySettings

_POLICY = sorted(PolicySettings.model_fields.keys() & {field.name for field in fields(PagedSettings)})
"""The options that the simulator's policy shares with the engine's."""


def measure(engine: LiveEngine, folders: list[Path], effort: Effort, seed: int) -> Measured:
    """Everything about one engine. Raises CalibrationError."""
    adapters = some_adapters(engine, folders)
    rehearsal, served = [], []
    if effort.num_requests:
        serve_workload(engine, adapters, effort, seed + 1, show_progress)
        rehearsal = single_steps(engine.steps)
        adapters = some_adapters(engine, folders)  # Anew: to the engine their content is one that it has not seen.
        served = serve_workload(engine, adapters, effort, seed, show_progress)
    steps = [*measure_steps(engine, adapters, effort, show_progress), *rehearsal]
    loads, fetches = measure_loads(engine, adapters, effort, show_progress)
    show_progress("", None)
    settings = PagedSettings.of(engine.config)
    return Measured(
        engine=f"vLLM {vllm_version} on {_device()}, {'/'.join(Path(engine.config.model_config.model).parts[-2:])}, "
        f"{str(engine.config.model_config.dtype).removeprefix('torch.')}",
        memory=memory(engine, adapters),
        limits=limits(engine),
        steps=steps,
        loads=loads,
        fetches=fetches,
        adapters=[(adapter.rank, adapter.size_bytes) for adapter in adapters],
        served=served,
        policy={name: getattr(settings, name) for name in _POLICY},
        assumptions=[
            "Adapters on disk are in the system's page cache; a fetch reads their headers as well, as for new ones.",
            "Bytes and bandwidths are those of one tensor-parallel rank.",
        ],
    )


def memory(engine: LiveEngine, adapters: list[LiveAdapter]) -> dict[str, int]:
    """The engine's ``MemoryCosts``."""
    block_tokens = engine.config.cache_config.block_size
    storage = engine.memory.storage
    assert isinstance(storage, PagedStorage)  # as ``start_engine`` asks for
    layout = storage.layout
    block_bytes = layout.num_layers * layout.page_elems * layout.pages_per_block * layout.element_bytes
    return {
        "block_tokens": block_tokens,
        "kv_bytes_per_token": block_bytes // block_tokens,
        "pool_blocks": layout.num_blocks - 1,  # One is vLLM's own.
        "adapter_host_bytes": PagedSettings.of(engine.config).adapter_host_bytes,
        "adapter_bytes_per_rank": round(statistics.median(one.size_bytes / one.rank for one in adapters)),
    }


def limits(engine: LiveEngine) -> dict[str, float]:
    """The engine's ``EngineLimits``."""
    scheduler = engine.config.scheduler_config
    return {
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "max_model_len": engine.config.model_config.max_model_len,
        "watermark_share": scheduler.watermark,
    }


def start_engine(
    model: str, dtype: str, kv_cache_bytes: int | None, adapter_host_bytes: int, max_model_len: int | None
) -> LLMEngine:
    """The paged engine, in this process."""
    arguments: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": 64,
        "enable_lora": True,
        "disable_log_stats": True,
        "enforce_eager": current_platform.is_cpu(),
        **paged_arguments(PagedSettings(adapter_host_bytes=adapter_host_bytes)),
    }
    if kv_cache_bytes is not None:
        arguments["kv_cache_memory_bytes"] = kv_cache_bytes
    return LLMEngine.from_engine_args(EngineArgs(**arguments))


def _device() -> str:
    return str(current_platform.get_device_name() or current_platform.device_name)


def _main() -> int:
    parser = argparse.ArgumentParser(description="one engine's measurements, for the parent process")
    parser.add_argument("task", type=Path, help="pickled arguments")
    parser.add_argument("result", type=Path)
    given = parser.parse_args()
    task = pickle.loads(given.task.read_bytes())
    show_progress("starting the engine", 0.0)
    engine = LiveEngine(start_engine(**task["engine"]), task["seed"], CLOCKS[task["clock"]]())
    try:
        answer: Measured | CalibrationError = measure(engine, task["folders"], task["effort"], task["seed"])
    except CalibrationError as error:
        answer = error
    given.result.write_bytes(pickle.dumps(answer))
    engine.llm.engine_core.shutdown()
    return 0


if __name__ == "__main__":
    raise SystemExit(_main())
