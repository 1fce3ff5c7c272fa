"""What cannot be served from KV memory is served from vLLM's slots, and the log says why."""

import asyncio
import json
import logging
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from chameleon_kernels import cpu_build
from engine_harness import Reference
from spin_probe import PROBE

from chameleon_ray.adapters.errors import AdapterInvalidError, AdapterLoadError
from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.adapters.validate import Rules, validate_adapter
from chameleon_ray.config import AppConfig
from chameleon_ray.demo import DemoPaths
from chameleon_ray.engine.paged.messages import PagedUnsupportedError, tells_starter, told_reason
from chameleon_ray.engine.server import EngineServer
from chameleon_ray.policy.adapter import Tier

PROMPT, NUM_TOKENS = "Once upon a time there was", 6


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
    demo: DemoPaths,
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(cpu_build.CACHE_ENV, str(tmp_path))
    _break(cpu_build.build(), tmp_path)
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    engine = {
        "kv_cache_gib": 0.1,
        "dtype": "float32",
        "worker_spin_s": 0.003,
        "vllm_args": {"worker_extension_cls": PROBE},
    }
    config = AppConfig.from_args({"model": {"source": str(demo.model)}, "engine": engine})

    patterned = _with_pattern(demo.adapters / demo.adapter_names()[0], tmp_path / "patterned")

    async def served_from() -> tuple[str, Any, tuple[int, ...]]:
        server = await EngineServer.start(config)
        try:
            spin_s = await server._engine.collective_rpc("spin_times")
            tokens = await _ask(server, patterned)
            await _check_retirement(server)
            return server.adapter_memory, spin_s, tokens
        finally:
            server.shutdown()

    where, spin_s, tokens = asyncio.run(served_from())
    assert (where, spin_s) == ("slots", [[0.003]]), "in slots, workers poll as long as they were told"
    assert tokens == reference.tokens(PROMPT, str(patterned), NUM_TOKENS), "each module at its own scale, in slots too"
    assert tokens != reference.tokens(PROMPT, demo.adapter_names()[0], NUM_TOKENS)
    assert "LoRA kernels compute wrong results" in caplog.text


def _with_pattern(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    pattern = {"alpha_pattern": {r".*\.mlp\.down_proj": -3, "q_proj": 1}}
    (folder / "adapter_config.json").write_text(json.dumps(config | pattern))
    return folder


async def _ask(server: EngineServer, folder: Path) -> tuple[int, ...]:
    """The tokens of a greedy answer, after the engine has loaded the adapter as it does before any request, and refused
    others."""
    info = validate_adapter(folder, server.module_table, Rules(max_rank=128, max_bytes=1 << 30))
    record = AdapterRecord(name="x", digest="0" * 64, uri=str(folder), rank=info.rank, size_bytes=info.size_bytes)
    broken = record.model_copy(update={"name": "broken", "digest": "1" * 64})
    shutil.copytree(folder, where := folder.with_name("broken"))
    (where / "adapter_model.safetensors").write_bytes(b"?" * 100)
    with pytest.raises(AdapterInvalidError, match=r"'broken' .*not a whole safetensors file"):
        await server.accept(broken, where)
    with pytest.raises(AdapterLoadError, match="'gone'"):
        gone = record.model_copy(update={"name": "gone", "digest": "2" * 64})
        await server.accept(gone, folder.with_name("gone"))
    await server.accept(record, folder)
    body = {"model": "x", "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    body |= {"return_token_ids": True}
    async with server.call("/v1/completions", json.dumps(body).encode(), "x", record, folder) as call:
        assert (await call.head()).status == 200
        return tuple(json.loads(await call.body())["choices"][0]["token_ids"])


async def _check_retirement(server: EngineServer) -> None:
    await server.refresh_residency()
    assert server.tiers == {"0" * 64: Tier.GPU} and server.known > server.tiers.keys(), "and those that it has refused"
    while server.known:  # Steps of the engine pass until the slot is free.
        await server.retire(list(server.known))
    assert not await server._engine.list_loras()


def _break(library: Path, folder: Path) -> None:
    """Put a kernel that computes something else where the right one is cached."""
    source = folder / "wrong.cpp"
    right = cpu_build.SOURCE.read_text()
    source.write_text(right.replace("sums[t] += scale[t][i] * weights", "sums[t] += 1.5f * scale[t][i] * weights"))
    assert source.read_text() != right
    compiler, flags = cpu_build._compiler(), [*cpu_build.COMPILE_FLAGS, "-march=native"]
    subprocess.run([compiler, *flags, "-shared", str(source), "-o", str(library)], check=True)
