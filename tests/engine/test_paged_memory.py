"""KV memory shared by requests and adapters: who has to give way, and that nothing is ever lost."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from engine_harness import PagedEngine, Reference
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine.core import EngineCore

from chameleon_ray.demo import DemoPaths
from chameleon_ray.engine.paged.messages import StepOrders, StepResults
from chameleon_ray.engine.paged.stats import StatsReporter
from chameleon_ray.policy.adapter import Tier
from chameleon_ray.policy.cache_types import EvictReason

PROMPT = list(range(10, 40))


def _long_prompt(seed: int, num_tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(10, 600) for _ in range(num_tokens)]


def _fill_with_idle_adapters(engine: PagedEngine, demo: DemoPaths) -> int:
    """Returns how many blocks they hold."""
    for name in demo.adapter_names()[:12]:
        engine.finish([engine.add(PROMPT, engine.adapter(demo.adapters / name), 1)])
    held = engine.memory.cache.stats().blocks_held
    assert held > 30
    return held


@dataclass
class _Preemptions:
    count: int = 0


@contextmanager
def _counted_preemptions(engine: PagedEngine) -> Iterator[_Preemptions]:
    # Requests are forgotten as they end, so preemptions are counted where they happen.
    counted, preempt = _Preemptions(), engine.scheduler._preempt_request

    def counting(*args: object, **kwargs: object) -> None:
        counted.count += 1
        preempt(*args, **kwargs)

    engine.scheduler._preempt_request = counting
    try:
        yield counted
    finally:
        del engine.scheduler._preempt_request


def _preemptions_of_a_burst(engine: PagedEngine, seed: int) -> int:
    """32 requests that together need far more than all blocks."""
    requests = [engine.add(_long_prompt(seed + i, 300), max_tokens=200) for i in range(32)]
    with _counted_preemptions(engine) as preemptions:
        engine.finish(requests)
    return preemptions.count


def test_kv_burst_takes_idle_adapters_blocks_and_preempts_nobody_for_them(engine: PagedEngine, demo: DemoPaths) -> None:
    engine.memory.evict_idle()
    without_adapters = _preemptions_of_a_burst(engine, seed=100)
    held = _fill_with_idle_adapters(engine, demo)
    referenced = engine.add(PROMPT, engine.adapter(demo.adapters / demo.adapter_names()[3]), max_tokens=400)
    engine.run(lambda: len(engine.outcomes[referenced].tokens) > 2)
    before = engine.memory.cache.stats().evictions[EvictReason.KV_PRESSURE]
    least: list[int] = []
    step = engine.step

    def watching() -> None:
        step()
        least.append(engine.memory.cache.stats().blocks_held)

    engine.step = watching  # type: ignore[method-assign]
    try:
        with_adapters = _preemptions_of_a_burst(engine, seed=100)
    finally:
        del engine.step
    assert engine.memory.cache.stats().evictions[EvictReason.KV_PRESSURE] > before
    # What is left is what the running request references, and it has not been disturbed.
    [own] = [known for known in engine.memory._known.values() if known.blocks]
    assert own.name == demo.adapter_names()[3]
    assert min(least) == len(own.blocks) < held
    assert with_adapters <= without_adapters + 2  # The referenced adapter's own blocks are missing in this run.
    engine.finish([referenced])
    # Afterwards they grow back.
    assert _fill_with_idle_adapters(engine, demo) > min(least)


def test_adapters_hold_no_more_than_their_share(engine: PagedEngine, demo: DemoPaths) -> None:
    bound = engine.memory.cache.config.max_blocks
    assert bound < engine.num_blocks
    requests = [engine.add(PROMPT, engine.adapter(demo.adapters / name), 4) for name in demo.adapter_names()]
    peak = 0

    def ended() -> bool:
        nonlocal peak
        peak = max(peak, engine.memory.cache.stats().blocks_held)
        return all(engine.outcomes[request].finish_reason for request in requests)

    engine.run(ended)
    assert 0.7 * bound < peak <= bound


def test_request_waiting_for_a_large_adapter_is_not_starved_by_those_behind_it(
    engine: PagedEngine, demo: DemoPaths
) -> None:
    # Requests for four adapters come without end and in turn, so that each of the four is always in use. They fill the
    # adapters' share but for a few blocks: a fifth never fits unless those behind it have to wait.
    names = demo.adapter_names()
    large = [name for name in names if "-r128-" in name]
    used = [*large[:3], next(name for name in names if "-r64-" in name)]
    engine.memory.evict_idle()

    def add(i: int) -> str:
        return engine.add(PROMPT, engine.adapter(demo.adapters / used[i % 4]), max_tokens=10 + i % 7)

    live = [add(i) for i in range(16)]
    num_added = len(live)

    def refill() -> None:
        nonlocal num_added
        for request in [request for request in live if engine.outcomes[request].finish_reason]:
            live.remove(request)
            live.append(add(num_added))
            num_added += 1

    def all_resident() -> bool:
        refill()
        return engine.memory.cache.stats().adapters_resident == 4

    engine.run(all_resident)
    assert engine.memory.cache.stats().blocks_held + 17 > engine.memory.cache.config.max_blocks
    waiting = engine.add(PROMPT, engine.adapter(demo.adapters / large[3]), max_tokens=1)
    num_before = num_added

    def ended() -> bool:
        refill()
        assert num_added < num_before + 200, "it waits while all that came after it is served"
        return engine.outcomes[waiting].finish_reason is not None

    engine.run(ended)


def test_preempted_request_holds_its_adapter_no_longer(
    engine: PagedEngine, demo: DemoPaths, reference: Reference
) -> None:
    names = demo.adapter_names()[:4]
    burst = [
        engine.add(_long_prompt(i, 250), engine.adapter(demo.adapters / names[i % 4]), max_tokens=200)
        for i in range(32)
    ]
    short = engine.add("Hello, my name is", engine.adapter(demo.adapters / names[0]), max_tokens=100)
    with _counted_preemptions(engine) as preemptions:
        engine.finish([*burst, short])  # ``step`` compares who runs with who holds a reference.
    assert preemptions.count > 0
    assert engine.outcomes[short].tokens == reference.tokens("Hello, my name is", names[0], 100)


def test_two_thousand_aborts_leave_nothing_behind(engine: PagedEngine, demo: DemoPaths) -> None:
    # ``step`` checks all books; the requests are aborted before their adapter is known, while it is read or loaded,
    # while they wait, run, and after their end.
    rng = random.Random(7)
    adapters = [None, *(engine.adapter(demo.adapters / name) for name in demo.adapter_names())]
    live: list[str] = []
    for _ in range(2_000):
        live.append(engine.add(PROMPT[: rng.randrange(1, 30)], rng.choice(adapters), max_tokens=rng.randrange(1, 6)))
        if rng.random() < 0.1:
            engine.step()
        engine.abort(live.pop(rng.randrange(len(live))) if rng.random() < 0.9 else live[0])
        engine.memory.check()
        if len(live) > 40:
            for request in live:
                engine.abort(request)
            live.clear()
    for request in live:
        engine.abort(request)
    engine.settle()
    engine.memory.evict_idle()
    engine.memory.check()
    assert engine.free_blocks() == engine.num_blocks


def test_a_retired_adapter_leaves_the_engine_without_any_request(engine: PagedEngine, demo: DemoPaths) -> None:
    adapters = [engine.adapter(demo.adapters / name) for name in demo.adapter_names()[:3]]
    engine.finish([engine.add(PROMPT, adapter, 1) for adapter in adapters])
    running = engine.add(PROMPT, adapters[0], max_tokens=20)
    engine.run(lambda: len(engine.outcomes[running].tokens) > 1)
    memory, host = engine.memory, get_kv_transfer_group().host
    assert EngineCore.retire_adapters(engine.llm.engine_core.engine_core, list(memory._known)), "as by a utility call"
    [outcome] = engine.finish([running])
    assert outcome.finish_reason == "length"
    engine.run(lambda: not engine.scheduler.has_requests())
    assert not memory._known and not memory.cache.tiers()
    assert not host.resident and not host._copies
    assert engine.free_blocks() == engine.num_blocks
    assert engine.finish([engine.add(PROMPT, adapters[0], max_tokens=20)])[0].tokens == outcome.tokens


def test_prefix_cache_can_be_reset_although_idle_adapters_hold_blocks(engine: PagedEngine, demo: DemoPaths) -> None:
    engine.finish([engine.add(PROMPT, engine.adapter(demo.adapters / demo.adapter_names()[0]), 1)])
    assert engine.memory.cache.stats().blocks_held > 0
    assert engine.scheduler.reset_prefix_cache()


def test_reset_takes_adapters_in_use_as_well_and_their_requests_go_on(engine: PagedEngine, demo: DemoPaths) -> None:
    """As vLLM does before sleep and in pause, where the KV cache, adapters included, may be gone afterwards."""
    adapter = engine.adapter(demo.adapters / demo.adapter_names()[0])
    [undisturbed] = engine.finish([engine.add(PROMPT, adapter, 12)])
    request = engine.add(PROMPT, adapter, 12)
    engine.run(lambda: len(engine.outcomes[request].tokens) > 3)
    assert engine.memory.cache.stats().blocks_held > 0
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert engine.memory.cache.stats().blocks_held == 0 and engine.free_blocks() == engine.num_blocks
    engine.memory.check()
    [outcome] = engine.finish([request])
    assert outcome.tokens == undisturbed.tokens


@pytest.mark.parametrize("has_forward", [True, False])
def test_only_steps_without_a_forward_pass_wait_for_adapters(
    engine: PagedEngine, monkeypatch: pytest.MonkeyPatch, has_forward: bool
) -> None:
    """vLLM's V2 runner hands the orders on outside of a forward context, whether the step computes or not."""
    waited: list[bool] = []
    connector = get_kv_transfer_group()
    monkeypatch.setattr(connector.host, "take_results", lambda may_wait: waited.append(may_wait) or StepResults())
    connector.bind_connector_metadata(StepOrders(has_forward=has_forward))
    connector.start_load_kv(SimpleNamespace(attn_metadata=None))
    connector.build_connector_worker_meta()
    connector.clear_connector_metadata()
    assert waited == [not has_forward]


def test_steps_that_compute_say_so_to_the_workers(engine: PagedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduled: list[tuple[bool, bool]] = []
    build = engine.scheduler.connector.build_connector_meta

    def building(output: SchedulerOutput) -> StepOrders:
        orders = build(output)
        scheduled.append((output.total_num_scheduled_tokens > 0, orders.has_forward))
        return orders

    monkeypatch.setattr(engine.scheduler.connector, "build_connector_meta", building)
    engine.finish([engine.add(PROMPT, max_tokens=3)])
    assert (True, True) in scheduled and all(computes == said for computes, said in scheduled)


def test_report_to_the_front_end_says_what_has_changed(
    engine: PagedEngine, demo: DemoPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = demo.adapter_names()
    silent = SimpleNamespace(take=lambda: None)  # The engine's own reporter would take the same durations.
    monkeypatch.setattr(engine.scheduler.connector, "_reporter", silent)
    engine.memory.evict_idle()
    now_s = 0.0
    reporter = StatsReporter(engine.memory, lambda: now_s)
    first = reporter.take()
    assert first is not None
    assert reporter.take() is None, "nothing has changed"
    request = engine.add(PROMPT, engine.adapter(demo.adapters / names[0]), 4)
    engine.run(lambda: len(engine.outcomes[request].tokens) > 1)
    assert reporter.take() is None, "it is not yet time, and more steps will follow"
    now_s = 1.0
    busy = reporter.take()
    assert busy is not None
    engine.finish([request])
    idle = reporter.take()
    assert idle is not None, "this step may be the last for long"
    assert (busy.data["cache"]["requests_running"], idle.data["cache"]["requests_running"]) == (1, 0)
    # What the host copy displaced is reported as well.
    assert list(busy.data["tiers"].values()).count(Tier.GPU) == 1 and idle.data["tiers"] == {}
    assert len(busy.data["waited"]) == 1 and not idle.data["waited"]  # In which queue depends on what came before.
    assert busy.data["queues"]["num_running"] == 1 and idle.data["queues"]["num_running"] == 0
    assert idle.data["predictions"]["num_requests"] > 0
    assert busy.data["seconds"]["load"] and not idle.data["seconds"]["load"]
    assert idle.data["cache"]["loads"] == first.data["cache"]["loads"] + 1
    both = busy.aggregate(idle).data
    assert both["tiers"] == busy.data["tiers"] and both["cache"] == idle.data["cache"]
