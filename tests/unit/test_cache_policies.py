"""Eviction policies with numbers worked out by hand, and the use history."""

from random import Random

import pytest
from cache_driver import Driver, victims

from chameleon_ray.policy.adapter import Adapter
from chameleon_ray.policy.cache_types import CacheConfig, EvictReason
from chameleon_ray.policy.eviction import POLICIES, UseHistory, Weights
from chameleon_ray.policy.records import CacheEntry


def loaded(policy: str, **config: object) -> Driver:
    """a: small, used 4 times, long ago. b: large, used once, lately. c: middle, used twice, in between."""
    driver = Driver(12, adapter_policy=policy, **config)
    driver.add(a=2, b=6, c=4, x=4)
    driver.host_copies("x", 0.0)
    driver.make_resident("a b c", 0.0)
    for digest, now_s in [("a", 1.0), ("a", 2.0), ("a", 3.0), ("a", 4.0), ("c", 5.0), ("c", 6.0), ("b", 9.0)]:
        driver.use(digest, now_s)
    return driver


# frequency (4-1 uses): a 1, b 0, c 1/3. recency (4..9 s): a 0, b 1, c 0.4. size (2..6 blocks): a 0, b 1, c 0.5.
# chameleon: a 0.45, b 0.10+0.45 = 0.55, c 0.15+0.04+0.225 = 0.415.  fairshare: a 1/3, b 2/3, c (1/3+0.4+0.5)/3 = 0.411.
# gdsf (uses since load / blocks, the clock still at 0): a 4/2, b 1/6, c 2/4.
@pytest.mark.parametrize(
    ("policy", "order"),
    [("chameleon", "c a b"), ("fairshare", "a c b"), ("lru", "a c b"), ("gdsf", "b c a")],
)
def test_order_by_hand(policy: str, order: str) -> None:
    driver = loaded(policy)
    assert victims(driver.cache.reclaim(1, 10.0)) == [order[0]]
    everything = driver.cache.reclaim(12, 10.0)
    assert victims(everything) == order.split()
    assert everything.freed_blocks == 12


def test_chameleon_weights_are_configurable() -> None:
    assert victims(loaded("chameleon", weights=Weights(1.0, 0.0, 0.0)).cache.reclaim(12, 10.0)) == ["b", "c", "a"]
    assert victims(loaded("chameleon", weights=Weights(0.0, 1.0, 0.0)).cache.reclaim(12, 10.0)) == ["a", "c", "b"]
    assert victims(loaded("chameleon", weights=Weights(0.0, 0.0, 1.0)).cache.reclaim(12, 10.0)) == ["a", "c", "b"]


def test_an_adapter_is_in_use_until_its_request_ends() -> None:
    driver = Driver(4, adapter_policy="lru")
    driver.add(long=2, short=2)
    driver.make_resident("long short", 0.0)
    driver.enqueue("r", "long", 1.0)
    driver.acquire("r", 1.0)
    driver.use("short", 2.0)
    driver.release("r", 3.0)
    assert victims(driver.cache.reclaim(4, 4.0)) == ["short", "long"]


def test_uses_outside_the_window_do_not_count() -> None:
    driver = loaded("chameleon", frequency_window_s=30.0)
    # At 36 s only the uses at 9 s (b) remain: frequency a 0, b 1, c 0; score a 0, b 1, c 0.04+0.225.
    assert victims(driver.cache.reclaim(12, 36.5)) == ["a", "c", "b"]
    assert victims(driver.cache.reclaim(12, 29.0)) == ["c", "a", "b"]


def test_equal_scores_go_by_digest() -> None:
    driver = Driver(9, adapter_policy="chameleon")
    driver.add(q=3, p=3, r=3)
    driver.make_resident("q r p", 0.0)
    assert victims(driver.cache.reclaim(9, 1.0)) == ["p", "q", "r"]


def test_single_candidate_scores_zero_on_every_term() -> None:
    history = UseHistory(300.0)
    entry = CacheEntry(Adapter("a", 8, 1000), 1)
    history.used(entry, 5.0)
    for policy in ("chameleon", "fairshare"):
        scorer = POLICIES[policy].scorer(Weights())
        assert scorer(history, [entry], 5.0).tolist() == [0.0]


def test_gdsf_clock_lets_old_popularity_fade() -> None:
    driver = Driver(8, adapter_policy="gdsf")
    driver.add(old=4, b=4, c=4, d=4)
    driver.host_copies("b c d", 0.0)
    driver.make_resident("old", 0.0)
    for now_s in (1.0, 2.0, 3.0, 4.0, 5.0):
        driver.use("old", now_s)  # 5 uses / 4 blocks = 1.25
    # Each newcomer is used three times (0.75 above the clock of its last use) and leaves for the next one; with every
    # eviction the clock rises: b leaves at 0.75, and c, used on a clock of 0.75, is worth 1.5 and outlives old's 1.25.
    driver.step("b", 10.0)
    driver.finish()
    for now_s in (11.0, 12.0, 13.0):
        driver.use("b", now_s)
    assert victims(driver.step("c", 20.0)) == ["b"]
    driver.finish()
    for now_s in (21.0, 22.0, 23.0):
        driver.use("c", now_s)
    assert victims(driver.step("d", 30.0)) == ["old"]


def test_gdsf_uses_start_again_after_eviction() -> None:
    driver = Driver(4, adapter_policy="gdsf")
    driver.add(a=2, b=2, c=2)
    driver.host_copies("c", 0.0)
    driver.make_resident("a b", 0.0)
    for now_s in range(1, 9):
        driver.use("a", float(now_s))
    driver.carry_out(driver.cache.reclaim(4, 10.0), 10.0)  # the clock is now 8 / 2
    driver.step("a b", 11.0)
    driver.finish()
    driver.use("b", 12.0)
    driver.use("b", 13.0)  # a: 4 + 1/2, b: 4 + 2/2
    assert victims(driver.step("c", 14.0)) == ["a"]


def test_discard_evicts_what_no_request_wants() -> None:
    driver = Driver(12, adapter_policy="discard")
    driver.add(a=2, b=2, c=2, d=2)
    driver.host_copies("a b c d", 0.0)
    driver.step("a b c d", 0.0)
    driver.finish()
    driver.enqueue("running", "a", 1.0)
    driver.acquire("running", 1.0)
    driver.enqueue("queued", "b", 1.0)
    plan = driver.step("c", 1.0)
    assert [(e.digest, e.reason) for e in plan.evict] == [("d", EvictReason.DISCARD)]
    driver.release("running", 2.0)
    assert sorted(victims(driver.step("", 2.0))) == ["a", "c"]
    assert driver.cache.stats().evictions[EvictReason.DISCARD] == 3


def test_unknown_policy_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="chameleon, fairshare, lru, gdsf, discard"):
        CacheConfig(max_blocks=1, adapter_host_bytes=1, adapter_policy="fifo")


@pytest.mark.parametrize(
    "bad",
    [
        {"max_blocks": 0},
        {"adapter_host_bytes": 0},
        {"max_fetches": 0},
        {"frequency_window_s": 0.0},
        {"prefetch_pause_s": -1.0},
    ],
)
def test_bad_configuration_names_the_key(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        CacheConfig(**{"max_blocks": 1, "adapter_host_bytes": 1, **bad})


def test_frequency_is_that_of_the_timestamps_within_the_window() -> None:
    rng = Random(3)
    history = UseHistory(30.0)
    entries = [CacheEntry(Adapter(f"d{n:03}", 1, 1), 1) for n in range(150)]
    uses: list[tuple[float, CacheEntry]] = []
    now_s = 1000.0
    for _ in range(3000):
        now_s += rng.choice([0.0, 0.01, 0.1, 0.4, 40.0 if rng.random() < 0.01 else 0.2])
        uses.append((now_s, rng.choice(entries)))
        history.used(uses[-1][1], now_s)
        if rng.random() < 0.05:
            asked_s = now_s + rng.choice([0.0, 0.5, 7.0, 29.0, 31.0, 500.0])
            counted = history.frequencies(entries, asked_s)
            expected = [sum(t // 1.0 > asked_s // 1.0 - 30 for t, used in uses if used is entry) for entry in entries]
            assert counted == expected
