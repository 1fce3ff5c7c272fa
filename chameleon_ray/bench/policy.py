"""What policy decisions cost: one scheduler step with 1,000 queued requests, one cache plan, one routing decision.

Measured in the thread's CPU time: what other processes take from a busy machine is not the policy's. They also slow it
down, through shared caches, so that everything is done several times and the least time of each step counts: the steps
are the same every time.
"""

import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import thread_time_ns

from chameleon_ray.policy.adapter import Adapter, Tier
from chameleon_ray.policy.admission import Admission
from chameleon_ray.policy.cache import AdapterCache, CacheConfig, Plan, State
from chameleon_ray.policy.disciplines import QueueOptions
from chameleon_ray.policy.queues import RequestQueues
from chameleon_ray.policy.routing import LoadCosts, ReplicaLoad, ReplicaView, rank_replicas
from chameleon_ray.policy.shortlist import ReplicaTable
from chameleon_ray.policy.sizing import QueuedRequest, SizingOptions

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
    """Queues and cache with a batch that ends by the clock: a driver without an engine."""

    def __init__(self, scenario: Scenario, rng: random.Random) -> None:
        self._scenario = scenario
        self._rng = rng
        ranks = (8, 16, 32, 64, 128)
        self._adapters = [Adapter(f"{i:064x}", ranks[i % 5], ranks[i % 5] * RANK_BYTES) for i in range(NUM_ADAPTERS)]
        self._weights = [1 / (1 + i // 5) for i in range(NUM_ADAPTERS)]
        self._blocks = {a.digest: -(-a.size_bytes // (BLOCK_TOKENS * KV_TOKEN_BYTES)) for a in self._adapters}
        pool = scenario.pool_blocks
        self.cache = AdapterCache(CacheConfig(max_blocks=pool, host_bytes=scenario.host_gib << 30))
        for adapter in self._adapters:
            self.cache.add(adapter, self._blocks[adapter.digest])
        options = QueueOptions(pool * BLOCK_TOKENS, SizingOptions(KV_TOKEN_BYTES), max_running=MAX_RUNNING)
        self.queues = RequestQueues("chameleon", options, self)
        self._running: dict[str, tuple[QueuedRequest, float]] = {}
        self._under_way: list[tuple[int, bool, str]] = []
        self._users: Counter[str] = Counter()
        self._held: dict[str, int] = {}
        self._blocked: str | None = None
        self._kv_blocks = 0
        self._num_requests = 0
        self._num_steps = 0

    def admission(self, request: QueuedRequest) -> Admission:
        """See ``AdapterRoom``."""
        if request.adapter is None or self.cache.state(request.adapter.digest) is State.RESIDENT:
            return Admission.READY
        return Admission.NO_ROOM if request.adapter.digest == self._blocked else Admission.LOADING

    def ends_needed(self, request: QueuedRequest, leaving: Sequence[str]) -> int | None:
        """See ``AdapterRoom``."""
        users: dict[str, int] = {}
        used = self._kv_blocks + sum(self._blocks[digest] for digest in self._users)
        used += sum(self._blocks[digest] for _, is_load, digest in self._under_way if is_load)
        used += self._blocks[request.adapter.digest] if request.adapter else 0
        for count in range(len(leaving) + 1):
            if count:
                ended, _ = self._running[leaving[count - 1]]
                used -= _kv_blocks(ended)
                if ended.adapter:
                    digest = ended.adapter.digest
                    users[digest] = users.get(digest, self._users[digest]) - 1
                    used -= 0 if users[digest] else self._blocks[digest]
            if used <= self._scenario.pool_blocks:
                return count
        return None

    def step(self, now_s: float) -> tuple[int, int]:
        """One step; nanoseconds spent in the queues and in the cache's plan and commit."""
        self._num_steps += 1
        ended = [request_id for request_id, (_, end_s) in self._running.items() if end_s <= now_s]
        arrived = [self._request() for _ in range(NUM_QUEUED - self.queues.num_waiting)]
        self._end(ended, now_s)
        for request in arrived:
            if request.adapter:
                self.cache.enqueue(request.request_id, request.adapter.digest, now_s)
        cache_ns = self._load(now_s)

        start_ns = thread_time_ns()
        for request_id in ended:
            self.queues.finish(request_id, now_s, 100)
        for request in arrived:
            self.queues.add(request, now_s)
        squashed = self.queues.squashes()
        queues_ns = thread_time_ns() - start_ns
        for request_id in squashed:
            self._stop(request_id, now_s)
        start_ns = thread_time_ns()
        for request_id in squashed:
            self.queues.requeue(request_id, now_s, squashed=True)
        self.queues.begin_step(now_s)
        queues_ns += thread_time_ns() - start_ns
        while len(self._running) < MAX_RUNNING:
            start_ns = thread_time_ns()
            candidate = self.queues.peek()
            queues_ns += thread_time_ns() - start_ns
            if candidate is None or not self._make_room(candidate, now_s):
                break
            start_ns = thread_time_ns()
            self.queues.admit(candidate.request_id)
            queues_ns += thread_time_ns() - start_ns
            self._start(candidate, now_s)
        return queues_ns, cache_ns

    @property
    def _free_blocks(self) -> int:
        return self._scenario.pool_blocks - self._kv_blocks - sum(self._held.values())

    def _request(self) -> QueuedRequest:
        self._num_requests += 1
        prompt, output = (min(4000, int(self._rng.lognormvariate(mu, 1.0))) + 1 for mu in (6.0, 4.5))
        adapter = None if self._rng.random() < 0.05 else self._rng.choices(self._adapters, self._weights)[0]
        return QueuedRequest(f"request-{self._num_requests}", prompt, output, adapter)

    def _make_room(self, request: QueuedRequest, now_s: float) -> bool:
        missing = _kv_blocks(request) - self._free_blocks
        if missing <= 0:
            return True
        plan = self.cache.reclaim(missing, now_s, keep=(request.adapter.digest,) if request.adapter else ())
        if plan.freed_blocks < missing:
            return False
        self.cache.commit(plan, now_s)
        self._carry_out(plan)
        return True

    def _start(self, request: QueuedRequest, now_s: float) -> None:
        self._running[request.request_id] = (request, now_s + request.num_predicted_tokens * STEP_S)
        self._kv_blocks += _kv_blocks(request)
        if request.adapter:
            self._users[request.adapter.digest] += 1
            self.cache.acquire(request.request_id, now_s)

    def _stop(self, request_id: str, now_s: float) -> QueuedRequest:
        request, _ = self._running.pop(request_id)
        self._kv_blocks -= _kv_blocks(request)
        if request.adapter:
            self._users -= Counter((request.adapter.digest,))
            self.cache.requeue(request_id, now_s)
        return request

    def _end(self, ended: Sequence[str], now_s: float) -> None:
        for request_id in ended:
            if self._stop(request_id, now_s).adapter:
                self.cache.release(request_id, now_s)

    def _load(self, now_s: float) -> int:
        """Loads and fetches that are due complete, and a new plan starts; nanoseconds spent planning."""
        due = [item for item in self._under_way if item[0] <= self._num_steps]
        self._under_way = [item for item in self._under_way if item[0] > self._num_steps]
        for _, is_load, digest in due:
            (self.cache.loaded if is_load else self.cache.fetched)(digest)
            self.queues.adapter_moved(digest)
        needed = [
            request.adapter.digest
            for queue in range(len(self.queues.state().queues))
            for request in self.queues.waiting(queue)[:8]
            if request.adapter
        ]
        start_ns = thread_time_ns()
        plan = self.cache.plan(needed, self._free_blocks, now_s)
        self.cache.commit(plan, now_s)
        spent_ns = thread_time_ns() - start_ns
        self._blocked = plan.blocked
        self._carry_out(plan)
        return spent_ns

    def _carry_out(self, plan: Plan) -> None:
        for eviction in plan.evict:
            del self._held[eviction.digest]
        for digest in plan.load:
            self._held[digest] = self._blocks[digest]
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
        queues_ns, cache_ns = (_least(times_ns) for times_ns in zip(*runs, strict=True))
        state = replica.queues.state()
        scenarios[scenario.name] = {
            **_summary("scheduler_step_us", queues_ns),
            **_summary("cache_plan_us", cache_ns),
            "num_queues": len(state.queues),
            "admissions": state.num_admissions,
            "bypasses": state.num_bypasses,
            "squashes": state.num_squashes,
            "holds": state.num_holds,
        }
        for _ in range(50):
            start_ns = thread_time_ns()
            replica.queues.refresh(num_steps * STEP_S)
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
    """Nanoseconds of each step in queues and cache; without the first tenth, in which batch and cache fill."""
    queues_ns, cache_ns = [], []
    for number in range(num_steps):
        refreshes = replica.queues.state().num_refreshes
        in_queues_ns, in_cache_ns = replica.step(number * STEP_S)
        if number >= num_steps // 10 and replica.queues.state().num_refreshes == refreshes:
            queues_ns.append(in_queues_ns)
            cache_ns.append(in_cache_ns)
    return queues_ns, cache_ns


def _least(runs_ns: Sequence[Sequence[int]]) -> list[int]:
    """The least time of each step over runs of the same steps."""
    return [min(times_ns) for times_ns in zip(*runs_ns, strict=True)]


def _measure_routing(num_steps: int, num_replicas: int) -> list[int]:
    """Nanoseconds of each decision: one replica has reported since the last one, each adapter has up to two holders."""
    rng = random.Random(0)
    costs = LoadCosts(10e9, 1e9, 0.2e9, 0.005, 0.2)
    adapters = [Adapter(f"{i:064x}", 16, 16 * RANK_BYTES) for i in range(NUM_ADAPTERS)]
    names = [f"replica-{i}" for i in range(num_replicas)]
    holders = {
        adapter.digest: {rng.choice(names): rng.choice((Tier.HOST, Tier.GPU)) for _ in range(rng.randrange(3))}
        for adapter in adapters
    }

    def view(name: str) -> ReplicaView:
        load = ReplicaLoad(rng.randrange(64), 5, 64, 2.0, 0.1)
        return ReplicaView(name, Tier.DISK, rng.randrange(30), load)

    table = ReplicaTable()
    for name in names:
        table.put(view(name))
    for adapter in adapters:
        table.candidates(adapter, {})  # the first decision of each adapter ranks its homes
    spent_ns = []
    for _ in range(num_steps):
        reported, adapter = view(rng.choice(names)), rng.choice(adapters)
        start_ns = thread_time_ns()
        table.put(reported)
        rank_replicas(adapter, table.candidates(adapter, holders[adapter.digest]), costs)
        spent_ns.append(thread_time_ns() - start_ns)
    return spent_ns


def _kv_blocks(request: QueuedRequest) -> int:
    return -(-(request.num_prompt_tokens + request.num_predicted_tokens) // BLOCK_TOKENS)


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
        for what, key in (("scheduler step", "scheduler_step_us"), ("cache plan", "cache_plan_us")):
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
