"""The adapter cache under random histories, against a plain model that computes everything again from what happened."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
from cache_driver import BYTES_PER_BLOCK, Driver, victims
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from chameleon_ray.policy.cache import AdapterCache
from chameleon_ray.policy.cache_types import EvictReason, Plan, StalePlan
from chameleon_ray.policy.records import State

WINDOW_S = 30.0
POOL_BLOCKS = 20
MAX_BLOCKS = 14
HOST_BYTES = 16 * BYTES_PER_BLOCK
SIZES = {"a": 1, "b": 2, "c": 2, "d": 3, "e": 4, "f": 6, "g": 8, "h": 5}
DIGESTS = st.sampled_from(sorted(SIZES))


class Model:
    """What requests did, as lists; scores are worked out from them one adapter at a time."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.queued: dict[str, str] = {}
        self.running: dict[str, str] = {}
        self.age: dict[str, int] = {}
        self.uses: list[tuple[float, str]] = []
        self.last_used_s = dict.fromkeys(SIZES, 0.0)

    def order(self, candidates: list[str], now_s: float) -> list[str]:
        """The candidates, the first to leave in front."""
        wanted = set(self.queued.values())
        score = self._scores(candidates, now_s)
        return sorted(candidates, key=lambda digest: (digest in wanted, score[digest], digest))

    def _scores(self, candidates: list[str], now_s: float) -> dict[str, float]:
        if self.policy == "lru":
            return {digest: self.last_used_s[digest] for digest in candidates}
        recent = [digest for used_s, digest in self.uses if used_s // 1.0 > now_s // 1.0 - WINDOW_S]
        terms = [
            {digest: float(recent.count(digest)) for digest in candidates},
            {digest: self.last_used_s[digest] for digest in candidates},
            {digest: float(SIZES[digest] * BYTES_PER_BLOCK) for digest in candidates},
        ]
        weights = (0.45, 0.10, 0.45) if self.policy == "chameleon" else (1 / 3, 1 / 3, 1 / 3)
        total = dict.fromkeys(candidates, 0.0)
        for weight, term in zip(weights, terms, strict=True):
            low, high = min(term.values(), default=0.0), max(term.values(), default=0.0)
            for digest in candidates:
                total[digest] += weight * ((term[digest] - low) / (high - low) if high > low else 0.0)
        return total


def fewest(order: list[str], num_blocks: int) -> list[str] | None:
    """The front of the order that holds so many blocks, less who is not needed for it; None if all are too few."""
    leaving: list[str] = []
    while sum(SIZES[digest] for digest in leaving) < num_blocks:
        if len(leaving) == len(order):
            return None
        leaving.append(order[len(leaving)])
    for digest in reversed(leaving.copy()):
        if sum(SIZES[other] for other in leaving if other != digest) >= num_blocks:
            leaving.remove(digest)
    return leaving


def called(driver: Driver, method: str) -> Callable[..., Any]:
    """What the cache is asked; what requests do is the driver's."""
    return getattr(driver if method in ("enqueue", "acquire", "requeue", "release") else driver.cache, method)


class CacheMachine(RuleBasedStateMachine):
    """Random requests, steps, results and KV demand on one cache."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 100.0
        self.num_requests = 0
        self.log: list[tuple[str, tuple[Any, ...], Any]] = []

    @initialize(policy=st.sampled_from(["chameleon", "fairshare", "lru", "gdsf", "discard"]))
    def start(self, policy: str) -> None:
        self.config = {
            "max_blocks": MAX_BLOCKS,
            "adapter_host_bytes": HOST_BYTES,
            "adapter_policy": policy,
            "frequency_window_s": WINDOW_S,
            "max_fetches": 2,
            "prefetch_loads": 3,
        }
        self.policy = policy
        self.driver = Driver(POOL_BLOCKS, **self.config)
        self.driver.add(**SIZES)
        self.cache = self.driver.cache
        self.model = Model(policy)

    def call(self, method: str, *args: Any) -> Any:
        """Call the cache, or the driver for what requests do, and keep a record for the replay."""
        result = called(self.driver, method)(*args)
        self.log.append((method, args, result))
        return result

    def pure(self, question: Callable[[], Plan]) -> Plan:
        """Ask a question twice; it leaves no trace and has one answer."""
        before = pickle.dumps(self.cache)
        plan = question()
        assert pickle.dumps(self.cache) == before
        assert question() == plan
        return plan

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 3.0, 20.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(digest=DIGESTS)
    def enqueue(self, digest: str) -> None:
        request_id = f"r{self.num_requests}"
        hit = self.call("enqueue", request_id, digest, self.now_s)
        assert hit == (digest in self.driver.resident)
        self.model.queued[request_id] = digest
        self.model.age[request_id] = self.num_requests
        self.model.uses.append((self.now_s, digest))
        self.model.last_used_s[digest] = self.now_s
        self.num_requests += 1

    @precondition(lambda self: self.model.queued)
    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.model.queued)))
        digest = self.model.queued[request_id]
        if digest not in self.driver.resident:
            return
        self.call("acquire", request_id, self.now_s)
        self.model.running[request_id] = self.model.queued.pop(request_id)
        self.model.last_used_s[digest] = self.now_s

    @precondition(lambda self: self.model.running)
    @rule(data=st.data())
    def requeue(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.model.running)))
        self.call("requeue", request_id, self.now_s)
        digest = self.model.queued[request_id] = self.model.running.pop(request_id)
        self.model.last_used_s[digest] = self.now_s

    @precondition(lambda self: self.model.queued or self.model.running)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.model.queued | self.model.running)))
        self.call("release", request_id, self.now_s)
        self.model.queued.pop(request_id, None)
        if (digest := self.model.running.pop(request_id, None)) is not None:
            self.model.last_used_s[digest] = self.now_s

    @rule(kv_blocks=st.integers(0, POOL_BLOCKS))
    def kv_demand(self, kv_blocks: int) -> None:
        self.driver.kv_blocks = min(kv_blocks, POOL_BLOCKS - sum(self.driver.owned.values()))

    @rule(needed=st.lists(DIGESTS, unique=True, max_size=4), kv_to_come=st.sampled_from([0, 0, 1, 4]))
    def step(self, needed: list[str], kv_to_come: int) -> None:
        free_blocks = self.driver.free_blocks - kv_to_come
        plan = self.pure(lambda: self.cache.plan(needed, free_blocks, self.now_s))
        self.judge(plan, needed, free_blocks)
        self.log.append(("plan", (needed, free_blocks, self.now_s), plan))
        self.commit(plan)

    @rule(num_blocks=st.integers(0, POOL_BLOCKS), keep=st.lists(DIGESTS, max_size=1))
    def reclaim(self, num_blocks: int, keep: list[str]) -> None:
        plan = self.pure(lambda: self.cache.reclaim(num_blocks, self.now_s, keep))
        idle = [digest for digest in self.idle() if digest not in keep]
        assert not (plan.load or plan.fetch or plan.drop)
        if self.policy in ("chameleon", "fairshare", "lru"):
            order = self.model.order(idle, self.now_s)
            expected = fewest(order, num_blocks)
            assert victims(plan) == (order if expected is None else expected)
        else:
            assert plan.freed_blocks >= min(num_blocks, sum(SIZES[digest] for digest in idle))
            assert set(victims(plan)) <= set(idle)
        self.log.append(("reclaim", (num_blocks, self.now_s, keep), plan))
        self.commit(plan)

    @rule(needed=st.lists(DIGESTS, unique=True, min_size=1, max_size=3), digest=DIGESTS)
    def commit_too_late(self, needed: list[str], digest: str) -> None:
        plan = self.cache.plan(needed, self.driver.free_blocks, self.now_s)
        self.enqueue(digest)
        before = pickle.dumps(self.cache)
        with pytest.raises(StalePlan):
            self.cache.commit(plan, self.now_s)
        assert pickle.dumps(self.cache) == before

    @precondition(lambda self: self.driver.reading)
    @rule(data=st.data(), fails=st.sampled_from([False, False, False, True]))
    def end_fetch(self, data: st.DataObject, fails: bool) -> None:
        digest = data.draw(st.sampled_from(sorted(self.driver.reading)))
        self.driver.reading.remove(digest)
        if fails:
            self.call("failed", digest)
        else:
            self.call("fetched", digest)
            self.driver.host.add(digest)

    @precondition(lambda self: self.loading())
    @rule(data=st.data(), fails=st.sampled_from([False, False, False, True]))
    def end_load(self, data: st.DataObject, fails: bool) -> None:
        digest = data.draw(st.sampled_from(self.loading()))
        if fails:
            self.call("failed", digest)
            del self.driver.owned[digest]
            self.driver.host.remove(digest)
        else:
            self.call("loaded", digest)

    @invariant()
    def everything_adds_up(self) -> None:
        if not self.log:
            return
        self.cache.check(self.driver.owned)
        held = sum(self.driver.owned.values())
        assert held <= MAX_BLOCKS
        assert held + self.driver.kv_blocks + self.driver.free_blocks == POOL_BLOCKS
        assert self.driver.free_blocks >= 0
        host_bytes = sum(SIZES[digest] * BYTES_PER_BLOCK for digest in self.driver.host | self.driver.reading)
        stats = self.cache.stats()
        assert (stats.blocks_held, stats.host_bytes_held) == (held, host_bytes)
        assert host_bytes <= HOST_BYTES
        assert set(self.model.running.values()) <= self.driver.resident
        resident = self.driver.resident
        assert stats.requests_waiting == sum(digest not in resident for digest in self.model.queued.values())

    def teardown(self) -> None:
        """The same history on a fresh cache gives the same decisions."""
        if not self.log:
            return
        again = Driver(POOL_BLOCKS, **self.config)
        again.add(**SIZES)
        for method, args, result in self.log:
            assert called(again, method)(*args) == result
        assert again.cache.stats() == self.cache.stats()

    def commit(self, plan: Plan) -> None:
        self.log.append(("commit", (plan, self.now_s), None))
        self.driver.carry_out(plan, self.now_s)
        for digest in (*plan.load, *plan.fetch):
            self.model.last_used_s[digest] = self.now_s

    def idle(self) -> list[str]:
        return sorted(self.driver.resident - set(self.model.running.values()))

    def loading(self) -> list[str]:
        return sorted(digest for digest in self.driver.owned if self.cache.state(digest) is State.LOADING)

    def judge(self, plan: Plan, needed: list[str], free_blocks: int) -> None:
        """The rules of planning, each computed from the model alone."""
        idle = self.idle()
        leaving = victims(plan)
        assert set(leaving) <= set(idle)
        discarded = {e.digest for e in plan.evict if e.reason is EvictReason.DISCARD}
        if self.policy == "discard":
            assert discarded == set(idle) - set(self.model.queued.values()) - set(needed)
        chosen = [digest for digest in leaving if digest not in discarded]
        loads = list(plan.load[: len(plan.load) - plan.num_prefetch])
        ahead = list(plan.load[len(loads) :])
        self.judge_loads(plan, needed, loads, chosen)

        freed_before = sum(SIZES[digest] for digest in discarded)
        share = MAX_BLOCKS - sum(self.driver.owned.values())
        room = min(free_blocks, share) + freed_before
        short = sum(SIZES[digest] for digest in loads) - room
        freed = sum(SIZES[digest] for digest in chosen)
        if loads or freed >= short:
            assert freed >= short
            assert all(freed - SIZES[digest] < short for digest in chosen)  # exactly enough: nobody leaves needlessly
        else:
            assert set(chosen) == set(idle) - discarded  # all for the KV cache, and still too few
        others = [digest for digest in idle if digest not in needed and digest not in discarded]
        expected = fewest(self.model.order(others, self.now_s), short)
        if self.policy in ("chameleon", "fairshare", "lru") and free_blocks >= 0 and expected is not None:
            assert chosen == expected
        self.judge_prefetch(plan, ahead, room + freed - sum(SIZES[digest] for digest in loads))
        self.judge_fetches(plan, needed)

    def judge_loads(self, plan: Plan, needed: list[str], loads: list[str], chosen: list[str]) -> None:
        in_host = [digest for digest in needed if self.cache.state(digest) is State.HOST]
        if plan.blocked is None:
            assert loads == in_host
        else:
            before = needed[: needed.index(plan.blocked)]
            assert loads == [digest for digest in in_host if digest in before]
            assert not plan.num_prefetch
        sacrificed = [digest for digest in needed if digest in chosen]
        if sacrificed:
            assert plan.blocked is not None
            last_loaded = max((needed.index(digest) for digest in loads), default=-1)
            assert min(needed.index(digest) for digest in sacrificed) > last_loaded

    def judge_prefetch(self, plan: Plan, ahead: list[str], room: int) -> None:
        assert sum(SIZES[digest] for digest in ahead) <= max(room, 0)
        assert len(self.loading()) + len(plan.load) <= 3 or not ahead
        assert all(self.cache.state(digest) is State.HOST for digest in ahead)
        oldest: dict[str, int] = {}
        for request_id, digest in self.model.queued.items():
            oldest[digest] = min(self.model.age[request_id], oldest.get(digest, self.num_requests))
        in_line = sorted(
            (d for d in oldest if self.cache.state(d) is State.HOST and d not in plan.load[: -len(ahead) or None]),
            key=oldest.__getitem__,
        )
        for_queued = [digest for digest in ahead if digest in oldest]
        assert for_queued == in_line[: len(for_queued)]
        assert ahead[: len(for_queued)] == for_queued

    def judge_fetches(self, plan: Plan, needed: list[str]) -> None:
        assert len(self.driver.reading) + len(plan.fetch) <= 2 or not plan.fetch
        for digest in plan.fetch:
            assert self.cache.state(digest) is State.ABSENT
        assert not set(plan.drop) & (set(plan.load) | set(self.loading()))
        assert set(plan.drop) <= self.driver.host
        missing = {d for d in self.model.queued.values() if self.cache.state(d) is State.HOST or d in victims(plan)}
        if not set(plan.fetch) & set(needed):
            assert not set(plan.drop) & missing
        if not set(plan.fetch) & (set(needed) | set(self.model.queued.values())):
            assert not plan.drop


CacheMachine.TestCase.settings = settings(
    max_examples=80, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
TestCacheMachine = CacheMachine.TestCase


def test_questions_about_the_whole_cache_change_nothing() -> None:
    driver = Driver(8)
    driver.add(a=2, b=4, c=4)
    driver.host_copies("c", 0.0)
    driver.make_resident("a b", 0.0)
    driver.enqueue("r", "b", 1.0)
    questions: list[Callable[[AdapterCache], object]] = [
        lambda cache: cache.plan(["c", "a"], 0, 900.0),
        lambda cache: cache.reclaim(3, 900.0),
        lambda cache: cache.eviction_cost_s(0, 900.0, lambda size_bytes: 1.0),
        lambda cache: (cache.tiers(), cache.stats(), cache.state("a"), cache.knows("z")),
        lambda cache: cache.check(),
    ]
    before = pickle.dumps(driver.cache)
    for question in questions:
        question(driver.cache)
        assert pickle.dumps(driver.cache) == before
