"""Adapters in vLLM's slots, under our policy and as vLLM comes: right answers with fewer slots than adapters.

The engine under our policy was meant to have its adapters in KV memory, by a kernel that computes wrong results.
"""

import asyncio
import json
import logging
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chameleon_kernels import cpu_build
from engine_harness import Reference
from parity_driver import Event, RealScheduler
from served_engine import PROBED, SMALL, SPIN_S, ServedEngine
from test_parity import COSTS

from chameleon_ray.adapters.errors import AdapterInvalidError, AdapterLoadError
from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.adapters.validate import Rules, validate_adapter
from chameleon_ray.demo import DemoPaths
from chameleon_ray.engine.paged.options import PagedSettings
from chameleon_ray.engine.server import EngineServer
from chameleon_ray.policy.adapter import Adapter, Tier
from chameleon_ray.policy.records import State
from chameleon_ray.sim.workload import SimRequest

PROMPTS = ("Hello, my name is", "What is the capital of France?", "Once upon a time there was")
NUM_TOKENS, NUM_SLOTS = 8, 4


@pytest.fixture(scope="module")
def log() -> Iterator[list[str]]:
    """What a replica logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ray.serve").addHandler(handler)
    yield lines
    logging.getLogger("ray.serve").removeHandler(handler)


@pytest.fixture(scope="module")
def fallen_back(demo: DemoPaths, tmp_path_factory: pytest.TempPathFactory, log: list[str]) -> Iterator[ServedEngine]:
    """An engine for which ``auto`` came to be slots."""
    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(cpu_build.CACHE_ENV, str(folder))
        _put_wrong_kernel(folder)
        served = ServedEngine(demo, SMALL | PROBED | {"adapter_memory": "auto", "adapter_host_gib": 0.1})
    yield served
    served.close()


def _put_wrong_kernel(folder: Path) -> None:
    """Where the right one would be cached."""
    source, right = folder / "wrong.cpp", cpu_build.SOURCE.read_text()
    source.write_text(right.replace("sums[t] += scale[t][i] * weights", "sums[t] += 1.5f * scale[t][i] * weights"))
    assert source.read_text() != right
    compiler, flags = cpu_build._compiler(), [*cpu_build.COMPILE_FLAGS, "-march=native"]
    library = folder / f"paged_lora-{cpu_build._key(compiler, flags)}.so"
    subprocess.run([compiler, *flags, "-O0", "-shared", str(source), "-o", str(library)], check=True)


def test_kernel_that_computes_wrong_results_is_found_before_anything_is_served(
    fallen_back: ServedEngine, log: list[str]
) -> None:
    assert fallen_back.server.adapter_memory == "slots"
    assert any("LoRA kernels compute wrong results" in line for line in log)

    async def test() -> None:
        spin_s = await fallen_back.server._engine.collective_rpc("spin_times")
        assert spin_s == [[SPIN_S]], "in slots, workers poll as long as they were told"

    fallen_back.run(test)


def test_in_slots_each_module_has_its_own_scale_and_what_is_refused_is_forgotten(
    fallen_back: ServedEngine, demo: DemoPaths, reference: Reference, tmp_path: Path
) -> None:
    server, plain = fallen_back.server, demo.adapter_names()[0]
    folder = _with_pattern(demo.adapters / plain, tmp_path / "patterned")

    async def test() -> None:
        await fallen_back.forget_all()
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
        tokens = await _answer(server, "x", record, folder, PROMPTS[2])
        assert tokens == reference.tokens(PROMPTS[2], str(folder), NUM_TOKENS)
        assert tokens != reference.tokens(PROMPTS[2], plain, NUM_TOKENS)
        assert server.tiers == {record.digest: Tier.GPU}
        assert server.known > server.tiers.keys(), "and those that it has refused"
        while server.known:  # Steps of the engine pass until the slot is free.
            await server.retire(list(server.known))
        assert not await server._engine.list_loras()

    fallen_back.run(test)


def _with_pattern(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    pattern = {"alpha_pattern": {r".*\.mlp\.down_proj": -3, "q_proj": 1}}
    (folder / "adapter_config.json").write_text(json.dumps(config | pattern))
    return folder


def test_twelve_adapters_of_all_ranks_in_eight_slots_answer_as_merged_weights_do(
    fallen_back: ServedEngine, demo: DemoPaths, reference: Reference
) -> None:
    mixed = [None, *demo.adapter_names()[:12], None]
    expected = [reference.tokens(PROMPTS[i % 3], name, NUM_TOKENS) for i, name in enumerate(mixed)]
    assert len(set(expected)) > 11, "the adapters must answer differently for this test to say anything"
    server = fallen_back.server

    async def answer(number: int, name: str | None) -> tuple[int, ...]:
        return await _ask(server, name, demo.adapters, PROMPTS[number % 3])

    async def test() -> None:
        await fallen_back.forget_all()
        for _ in range(2):
            answers = await asyncio.gather(*(answer(number, name) for number, name in enumerate(mixed)))
            assert answers == expected
        await answer(0, None)  # Its report says what the last adapter's step has done.
        found = server.policy_report()
        assert found is not None
        report, _ = found
        assert (report.cache.blocks_held, report.cache.adapters_in_host) == (8, 12)
        assert sorted(server.tiers.values()) == [Tier.HOST] * 4 + [Tier.GPU] * 8
        assert not report.limits.shares_kv and report.limits.max_blocks == 8
        assert server.activity().kv_adapters_share == 0, "slots are no part of the KV cache"
        unloaded = next(digest for digest, tier in server.tiers.items() if tier is Tier.GPU)
        while unloaded in server.known:
            await server.retire([unloaded])
        await answer(0, None)
        assert unloaded not in server.tiers and len(server.tiers) == 11

    fallen_back.run(test)


def test_an_unloaded_adapter_leaves_its_slot(demo: DemoPaths) -> None:
    adapter = Adapter("a" * 64, 8, 1000)
    request = SimRequest("r0", 0.0, 10, 3, adapter, max_tokens=8)
    real = RealScheduler(str(demo.model), COSTS, PagedSettings(), [adapter], [request], NUM_SLOTS)
    arrives: list[Event] = [("arrive", 0.0, "r0"), ("step", 0.1), ("fetched", adapter.digest), ("step", 0.2)]
    real.replay([*arrives, ("loaded", adapter.digest), *(("step", 1.0 + number) for number in range(6))])
    assert not real.memory.num_requests and real.memory.cache.state(adapter.digest) is State.RESIDENT
    assert real.memory.retire([adapter.digest]) == [adapter.digest]
    real.replay([("step", 10.0)])
    assert real.memory.retire([adapter.digest]) == [] and not real.memory.cache.knows(adapter.digest)
    real.memory.storage.check([])


def test_stock_answers_the_same_and_forgets_what_is_unloaded(demo: DemoPaths, reference: Reference) -> None:
    names = demo.adapter_names()[:6]
    expected = [reference.tokens(PROMPTS[0], name, NUM_TOKENS) for name in names]
    stock = ServedEngine(demo, SMALL | {"adapter_memory": "stock", "max_loras": NUM_SLOTS})
    server = stock.server

    async def test() -> None:
        assert server.adapter_memory == "stock"
        asked = (_ask(server, name, demo.adapters, PROMPTS[0]) for name in names)
        assert await asyncio.gather(*asked) == expected
        await server.refresh_residency()
        assert sorted(server.tiers.values()) == [Tier.HOST] * 2 + [Tier.GPU] * NUM_SLOTS
        await server.retire(list(server.known))
        await server.refresh_residency()
        assert not server.known and not server.tiers

    try:
        stock.run(test)
    finally:
        stock.close()


async def _ask(server: EngineServer, name: str | None, adapters: Path, prompt: str) -> tuple[int, ...]:
    """The tokens of a greedy answer by one of the demo's adapters, or the base model."""
    if name is None:
        return await _answer(server, "demo", None, None, prompt)
    folder = adapters / name
    size = (folder / "adapter_model.safetensors").stat().st_size
    digest = (name.encode().hex() + "0" * 64)[:64]
    record = AdapterRecord(name=name, digest=digest, uri=str(folder), rank=8, size_bytes=size)
    return await _answer(server, name, record, folder, prompt)


async def _answer(
    server: EngineServer, model: str, record: AdapterRecord | None, folder: Path | None, prompt: str
) -> tuple[int, ...]:
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True}
    async with server.call("/v1/completions", json.dumps(body).encode(), model, record, folder) as call:
        assert (await call.head()).status == 200
        return tuple(json.loads(await call.body())["choices"][0]["token_ids"])
