"""KV memory shared by requests and adapters: who has to give way, and that nothing is ever lost."""

import random

from engine_harness import PagedEngine

from chameleon_ray.demo import DemoPaths
from chameleon_ray.policy.cache import EvictReason

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


def _preemptions_of_a_burst(engine: PagedEngine, seed: int) -> int:
    """32 requests that together need far more than all blocks."""
    requests = [engine.add(_long_prompt(seed + i, 300), max_tokens=200) for i in range(32)]
    # Requests are freed as they end, so their preemptions are counted where they happen.
    num_preemptions, preempt = 0, engine.scheduler._preempt_request

    def counting(*args: object, **kwargs: object) -> None:
        nonlocal num_preemptions
        num_preemptions += 1
        preempt(*args, **kwargs)

    engine.scheduler._preempt_request = counting
    try:
        engine.finish(requests)
    finally:
        del engine.scheduler._preempt_request
    return num_preemptions


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
    [own] = [k for k in engine.memory._known.values() if k.name.startswith(demo.adapter_names()[3] + "@")]
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
    # Small adapters' requests come without end; they hold the adapters' share, so the large one never fits by itself.
    names = demo.adapter_names()
    small = [name for name in names if "-r64-" in name or "-r128-" in name]
    large = small.pop()

    def add_small(i: int) -> str:
        return engine.add(PROMPT, engine.adapter(demo.adapters / small[i % len(small)]), max_tokens=20)

    live = [add_small(i) for i in range(32)]
    engine.run(lambda: any(engine.outcomes[request].tokens for request in live))
    waiting = engine.add(PROMPT, engine.adapter(demo.adapters / large), max_tokens=1)
    num_behind = 0

    def ended() -> bool:
        nonlocal num_behind
        done = [request for request in live if engine.outcomes[request].finish_reason]
        for request in done:
            live.remove(request)
            live.append(add_small(num_behind))
            num_behind += 1
        return engine.outcomes[waiting].finish_reason is not None

    engine.run(ended)
    assert num_behind < 64, "it waited for two whole generations of requests that came after it"


def test_ten_thousand_aborts_leave_nothing_behind(engine: PagedEngine, demo: DemoPaths) -> None:
    # ``step`` checks all books; the requests are aborted before their adapter is known, while it is read or loaded,
    # while they wait, run, and after their end.
    rng = random.Random(7)
    adapters = [None, *(engine.adapter(demo.adapters / name) for name in demo.adapter_names())]
    live: list[str] = []
    for _ in range(10_000):
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


def test_prefix_cache_can_be_reset_although_idle_adapters_hold_blocks(engine: PagedEngine, demo: DemoPaths) -> None:
    engine.finish([engine.add(PROMPT, engine.adapter(demo.adapters / demo.adapter_names()[0]), 1)])
    assert engine.memory.cache.stats().blocks_held > 0
    assert engine.scheduler.reset_prefix_cache()
