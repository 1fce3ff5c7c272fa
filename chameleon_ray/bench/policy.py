"""What policy decisions cost: a replica's step with 1,000 queued requests, its plan for adapters, a routing decision.

The steps are those of ``ReplicaPolicy``, driven as an engine drives it. The time of a step is that of all calls since
the step before: arrivals, ends, loads that completed, admissions, and the plan for adapters, which is also shown alone.

Measured in the thread's CPU time: what other processes take from a busy machine is not the policy's. They also slow it
down, through shared caches, so that everything is done several times and the least time of each step counts: the steps
are the same every time.
"""

import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import thread_time_ns
from typing import TypeVar

from chameleon_ray.policy.adapter import Tier
from chameleon_ray.policy.admission import Obstacle
from chameleon_ray.policy.cache_types import CacheConfig, Plan
from chameleon_ray.policy.disciplines import QueueOptions
from chameleon_ray.policy.records import QueuedRequest
from chameleon_ray.policy.replica import ReplicaConfig, ReplicaPolicy
from chameleon_ray.policy.sizing import SizingOptions
from chameleon_ray.routing.ranking import LoadCosts, rank_replicas
from chameleon_ray.routing.replica_load import ReplicaLoad
from chameleon_ray.routing.replica_table import ReplicaTable, ReplicaView
from chameleon_ray.sim.workload import AdapterMix, make_adapters

NUM_QUEUED = 1000
NUM_ADAPTERS = 200
NUM_REPLICAS = 64
MANY_REPLICAS = 1000
NUM_STEPS = 3000
REPEATS = 5
STEP_S = 0.03
MAX_RUNNING = 64
KV_TOKEN_BYTES = 512 * 1024
BLOCK_TOKENS = 16
LABELS = ("p50", "p99", "max")
RANK_BYTES = 2_500_000
"""KV cache and adapter bytes of a 7-billion-parameter model with 16-bit weights; pool sizes below are in blocks."""


_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Scenario:
    """A replica's memory: pool_blocks of KV cache, host_gib of host copies; load_steps is what a load or read takes."""

    name: str
    pool_blocks: int
    load_steps: int
    host_gib: int


SCENARIOS = (
    Scenario("roomy", pool_blocks=12_000, load_steps=1, host_gib=64),
    Scenario("slow loads", pool_blocks=12_000, load_steps=30, host_gib=4),
    Scenario("no room", pool_blocks=1_500, load_steps=2, host_gib=64),
)


class _Replica:
    """Drives the product's ``ReplicaPolicy`` with a batch that ends by the clock, and times what it calls."""

    def __init__(self, scenario: Scenario, rng: random.Random) -> None:
        self._scenario = scenario
        self._rng = rng
        self._adapters = make_adapters(AdapterMix(count=NUM_ADAPTERS), RANK_BYTES)
        self._weights = [1 / (1 + i // 5) for i in range(NUM_ADAPTERS)]
        self._blocks = {a.digest: -(-a.size_bytes // (BLOCK_TOKENS * KV_TOKEN_BYTES)) for a in self._adapters}
        pool = scenario.pool_blocks
        config = ReplicaConfig(
            CacheConfig(max_blocks=pool, adapter_host_bytes=scenario.host_gib << 30),
            QueueOptions(pool * BLOCK_TOKENS, SizingOptions(KV_TOKEN_BYTES), max_num_seqs=MAX_RUNNING),
            block_tokens=BLOCK_TOKENS,
        )
        self.policy = ReplicaPolicy(config, self)
        for adapter in self._adapters:
            self.policy.add_adapter(adapter, self._blocks[adapter.digest])
        self._running: dict[str, tuple[int, float]] = {}
        self._under_way: list[tuple[int, bool, str]] = []
        self._used_blocks = 0
        self._num_requests = 0
        self._num_steps = 0
        self._spent_ns = 0

    def free_blocks(self) -> int:
        """See ``BlockPool``."""
        return self._scenario.pool_blocks - self._used_blocks

    def kv_blocks(self, request_id: str) -> int:
        """See ``BlockPool``."""
        return self._running[request_id][0]

    def step(self, now_s: float) -> tuple[int, int]:
        """One step with all that came before it; nanoseconds spent in the policy, and those of them in the plan."""
        policy, timed = self.policy, self._timed
        self._num_steps += 1
        self._spent_ns = 0
        self._end_reading()
        for request_id in [request_id for request_id, (_, end_s) in self._running.items() if end_s <= now_s]:
            self._leave_batch(request_id)
            timed(policy.finish, request_id, now_s, 100)
        for _ in range(NUM_QUEUED - policy.num_waiting):
            timed(policy.arrive, self._request(), now_s)
        for request_id in timed(policy.squashes):
            self._leave_batch(request_id)
            timed(policy.requeue, request_id, now_s, squashed=True)
        timed(policy.begin_step, now_s)
        while len(self._running) < MAX_RUNNING and (request := timed(policy.peek)) is not None:
            num_blocks = -(-(request.num_prompt_tokens + request.num_predicted_tokens) // BLOCK_TOKENS)
            short = num_blocks - self.free_blocks()
            if short > 0:
                make_room = partial(policy.make_room, for_request=request.request_id, or_nothing=True)
                self._carry_out(timed(make_room, short, now_s))
            if num_blocks > self.free_blocks():
                timed(policy.pass_over, request.request_id, Obstacle.NO_MEMORY)
                continue
            timed(policy.admit, request.request_id, now_s)
            self._running[request.request_id] = (num_blocks, now_s + request.num_predicted_tokens * STEP_S)
            self._used_blocks += num_blocks
        before_ns = self._spent_ns
        self._carry_out(timed(policy.end_step, now_s))
        return self._spent_ns, self._spent_ns - before_ns

    def _timed(self, method: Callable[..., _Result], *args: object, **options: object) -> _Result:
        start_ns = thread_time_ns()
        result = method(*args, **options)
        self._spent_ns += thread_time_ns() - start_ns
        return result

    def _request(self) -> QueuedRequest:
        self._num_requests += 1
        prompt, output = (min(4000, int(self._rng.lognormvariate(mu, 1.0))) + 1 for mu in (6.0, 4.5))
        adapter = None if self._rng.random() < 0.05 else self._rng.choices(self._adapters, self._weights)[0]
        return QueuedRequest(f"request-{self._num_requests}", prompt, output, adapter)

    def _leave_batch(self, request_id: str) -> None:
        self._used_blocks -= self._running.pop(request_id)[0]

    def _end_reading(self) -> None:
        """Loads and fetches that are due complete."""
        due = [item for item in self._under_way if item[0] <= self._num_steps]
        self._under_way = [item for item in self._under_way if item[0] > self._num_steps]
        for _, is_load, digest in due:
            self._timed(self.policy.loaded if is_load else self.policy.fetched, digest)

    def _carry_out(self, plan: Plan) -> None:
        self._used_blocks -= plan.freed_blocks
        self._used_blocks += sum(self._blocks[digest] for digest in plan.load)
        done_at = self._num_steps + self._scenario.load_steps
        self._under_way += [(done_at, True, digest) for digest in plan.load]
        self._under_way += [(done_at, False, digest) for digest in plan.fetch]


def run(json_path: Path | None, num_steps: int = NUM_STEPS) -> int:
    """Measure, print a table, write ``json_path`` when given; the exit status.

    The JSON holds microseconds: ``scheduler_step_us_*`` and ``cache_plan_us_*`` are of the worst of ``SCENARIOS``,
    which are listed under ``scenarios``. Steps that refresh (one in 300 s, but for the first minutes) are not among
    them: ``scheduler_refresh_us_*``.
    """
    scenarios: dict[str, dict[str, float]] = {}
    refreshes_ns: list[int] = []
    for scenario in SCENARIOS:
        _progress(scenario.name)
        runs = []
        for _ in range(REPEATS):
            replica = _Replica(scenario, random.Random(0))
            runs.append(_measure_steps(replica, num_steps))
        steps_ns, plans_ns = (_least(times_ns) for times_ns in zip(*runs, strict=True))
        state = replica.policy.queues.state()
        replica.policy.check()
        scenarios[scenario.name] = {
            **_summary("scheduler_step_us", steps_ns),
            **_summary("cache_plan_us", plans_ns),
            "num_queues": len(state.queues),
            "admissions": state.num_admissions,
            "bypasses": state.num_bypasses,
            "squashes": state.num_squashes,
            "holds": state.num_holds,
        }
        for _ in range(50):
            start_ns = thread_time_ns()
            replica.policy.queues.refresh(num_steps * STEP_S)
            refreshes_ns.append(thread_time_ns() - start_ns)
    _progress("routing")
    results: dict[str, object] = {
        key: max(figures[key] for figures in scenarios.values())
        for key in next(iter(scenarios.values()))
        if key.startswith(("scheduler_step_us", "cache_plan_us"))
    }
    results |= _summary("scheduler_refresh_us", refreshes_ns)
    for name, count in (("router_rank_us", NUM_REPLICAS), ("router_rank_many_us", MANY_REPLICAS)):
        results |= _summary(name, _least([_measure_routing(num_steps, count) for _ in range(REPEATS)]))
    results |= {"num_queued": NUM_QUEUED, "num_adapters": NUM_ADAPTERS}
    results |= {"num_replicas": NUM_REPLICAS, "many_replicas": MANY_REPLICAS}
    results["scenarios"] = scenarios
    _progress("")
    _print_table(results, scenarios)
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=2) + "\n")
    return 0


def _measure_steps(replica: _Replica, num_steps: int) -> tuple[list[int], list[int]]:
    """Nanoseconds of each step and of its plan; without the first tenth, in which batch and cache fill."""
    steps_ns, plans_ns = [], []
    for number in range(num_steps):
        refreshes = replica.policy.queues.state().num_refreshes
        step_ns, plan_ns = replica.step(number * STEP_S)
        if number >= num_steps // 10 and replica.policy.queues.state().num_refreshes == refreshes:
            steps_ns.append(step_ns)
            plans_ns.append(plan_ns)
    return steps_ns, plans_ns


def _least(runs_ns: Sequence[Sequence[int]]) -> list[int]:
    """The least time of each step over runs of the same steps."""
    return [min(times_ns) for times_ns in zip(*runs_ns, strict=True)]


def _measure_routing(num_steps: int, num_replicas: int) -> list[int]:
    """Nanoseconds of each decision: one replica has reported since the last one, each adapter has up to two holders."""
    rng = random.Random(0)
    costs = LoadCosts(10e9, 1e9, 0.2e9, 0.005, 0.2)
    adapters = make_adapters(AdapterMix(count=NUM_ADAPTERS, ranks=[16]), RANK_BYTES)
    names = [f"replica-{i}" for i in range(num_replicas)]
    holders = {
        adapter.digest: {rng.choice(names): rng.choice((Tier.HOST, Tier.GPU)) for _ in range(rng.randrange(3))}
        for adapter in adapters
    }

    def view(name: str) -> ReplicaView:
        load = ReplicaLoad(rng.randrange(64), 5, 64, 2.0, 0.1, kv_used_share=rng.random())
        return ReplicaView(name, Tier.DISK, rng.randrange(30), load)

    table = ReplicaTable()
    for name in names:
        table.put(view(name))
    spent_ns = []
    for _ in range(num_steps):
        reported, adapter = view(rng.choice(names)), rng.choice(adapters)
        start_ns = thread_time_ns()
        table.put(reported)
        rank_replicas(adapter, table, holders[adapter.digest], costs)
        spent_ns.append(thread_time_ns() - start_ns)
    return spent_ns


def _summary(name: str, spent_ns: Sequence[int]) -> dict[str, float]:
    ordered = sorted(spent_ns)
    ranks = (len(ordered) // 2, len(ordered) * 99 // 100, len(ordered) - 1)
    return {f"{name}_{label}": round(ordered[rank] / 1000, 1) for label, rank in zip(LABELS, ranks, strict=True)}


def _progress(what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{'measuring: ' + what if what else ''}", end="", file=sys.stderr, flush=True)


def _print_table(results: dict[str, object], scenarios: dict[str, dict[str, float]]) -> None:
    rows: list[tuple[str, list[object]]] = [("policy time in microseconds of CPU", ["p50", "p99", "max"])]
    for name, figures in scenarios.items():
        for what, key in (("policy step", "scheduler_step_us"), ("plan for adapters", "cache_plan_us")):
            rows.append((f"{what}, {name}", [figures[f"{key}_{label}"] for label in LABELS]))
    for what, key in (
        ("queue refresh", "scheduler_refresh_us"),
        (f"routing decision, {NUM_REPLICAS} replicas", "router_rank_us"),
        (f"routing decision, {MANY_REPLICAS} replicas", "router_rank_many_us"),
    ):
        rows.append((what, [results[f"{key}_{label}"] for label in LABELS]))
    print(f"{NUM_QUEUED} queued requests, {NUM_ADAPTERS} adapters")
    for label, values in rows:
        print(f"{label:36}" + "".join(f"{value!s:>10}" for value in values))
