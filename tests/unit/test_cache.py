"""The adapter cache's rules one by one, through its public interface."""

import pickle
from random import Random

import pytest
from cache_driver import BYTES_PER_BLOCK, Driver, victims
from operations import Operations

from chameleon_ray.policy.adapter import Adapter, Tier
from chameleon_ray.policy.cache_types import (
    AdapterTooLarge,
    CacheCorrupt,
    EvictReason,
    IllegalChange,
    StalePlan,
    UnknownAdapter,
)
from chameleon_ray.policy.records import State


def test_life_of_an_adapter_from_source_to_gpu_and_back() -> None:
    driver = Driver(10)
    cache = driver.cache
    cache.add(Adapter("a", rank=8, size_bytes=4000), 4, on_disk=False)
    driver.num_blocks["a"] = 4
    assert cache.tiers() == {"a": Tier.ABSENT}
    assert not driver.enqueue("r1", "a", 0.0)
    assert driver.step("a", 0.0).fetch == ("a",)
    assert (cache.state("a"), cache.tiers()["a"]) == (State.FETCHING, Tier.ABSENT)
    assert not driver.step("a", 0.1)
    driver.finish()
    assert (cache.state("a"), cache.tiers()["a"]) == (State.HOST, Tier.HOST)
    assert driver.step("a", 0.2).load == ("a",)
    assert (cache.state("a"), cache.tiers()["a"], driver.free_blocks) == (State.LOADING, Tier.HOST, 6)
    driver.finish()
    driver.acquire("r1", 0.3)
    assert (cache.state("a"), cache.tiers()["a"]) == (State.RESIDENT, Tier.GPU)
    assert driver.enqueue("r2", "a", 0.4)
    assert not cache.reclaim(4, 0.4)
    driver.release("r1", 0.5)
    driver.release("r2", 0.5)
    driver.carry_out(cache.reclaim(1, 0.6), 0.6)
    assert (cache.state("a"), cache.tiers()["a"], driver.free_blocks) == (State.HOST, Tier.HOST, 10)
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.loads, stats.fetches) == (1, 1, 1, 1)
    assert stats.evictions[EvictReason.KV_PRESSURE] == 1


def test_exactly_enough_room_is_made() -> None:
    driver = Driver(12)
    driver.add(a=1, b=1, c=8, d=2, x=8)
    driver.host_copies("x", 0.0)
    driver.make_resident("a b c d", 0.0)
    for digest, now_s in [("c", 3.0), ("c", 4.0), ("d", 5.0), ("d", 6.0)]:
        driver.use(digest, now_s)
    # Lowest score first is a, b, d, c; c alone is room enough, so the others stay.
    assert victims(driver.cache.reclaim(12, 7.0)) == ["a", "b", "d", "c"]
    plan = driver.step("x", 7.0)
    assert (victims(plan), plan.load) == (["c"], ("x",))


def test_referenced_and_loading_adapters_never_leave() -> None:
    driver = Driver(6)
    driver.add(a=2, b=2, c=2, x=4)
    driver.host_copies("x c", 0.0)
    driver.make_resident("a b", 0.0)
    driver.enqueue("r", "a", 1.0)
    driver.acquire("r", 1.0)
    assert driver.step("c", 1.0).load == ("c",)
    plan = driver.cache.plan(["x"], driver.free_blocks, 1.0)
    assert (plan.blocked, plan.evict, plan.load) == ("x", (), ())
    assert victims(driver.cache.reclaim(6, 1.0)) == ["b"]
    driver.release("r", 2.0)
    assert victims(driver.cache.plan(["x"], driver.free_blocks, 2.0)) == ["b", "a"]


def test_adapters_of_queued_requests_leave_last() -> None:
    driver = Driver(6)
    driver.add(a=2, b=2, c=2, x=2)
    driver.host_copies("x", 0.0)
    driver.make_resident("a b c", 0.0)
    for digest in "bbbccc":
        driver.use(digest, 1.0)
    driver.enqueue("waiting", "a", 1.0)  # a has the lowest score of all
    assert victims(driver.cache.reclaim(6, 2.0)) == ["b", "c", "a"]
    assert victims(driver.cache.reclaim(2, 2.0, keep=["b"])) == ["c"]
    driver.release("waiting", 2.0)
    assert victims(driver.cache.reclaim(6, 2.0))[0] == "a"


def test_a_needed_adapter_gives_way_to_a_more_urgent_one_only() -> None:
    driver = Driver(4)
    driver.add(a=2, b=2, x=4, y=2)
    driver.host_copies("x y", 0.0)
    driver.make_resident("a b", 0.0)
    urgent_last = driver.cache.plan(["a", "b", "x"], 0, 1.0)
    assert (urgent_last.evict, urgent_last.load, urgent_last.blocked) == ((), (), "x")
    one = driver.cache.plan(["a", "y", "b"], 0, 1.0)
    assert (victims(one), one.load, one.blocked) == (["b"], ("y",), "b")
    urgent_first = driver.cache.plan(["x", "a", "b"], 0, 1.0)
    assert (victims(urgent_first), urgent_first.load, urgent_first.blocked) == (["b", "a"], ("x",), "a")


def test_nothing_overtakes_a_needed_adapter_that_does_not_fit_but_others_overtake_one_being_fetched() -> None:
    driver = Driver(6)
    driver.add(a=4, x=4, y=1)
    driver.host_copies("x y", 0.0)
    driver.make_resident("a", 0.0)
    driver.enqueue("r", "a", 1.0)
    driver.acquire("r", 1.0)
    driver.enqueue("later", "y", 1.0)
    plan = driver.cache.plan(["x", "y"], driver.free_blocks, 1.0)
    assert (plan.load, plan.blocked) == ((), "x")
    driver.add(z=4)
    plan = driver.cache.plan(["z", "y"], driver.free_blocks, 1.0)
    assert (plan.fetch, plan.load, plan.blocked) == (("z",), ("y",), None)


def test_share_bound_holds_although_the_pool_has_room() -> None:
    driver = Driver(100, max_blocks=6)
    driver.add(a=3, b=3, c=3)
    driver.host_copies("c", 0.0)
    driver.make_resident("a b", 0.0)
    driver.use("a", 1.0)
    plan = driver.step("c", 2.0)
    assert [(e.digest, e.reason) for e in plan.evict] == [("b", EvictReason.SHARE_BOUND)]
    assert driver.cache.stats().blocks_held == 6


def test_negative_free_blocks_are_given_back_before_anything_is_loaded() -> None:
    driver = Driver(10)
    driver.add(a=2, b=3, c=4, x=1)
    driver.host_copies("x", 0.0)
    driver.make_resident("a b c", 0.0)
    plan = driver.cache.plan(["x"], -4, 1.0)
    assert victims(plan) == ["a", "b"]
    assert {eviction.reason for eviction in plan.evict} == {EvictReason.KV_PRESSURE}
    assert plan.load == ("x",)
    assert driver.cache.plan(["x"], -50, 1.0).freed_blocks == 9
    assert driver.cache.plan(["x"], -50, 1.0).blocked == "x"
    assert driver.cache.plan(["a"], -50, 1.0).blocked == "a"  # resident, but leaves


def test_reclaim_frees_what_it_can_and_says_how_much() -> None:
    driver = Driver(10)
    driver.add(a=2, b=3)
    driver.make_resident("a b", 0.0)
    assert driver.cache.reclaim(0, 1.0).evict == ()
    assert driver.cache.reclaim(3, 1.0).freed_blocks == 3
    assert driver.cache.reclaim(99, 1.0).freed_blocks == 5


def test_prefetch_takes_free_blocks_only_oldest_request_first() -> None:
    driver = Driver(10)
    driver.add(idle=4, n=1, p=2, q=3, r=2)
    driver.host_copies("n p q r", 0.0)
    driver.make_resident("idle", 0.0)
    for number, digest in enumerate(["q", "p", "q", "r"]):
        driver.enqueue(f"r{number}", digest, 1.0 + number)
    plan = driver.cache.plan(["n"], driver.free_blocks, 5.0)
    assert (plan.load, plan.num_prefetch, plan.evict) == (("n", "q", "p"), 2, ())
    driver.release("r0", 5.0)  # q's oldest request is now younger than p's
    assert driver.cache.plan(["n"], driver.free_blocks, 5.0).load == ("n", "p", "q")
    assert driver.cache.plan(["n"], 1, 5.0).load == ("n",)
    driver.step("n", 5.0)
    assert driver.cache.stats().prefetches == 2


def test_prefetch_can_be_off_and_is_bounded_in_flight() -> None:
    for config, expected in [({"prefetch": False}, 0), ({"prefetch_loads": 2}, 2), ({}, 3)]:
        driver = Driver(10, **config)
        driver.add(p=1, q=1, r=1)
        driver.host_copies("p q r", 0.0)
        for digest in "pqr":
            driver.enqueue(digest, digest, 1.0)
        assert len(driver.step("", 1.0).load) == expected
        assert len(driver.step("", 1.0).load) == 0


def test_prefetch_pauses_after_the_kv_cache_took_blocks_back() -> None:
    driver = Driver(4, prefetch_pause_s=2.0)
    driver.add(a=2)
    driver.make_resident("a", 0.0)
    driver.enqueue("r", "a", 1.0)
    driver.carry_out(driver.cache.reclaim(1, 1.0), 1.0)
    assert driver.cache.plan([], 4, 2.9).load == ()
    assert driver.cache.plan(["a"], 4, 2.9).load == ("a",)
    assert driver.cache.plan([], 4, 3.0).load == ("a",)


def test_fetches_are_bounded_and_the_needed_come_first() -> None:
    driver = Driver(10, max_fetches=2)
    driver.add(a=1, b=1, c=1, d=1)
    for digest in "abc":
        driver.enqueue(digest, digest, 0.0)
    assert driver.step("d", 0.0).fetch == ("d", "a")
    assert driver.step("d", 0.0).fetch == ()
    driver.finish()
    assert driver.step("", 0.0).fetch == ("b", "c")


def test_host_copies_leave_by_score_and_awaited_ones_for_needed_adapters_only() -> None:
    driver = Driver(2, adapter_host_bytes=4 * BYTES_PER_BLOCK, adapter_policy="lru", prefetch=False)
    driver.add(a=1, b=1, c=2, x=2, y=2)
    driver.host_copies("b", 1.0)
    driver.host_copies("a", 2.0)
    driver.host_copies("c", 3.0)
    assert driver.cache.stats().host_bytes_held == 4000
    plan = driver.cache.plan(["x"], 0, 4.0)
    assert (plan.drop, plan.fetch) == (("b", "a"), ("x",))
    driver.enqueue("1", "b", 4.0)
    assert driver.cache.plan(["x"], 0, 4.0).drop == ("c",)  # exactly enough: a may stay
    driver.enqueue("2", "c", 4.0)
    driver.enqueue("3", "y", 4.0)
    assert (driver.cache.plan([], 0, 4.0).drop, driver.cache.plan([], 0, 4.0).fetch) == ((), ())
    plan = driver.step("y", 4.0)
    assert (plan.drop, plan.fetch) == (("a", "b"), ("y",))
    assert driver.cache.tiers()["b"] is Tier.DISK


def test_resident_adapter_survives_the_loss_of_its_host_copy() -> None:
    driver = Driver(8, adapter_host_bytes=2 * BYTES_PER_BLOCK)
    driver.add(a=2, b=2)
    driver.make_resident("a", 0.0)
    assert driver.step("b", 1.0).drop == ("a",)
    assert driver.cache.tiers() == {"a": Tier.GPU, "b": Tier.DISK}
    driver.cache.add(driver.cache.entry("a").adapter, 2, on_disk=False)
    driver.carry_out(driver.cache.reclaim(1, 2.0), 2.0)
    assert (driver.cache.state("a"), driver.cache.tiers()["a"]) == (State.ABSENT, Tier.ABSENT)


def test_a_failure_gives_back_what_the_adapter_held_and_harms_no_other() -> None:
    driver = Driver(8)
    driver.add(a=2, b=2)
    cache = driver.cache
    driver.enqueue("r", "a", 0.0)
    driver.step("a b", 0.0)
    cache.failed("a")
    driver.reading.discard("a")
    driver.release("r", 1.0)
    driver.finish()
    assert (cache.state("a"), cache.stats().host_bytes_held) == (State.ABSENT, 2000)
    plan = driver.step("b", 2.0)
    assert (plan.fetch, plan.load, plan.blocked) == ((), ("b",), None)
    assert driver.step("a", 6.0).fetch == ("a",)
    driver.finish()
    assert driver.step("a", 6.0).load == ("a",)
    cache.failed("a")
    del driver.owned["a"]
    cache.check(driver.owned)
    assert (cache.state("a"), cache.stats().host_bytes_held, cache.stats().blocks_held) == (State.ABSENT, 2000, 2)
    assert (cache.stats().fetch_failures, cache.stats().load_failures) == (1, 1)


def test_a_retired_adapter_serves_its_requests_to_the_end_and_is_forgotten() -> None:
    driver = Driver(8)
    driver.add(old=2, new=2)
    driver.make_resident("old new", 0.0)
    cache = driver.cache
    driver.enqueue("running", "old", 1.0)
    driver.acquire("running", 1.0)
    driver.enqueue("queued", "old", 1.0)
    cache.retire("old")
    driver.release("running", 2.0)
    assert not driver.step("", 2.0)
    driver.acquire("queued", 2.0)
    driver.release("queued", 3.0)
    plan = driver.step("", 3.0)
    assert [(e.digest, e.reason) for e in plan.evict] == [("old", EvictReason.RETIRED)]
    assert plan.drop == ("old",)
    assert not cache.knows("old")
    with pytest.raises(UnknownAdapter, match="add it first"):
        cache.entry("old")
    cache.retire("new")
    driver.add(new=2)  # came back in time
    assert not driver.step("", 5.0)


def test_retiring_while_fetching_or_loading_waits_for_the_end() -> None:
    driver = Driver(8)
    driver.add(a=2, b=2, never=1)
    driver.host_copies("b", 0.0)
    driver.step("a b", 0.0)
    for digest in ("a", "b", "never"):
        driver.cache.retire(digest)
    assert not driver.cache.knows("never")
    assert not driver.step("", 1.0)
    driver.finish()
    plan = driver.step("", 2.0)
    assert (victims(plan), sorted(plan.drop)) == (["b"], ["a", "b"])
    assert not driver.cache.knows("a") and not driver.cache.knows("b")


def test_a_preempted_request_keeps_its_age() -> None:
    driver = Driver(4)
    driver.add(a=2, b=2)
    driver.make_resident("a b", 0.0)
    cache = driver.cache
    driver.enqueue("oldest", "a", 1.0)
    driver.acquire("oldest", 1.0)
    driver.enqueue("younger", "b", 2.0)
    driver.enqueue("youngest", "a", 2.0)
    driver.requeue("oldest", 3.0)
    driver.carry_out(cache.reclaim(4, 3.0), 3.0)
    assert cache.plan([], 4, 10.0).load == ("a", "b")
    driver.release("oldest", 4.0)
    assert cache.plan([], 4, 10.0).load == ("b", "a")
    assert (cache.stats().hits, cache.stats().requests_waiting) == (3, 2)


def test_illegal_calls_raise_and_change_nothing() -> None:
    driver = Driver(8, max_blocks=6, adapter_host_bytes=6 * BYTES_PER_BLOCK)
    driver.add(a=2, b=2)
    driver.make_resident("a", 0.0)
    cache = driver.cache
    driver.enqueue("r1", "a", 1.0)
    driver.enqueue("r2", "b", 1.0)
    driver.acquire("r1", 1.0)
    before = pickle.dumps(cache)
    for error, match, call in [
        (IllegalChange, "1 running requests", lambda: cache.evict(cache.entry("a"))),
        (IllegalChange, "no host copy", lambda: cache.drop_host(cache.entry("b"))),
        (IllegalChange, "not fetching", lambda: cache.fetched("a")),
        (IllegalChange, "not fetching or loading", lambda: cache.failed("b")),
        (IllegalChange, "not loading", lambda: cache.loaded("a")),
        (IllegalChange, "is known as", lambda: cache.add(Adapter("a", 2, 2000), 3)),
        (AdapterTooLarge, "7 blocks .* may hold 6", lambda: cache.add(Adapter("c", 2, 2000), 7)),
        (AdapterTooLarge, "7000 bytes .* may hold 6000", lambda: cache.add(Adapter("c", 2, 7000), 2)),
        (UnknownAdapter, "zzz", lambda: cache.plan(["zzz"], 8, 2.0)),
        (UnknownAdapter, "zzz", lambda: cache.retire("zzz")),
    ]:
        with pytest.raises(error, match=match):
            call()
        assert pickle.dumps(cache) == before


def test_a_stale_plan_raises_and_changes_nothing() -> None:
    driver = Driver(8)
    driver.add(a=2, b=2)
    driver.make_resident("a", 0.0)
    plan = driver.cache.plan(["b"], driver.free_blocks, 1.0)
    driver.enqueue("r", "a", 1.0)
    before = pickle.dumps(driver.cache)
    with pytest.raises(StalePlan, match="plan again"):
        driver.cache.commit(plan, 1.0)
    assert pickle.dumps(driver.cache) == before
    plan = driver.cache.plan(["b"], driver.free_blocks, 1.0)
    driver.cache.commit(plan, 1.0)
    with pytest.raises(StalePlan):
        driver.cache.commit(plan, 1.0)


def test_check_reports_a_driver_that_disagrees() -> None:
    driver = Driver(8)
    driver.add(a=2)
    driver.make_resident("a", 0.0)
    driver.enqueue("r", "a", 1.0)
    driver.cache.check({"a": 2})
    with pytest.raises(CacheCorrupt, match="in the pool"):
        driver.cache.check({"a": 1})
    with pytest.raises(CacheCorrupt, match="in the pool"):
        driver.cache.check({})


def test_eviction_cost_is_the_load_time_times_the_chance_of_another_use() -> None:
    driver = Driver(6, adapter_policy="lru")
    assert driver.cache.eviction_cost_s(0, 0.0, lambda size_bytes: 1.0) == 0.0
    driver.add(a=2, b=2)
    driver.make_resident("a b", 0.0)
    cache = driver.cache

    def cost_s(free_blocks: int) -> float:
        return cache.eviction_cost_s(free_blocks, 10.0, lambda size_bytes: size_bytes / 1000)

    assert cost_s(0) == 0.0  # nobody used either: nothing is lost
    for now_s in (1.0, 2.0):
        driver.use("a", now_s)
        driver.use("b", now_s + 0.5)
    assert cost_s(0) == pytest.approx(2.0 * (1 - 2.718281828**-2))
    driver.enqueue("waiting", "a", 3.0)
    driver.enqueue("running", "b", 3.0)
    driver.acquire("running", 3.0)
    assert cost_s(0) == 2.0
    driver.acquire("waiting", 3.0)
    assert cost_s(0) == 2.0  # no room at all: one load's wait
    assert cost_s(2) == 0.0


def test_two_thousand_aborts_leave_nothing_behind() -> None:
    rng = Random(11)
    driver = Driver(20, adapter_host_bytes=30 * BYTES_PER_BLOCK)
    names = [f"a{number}" for number in range(12)]
    driver.add(**{name: rng.choice([1, 2, 4, 8]) for name in names})
    live: list[str] = []
    for number in range(2_000):
        now_s = number / 100
        live.append(f"r{number}")
        digest = rng.choice(names)
        driver.enqueue(live[-1], digest, now_s)
        driver.step(digest, now_s)
        if rng.random() < 0.7:
            driver.finish()
        if driver.cache.state(digest) is State.RESIDENT and rng.random() < 0.8:
            driver.acquire(live[-1], now_s)
        while len(live) > rng.randrange(4):
            driver.release(live.pop(rng.randrange(len(live))), now_s)
            driver.cache.check(driver.owned)
    for request_id in live:
        driver.release(request_id, 101.0)
    driver.finish()
    stats = driver.cache.stats()
    assert (stats.requests_running, stats.requests_queued) == (0, 0)
    driver.carry_out(driver.cache.reclaim(20, 101.0), 101.0)
    assert (driver.owned, driver.cache.stats().blocks_held) == ({}, 0)


def serve(policy: str) -> tuple[float, int]:
    """First come first served, four requests at a time, over more adapters than fit: (hit rate, steps taken)."""
    rng = Random(5)
    driver = Driver(24, adapter_policy=policy)
    names = [f"a{number:02}" for number in range(24)]
    driver.add(**{name: (1, 2, 4, 8)[number % 4] for number, name in enumerate(names)})
    driver.host_copies(" ".join(names), 0.0)
    waiting: list[tuple[str, str]] = []
    running: list[tuple[str, int]] = []
    for step in range(20_000):
        now_s = step / 10
        if step < 2000 and step % 2 == 0:
            digest = rng.choices(names, [1 / (1 + rank) for rank in range(24)])[0]
            waiting.append((f"r{step}", digest))
            driver.enqueue(f"r{step}", digest, now_s)
        for request_id, end in [ended for ended in running if ended[1] <= step]:
            running.remove((request_id, end))
            driver.release(request_id, now_s)
        driver.step(" ".join(digest for _, digest in waiting[:3]), now_s)
        while waiting and len(running) < 4 and driver.cache.state(waiting[0][1]) is State.RESIDENT:
            request_id, _ = waiting.pop(0)
            driver.acquire(request_id, now_s)
            running.append((request_id, step + rng.randrange(1, 10)))
        driver.finish()
        if step >= 2000 and not waiting and not running:
            stats = driver.cache.stats()
            assert stats.loads <= stats.misses  # no load was for nothing: each served a request that had missed
            return stats.hits / (stats.hits + stats.misses), step
    raise AssertionError(f"{policy}: {len(waiting)} requests never ran")


def test_every_policy_serves_every_request_and_caching_pays() -> None:
    hit_rate = {policy: serve(policy)[0] for policy in ("chameleon", "lru", "fairshare", "gdsf", "discard")}
    assert hit_rate["discard"] < min(rate for policy, rate in hit_rate.items() if policy != "discard")
    assert hit_rate["chameleon"] > 0.5


def cost_of_plans(num_queued: int) -> tuple[int, int]:
    """With 200 residents, in bytecodes: a plan that has nothing to do for 32 adapters, and one that loads them."""
    rng = Random(1)
    driver = Driver(1000)
    cache = driver.cache
    digests = [f"{number:064x}" for number in range(400)]
    for digest in digests:
        cache.add(Adapter(digest, 8, 5000), 5)
        cache.commit(cache.plan([digest], 0, 0.0), 0.0)
        cache.fetched(digest)
    for digest in digests[:200]:
        cache.commit(cache.plan([digest], 5, 0.0), 0.0)
        cache.loaded(digest)
    for number in range(num_queued):
        driver.enqueue(f"r{number}", rng.choice(digests), number / 1000)
    with Operations() as idle:
        assert not cache.plan(digests[:32], 3, 2.0)
    with Operations() as evicting:
        plan = cache.plan(digests[200:232], 3, 2.0)
    assert len(plan.evict) == len(plan.load) == 32
    return idle.count, evicting.count


def test_a_plan_costs_little_however_many_requests_are_queued() -> None:
    idle, evicting = cost_of_plans(num_queued=1000)
    assert (idle, evicting) == pytest.approx(cost_of_plans(num_queued=10_000), rel=0.1)
    # Measured: 44 and 290 microseconds for these 2,900 and 24,200.
    assert 0 < idle < 6_000 and 0 < evicting < 50_000
