"""Adapters in vLLM's slots under our policy: right answers with fewer slots than adapters, from a whole engine."""

import asyncio
import json
from pathlib import Path
from typing import Any

from engine_harness import Reference
from parity_driver import Event, RealScheduler
from test_parity import COSTS

from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.config import AppConfig
from chameleon_ray.demo import DemoPaths
from chameleon_ray.engine.paged.options import PagedSettings
from chameleon_ray.engine.server import EngineServer
from chameleon_ray.policy.adapter import Adapter, Tier
from chameleon_ray.policy.records import State
from chameleon_ray.sim.workload import SimRequest

PROMPTS = ("Hello, my name is", "What is the capital of France?", "Once upon a time there was")
NUM_TOKENS, NUM_SLOTS = 8, 4
LIMIT_S = 300.0


def test_twelve_adapters_of_all_ranks_in_four_slots_answer_as_merged_weights_do(
    demo: DemoPaths, reference: Reference
) -> None:
    mixed = [None, *demo.adapter_names()[:12], None]
    expected = [reference.tokens(PROMPTS[i % 3], name, NUM_TOKENS) for i, name in enumerate(mixed)]
    assert len(set(expected)) > 11, "the adapters must answer differently for this test to say anything"

    async def test(server: EngineServer) -> None:
        async def answer(number: int, name: str | None) -> tuple[int, ...]:
            return await _ask(server, name, demo.adapters, PROMPTS[number % 3])

        assert server.adapter_memory == "slots"
        for _ in range(2):
            answers = await asyncio.gather(*(answer(number, name) for number, name in enumerate(mixed)))
            assert answers == expected
        await answer(0, None)  # Its report says what the last adapter's step has done.
        await server.refresh_residency()
        found = server.policy_report()
        assert found is not None
        report, _ = found
        assert (report.cache.blocks_held, report.cache.adapters_in_host) == (NUM_SLOTS, 12)
        assert sorted(server.tiers.values()) == [Tier.HOST] * 8 + [Tier.GPU] * NUM_SLOTS
        assert not report.limits.shares_kv and report.limits.max_blocks == NUM_SLOTS
        assert server.activity().kv_adapters_share == 0, "slots are no part of the KV cache"
        unloaded = next(digest for digest, tier in server.tiers.items() if tier is Tier.GPU)
        while unloaded in server.known:
            await server.retire([unloaded])
        await answer(0, None)
        assert unloaded not in server.tiers and len(server.tiers) == 11

    asyncio.run(_with_server(demo, test, {"adapter_memory": "slots", "adapter_host_gib": 0.1}))


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

    async def test(server: EngineServer) -> None:
        assert server.adapter_memory == "stock"
        asked = (_ask(server, name, demo.adapters, PROMPTS[0]) for name in names)
        assert await asyncio.gather(*asked) == expected
        await server.refresh_residency()
        assert sorted(server.tiers.values()) == [Tier.HOST] * 2 + [Tier.GPU] * NUM_SLOTS
        await server.retire(list(server.known))
        await server.refresh_residency()
        assert not server.known and not server.tiers

    asyncio.run(_with_server(demo, test, {"adapter_memory": "stock"}))


async def _with_server(demo: DemoPaths, test: Any, memory: dict[str, Any]) -> None:
    engine = {"dtype": "float32", "max_model_len": 512, "kv_cache_gib": 0.06, "enforce_eager": True}
    engine |= {"max_loras": NUM_SLOTS} | memory
    config = AppConfig.from_args({"model": {"source": str(demo.model), "name": "demo"}, "engine": engine})
    async with asyncio.timeout(LIMIT_S):
        server = await EngineServer.start(config)
        try:
            await test(server)
        finally:
            server.shutdown()


async def _ask(server: EngineServer, name: str | None, adapters: Path, prompt: str) -> tuple[int, ...]:
    """The tokens of a greedy answer."""
    record = folder = None
    if name is not None:
        folder = adapters / name
        size = (folder / "adapter_model.safetensors").stat().st_size
        digest = (name.encode().hex() + "0" * 64)[:64]
        record = AdapterRecord(name=name, digest=digest, uri=str(folder), rank=8, size_bytes=size)
    model = name or "demo"
    body = {"model": model, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    body |= {"return_token_ids": True}
    async with server.call("/v1/completions", json.dumps(body).encode(), model, record, folder) as call:
        assert (await call.head()).status == 200
        return tuple(json.loads(await call.body())["choices"][0]["token_ids"])
