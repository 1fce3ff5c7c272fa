"""What cannot be served from KV memory is served from vLLM's slots, and the log says why."""

import asyncio
import logging
import subprocess
from pathlib import Path
from typing import Any

import pytest
from chameleon_kernels import cpu_build
from spin_probe import PROBE

from chameleon_ray.config import AppConfig
from chameleon_ray.demo import DemoPaths
from chameleon_ray.engine.paged.messages import PagedUnsupportedError, tells_starter, told_reason
from chameleon_ray.engine.server import EngineServer


def test_whoever_starts_an_engine_hears_why_its_processes_refuse() -> None:
    @tells_starter
    def refuse(error: Exception) -> None:
        raise error

    with told_reason() as reason:
        with pytest.raises(ZeroDivisionError):
            refuse(ZeroDivisionError())
        assert reason() == ""
        with pytest.raises(PagedUnsupportedError):
            refuse(PagedUnsupportedError("it is round"))
        assert reason() == "it is round"


def test_kernel_that_computes_wrong_results_is_found_before_anything_is_served(
    demo: DemoPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(cpu_build.CACHE_ENV, str(tmp_path))
    _break(cpu_build.build(), tmp_path)
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    engine = {"kv_cache_gib": 0.1, "worker_spin_s": 0.003, "vllm_args": {"worker_extension_cls": PROBE}}
    config = AppConfig.from_args({"model": {"source": str(demo.model)}, "engine": engine})

    async def served_from() -> tuple[str, Any]:
        server = await EngineServer.start(config)
        try:
            return server.adapter_memory, await server._engine.collective_rpc("spin_times")
        finally:
            server.shutdown()

    assert asyncio.run(served_from()) == ("slots", [[0.003]]), "in slots, workers poll as long as they were told"
    assert "LoRA kernels compute wrong results" in caplog.text


def _break(library: Path, folder: Path) -> None:
    """Put a kernel that computes something else where the right one is cached."""
    source = folder / "wrong.cpp"
    right = cpu_build.SOURCE.read_text()
    source.write_text(right.replace("sums[t] += scale[t][i] * weights", "sums[t] += 1.5f * scale[t][i] * weights"))
    assert source.read_text() != right
    compiler, flags = cpu_build._compiler(), [*cpu_build.COMPILE_FLAGS, "-march=native"]
    subprocess.run([compiler, *flags, "-shared", str(source), "-o", str(library)], check=True)
