"""The adapter cache of one replica: which adapters are resident in idle KV memory (Chameleon, MICRO 2025).

A driver (vLLM's scheduler, the simulator) tells it what happens and asks what to do:

- requests: ``enqueue`` when one arrives, ``acquire`` when it starts to run, ``requeue`` when it is preempted,
  ``release`` when it ends in any way; base-model requests are none of its business;
- each step: ``plan`` then ``commit``, then carry the plan out; ``reclaim`` then ``commit`` where a KV allocation fails;
- results: ``fetched``, ``fetch_failed``, ``loaded``, ``load_failed``.

Time is the driver's, in seconds on any one clock. Questions change nothing. What is illegal raises a ``CacheError`` and
changes nothing.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from math import ceil, exp

import numpy as np

from chameleon_ray.policy.adapter import Adapter, Tier
from chameleon_ray.policy.cache_types import (
    CacheConfig,
    CacheCorrupt,
    CacheStats,
    EvictReason,
    IllegalChange,
    Plan,
    StalePlan,
)
from chameleon_ray.policy.eviction import POLICIES, UseHistory
from chameleon_ray.policy.planning import Planner
from chameleon_ray.policy.residency import Entry, Failure, Residency, State

_NOT_TO_BE_MOVED = (State.RESIDENT, State.LOADING, State.FETCHING)


class AdapterCache:
    """Residency, reference counts and eviction order of one replica's adapters. See the module's head for its use."""

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self._residency = Residency()
        self._history = UseHistory(config.frequency_window_s)
        scorer = POLICIES[config.adapter_policy].scorer(config.weights)
        self._keeps_idle = POLICIES[config.adapter_policy].keeps_idle
        self._planner = Planner(config, scorer, self._residency, self._history)
        self._version = 0
        self._prefetch_from_s = float("-inf")
        self._evictions = dict.fromkeys(EvictReason, 0)
        self._hits = self._misses = self._loads = self._prefetches = self._load_failures = 0
        self._fetches = self._fetch_failures = self._host_drops = 0

    def add(self, adapter: Adapter, num_blocks: int, *, on_disk: bool = True) -> None:
        """Make an adapter known, absent; one that is known already only has its retirement revoked.

        num_blocks: KV-pool blocks that its weights take. on_disk: whether the node's store has its files.
        Raises AdapterTooLarge if it can never be resident, IllegalChange if the digest is known with other sizes.
        """
        known = self._residency.entries.get(adapter.digest)
        if known is not None:
            if (known.adapter, known.num_blocks) != (adapter, num_blocks):
                raise IllegalChange(
                    f"adapter {adapter.digest} is known as {known.adapter} with {known.num_blocks} blocks"
                )
            self._residency.set_retired(known, False)
            self.set_on_disk(adapter.digest, on_disk)
            return
        self.config.check_size(num_blocks, adapter.size_bytes)
        row = self._history.add(adapter.digest, adapter.size_bytes, num_blocks)
        entry = Entry(adapter, num_blocks, row, on_disk)
        self._residency.add(entry)
        self._version += 1

    def retire(self, digest: str) -> None:
        """Serve the adapter's requests to their end, then let it leave everywhere and forget it."""
        entry = self._residency.entry(digest)
        self._residency.set_retired(entry, True)
        self._settle(entry)

    def set_on_disk(self, digest: str, on_disk: bool) -> None:
        """The node's store gained or lost the adapter's files."""
        self._residency.entry(digest).on_disk = on_disk
        self._version += 1

    def enqueue(self, request_id: str, digest: str, now_s: float) -> bool:
        """A request for the adapter arrived and waits. Returns whether it hit: the adapter is resident."""
        entry = self._residency.entry(digest)
        self._residency.enqueue(entry, request_id)
        self._history.used(entry.row, now_s)
        hit = entry.state is State.RESIDENT
        self._hits += hit
        self._misses += not hit
        self._version += 1
        return hit

    def acquire(self, request_id: str, now_s: float) -> None:
        """A queued request starts to run: its adapter cannot leave until it is released. Raises unless resident."""
        self._touch(self._residency.acquire(request_id), now_s)

    def requeue(self, request_id: str, now_s: float) -> None:
        """A running request was preempted and waits again, as old as it is."""
        self._touch(self._residency.requeue(request_id), now_s)

    def release(self, request_id: str, now_s: float) -> None:
        """A request ended, queued or running, for whatever reason. Raises UnknownRequest the second time."""
        was_running = request_id in self._residency.entry_of(request_id).running
        entry = self._residency.release(request_id)
        if was_running:
            self._touch(entry, now_s)
        self._settle(entry)

    @property
    def has_leavers(self) -> bool:
        """Whether retired adapters that no request wants are still somewhere."""
        return any(not entry.wanted for entry in self._residency.retired.values())

    @property
    def settled(self) -> bool:
        """Whether plans for needed adapters that are resident or on their way are empty until something changes."""
        residency = self._residency
        waiting = residency.to_load.order or residency.to_fetch.order
        unused = residency.idle and not self._keeps_idle
        return not (waiting or unused or residency.retired)

    def plan(self, needed: Iterable[str], free_blocks: int, now_s: float) -> Plan:
        """What to evict, load and fetch now, by the rules in ``policy/planning.py``.

        needed: digests of the adapters that the next requests to run need, most urgent first.
        free_blocks: what the pool has left once the next batch's KV is set aside; negative: evict for the KV as well.
        """
        entries = [self._residency.entry(digest) for digest in dict.fromkeys(needed)]
        if free_blocks >= 0 and self.settled and all(entry.state in _NOT_TO_BE_MOVED for entry in entries):
            return Plan(version=self._version)
        may_prefetch = self.config.prefetch and now_s >= self._prefetch_from_s
        return self._planner.draft(self._version, entries, free_blocks, now_s, may_prefetch)

    def reclaim(self, num_blocks: int, now_s: float, keep: Collection[str] = ()) -> Plan:
        """The evictions that give ``num_blocks`` to a KV allocation that would fail, or all there are.

        The plan's ``freed_blocks`` says how many it frees; where too few, not to commit it leaves no trace.
        keep: digests that must stay, such as the adapter of the request that the allocation is for.
        """
        return self._planner.reclaim(self._version, num_blocks, keep, now_s)

    def commit(self, plan: Plan, now_s: float) -> None:
        """Take the plan as done: evicted and dropped, loads and fetches under way. Raises StalePlan."""
        if plan.version != self._version:
            raise StalePlan(f"plan of version {plan.version} for a cache at version {self._version}: plan again")
        if not plan:
            return
        residency = self._residency
        left = [residency.entry(digest) for digest in (*(e.digest for e in plan.evict), *plan.drop)]
        for eviction in plan.evict:
            entry = residency.entry(eviction.digest)
            residency.evict(entry)
            self._history.evicted(entry.row)
            self._evictions[eviction.reason] += 1
            if eviction.reason is EvictReason.KV_PRESSURE:
                self._prefetch_from_s = now_s + self.config.prefetch_pause_s
        for digest in plan.drop:
            residency.drop_host(residency.entry(digest))
        for digest in plan.load:
            entry = residency.entry(digest)
            residency.start_load(entry)
            self._history.loaded(entry.row, now_s)
        for digest in plan.fetch:
            entry = residency.entry(digest)
            residency.start_fetch(entry)
            self._history.touched(entry.row, now_s)
        self._loads += len(plan.load)
        self._prefetches += plan.num_prefetch
        self._fetches += len(plan.fetch)
        self._host_drops += len(plan.drop)
        for entry in left:
            self._settle(entry)
        self._version += 1

    def fetched(self, digest: str) -> None:
        """The host copy is complete (and the files are on disk)."""
        self._residency.finish_fetch(self._residency.entry(digest))
        self._version += 1

    def fetch_failed(self, digest: str, reason: str, now_s: float, *, is_permanent: bool = False) -> None:
        """The adapter could not be read; it may be tried again after ``retry_after_s``, unless ``is_permanent``."""
        entry = self._residency.entry(digest)
        self._residency.fail_fetch(entry, self._failure(reason, now_s, is_permanent))
        self._fetch_failures += 1
        self._settle(entry)

    def loaded(self, digest: str) -> None:
        """The adapter's weights can be computed on: it is resident."""
        self._residency.finish_load(self._residency.entry(digest))
        self._version += 1

    def load_failed(self, digest: str, reason: str, now_s: float, *, is_permanent: bool = False) -> None:
        """The adapter could not be loaded: the driver gives back its blocks and its host copy."""
        entry = self._residency.entry(digest)
        self._residency.fail_load(entry, self._failure(reason, now_s, is_permanent))
        self._load_failures += 1
        self._settle(entry)

    def knows(self, digest: str) -> bool:
        """Whether the adapter was added and not forgotten since."""
        return digest in self._residency.entries

    def entry(self, digest: str) -> Entry:
        """The one record of the adapter, to be read only. Raises UnknownAdapter."""
        return self._residency.entry(digest)

    def state(self, digest: str) -> State:
        """The adapter's state. Raises UnknownAdapter."""
        return self._residency.entry(digest).state

    @property
    def blocks_held(self) -> int:
        """Blocks of adapters that are loading or resident."""
        return self._residency.blocks_held

    @property
    def idle_blocks(self) -> int:
        """Blocks of resident adapters that no running request uses."""
        return self._residency.idle_blocks

    def failure(self, digest: str, now_s: float) -> Failure | None:
        """Why requests for the adapter are to be refused now; None when they are not."""
        failure = self._residency.entry(digest).failure
        return failure if failure is not None and not failure.is_over(now_s) else None

    def tier(self, digest: str) -> Tier:
        """The adapter's tier, for placement. Raises UnknownAdapter."""
        return self._residency.entry(digest).tier

    def tiers(self) -> dict[str, Tier]:
        """Digest -> tier of every known adapter, for placement."""
        return {digest: entry.tier for digest, entry in self._residency.entries.items()}

    def eviction_cost_s(self, free_blocks: int, now_s: float, load_s: Callable[[int], float]) -> float:
        """Seconds that later requests are expected to lose if one more adapter of mean size is loaded.

        load_s: seconds that a load of so many bytes takes. Each victim costs its load time, times the chance that
        somebody asks for it within the window that follows: 1 if a request is queued for it, else
        ``1 - exp(-uses in the window)``. Where not even that makes room, one mean load is added for the wait.
        """
        entries = self._residency.entries.values()
        if not entries:
            return 0.0
        mean_blocks = ceil(sum(entry.num_blocks for entry in entries) / len(entries))
        fits, victims = self._planner.victims(mean_blocks, free_blocks, now_s)
        uses = self._history.frequency(np.array([entry.row for entry in victims], np.int64), now_s)
        cost_s = 0.0
        for entry, count in zip(victims, uses.tolist(), strict=True):
            cost_s += load_s(entry.adapter.size_bytes) * (1.0 if entry.queued else 1.0 - exp(-count))
        if not fits:
            cost_s += load_s(sum(entry.adapter.size_bytes for entry in entries) // len(entries))
        return cost_s

    def stats(self) -> CacheStats:
        """Counters and gauges for the metrics."""
        residency = self._residency
        entries = residency.entries.values()
        return CacheStats(
            hits=self._hits,
            misses=self._misses,
            evictions=dict(self._evictions),
            loads=self._loads,
            prefetches=self._prefetches,
            load_failures=self._load_failures,
            fetches=self._fetches,
            fetch_failures=self._fetch_failures,
            host_drops=self._host_drops,
            blocks_held=residency.blocks_held,
            host_bytes_held=residency.host_bytes_held,
            adapters_known=len(entries),
            adapters_resident=sum(entry.state is State.RESIDENT for entry in entries),
            adapters_in_host=len(residency.hosted),
            loads_in_flight=len(residency.loading),
            fetches_in_flight=len(residency.fetching),
            requests_running=sum(len(entry.running) for entry in entries),
            requests_queued=sum(len(entry.queued) for entry in entries),
            requests_waiting=sum(len(entry.queued) for entry in entries if entry.state is not State.RESIDENT),
        )

    def check(
        self, owned_blocks: Mapping[str, int] | None = None, live_requests: Collection[str] | None = None
    ) -> None:
        """Raise CacheCorrupt, with the numbers, unless everything adds up.

        owned_blocks: what the driver's pool says each adapter holds.
        live_requests: ids of the driver's requests for adapters.
        """
        self._residency.check(owned_blocks, live_requests)
        bounds = self.config.max_blocks, self.config.adapter_host_bytes
        held = self._residency.blocks_held, self._residency.host_bytes_held
        if held[0] > bounds[0] or held[1] > bounds[1]:
            raise CacheCorrupt(f"(blocks, host bytes) {held} held, over the bounds {bounds}")

    def _failure(self, reason: str, now_s: float, is_permanent: bool) -> Failure:
        return Failure(reason, None if is_permanent else now_s + self.config.retry_after_s)

    def _touch(self, entry: Entry, now_s: float) -> None:
        self._history.touched(entry.row, now_s)
        self._version += 1

    def _settle(self, entry: Entry) -> None:
        """After something was let go: forget a retired adapter of which nothing is left."""
        self._version += 1
        if self._residency.can_forget(entry):
            self._residency.forget(entry)
            self._history.remove(entry.row)
