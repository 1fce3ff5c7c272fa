"""The adapter cache of one replica: which adapters are resident in idle KV memory (Chameleon, MICRO 2025).

``ReplicaPolicy`` tells it what happens and asks what to do:

- requests: ``count_request`` when one has come, ``use`` when one has begun or ceased to run, ``update`` when one that
  waited has left; base-model requests are none of its business;
- each step: ``plan`` then ``commit``, then carry the plan out; ``reclaim`` then ``commit`` where a KV allocation fails;
- results: ``fetched``, ``loaded``, ``failed``.

Time is the driver's, in seconds on any one clock. Questions change nothing. What is illegal raises a ``CacheError`` and
changes nothing.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from math import ceil, exp

from chameleon_ray.policy.adapter import Adapter
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
from chameleon_ray.policy.records import CacheEntry, State
from chameleon_ray.policy.residency import Residency

_NOT_TO_BE_MOVED = (State.RESIDENT, State.LOADING, State.FETCHING)


class AdapterCache(Residency):
    """Residency and eviction order of one replica's adapters. See the module's head for its use."""

    def __init__(self, config: CacheConfig) -> None:
        super().__init__()
        self.config = config
        self._history = UseHistory(config.frequency_window_s)
        self._planner = Planner(config, self, self._history)
        self._keeps_idle = POLICIES[config.adapter_policy].keeps_idle
        self._prefetch_from_s = float("-inf")
        self._evictions = dict.fromkeys(EvictReason, 0)
        self._hits = self._misses = self._loads = self._prefetches = self._load_failures = 0
        self._fetches = self._fetch_failures = self._host_drops = 0

    def add(self, adapter: Adapter, num_blocks: int, *, on_disk: bool = True) -> None:
        """Make an adapter known, absent; one that is known already only has its retirement revoked.

        num_blocks: blocks of GPU memory that its weights take. on_disk: whether the node's store has its files.
        Raises AdapterTooLarge if it can never be resident, IllegalChange if the digest is known with other sizes.
        """
        entry = self.entries.get(adapter.digest)
        if entry is None:
            self.config.check_size(num_blocks, adapter.size_bytes)
            entry = self.entries[adapter.digest] = CacheEntry(adapter, num_blocks)
        elif (entry.adapter, entry.num_blocks) != (adapter, num_blocks):
            raise IllegalChange(f"adapter {adapter.digest} is known as {entry.adapter} with {entry.num_blocks} blocks")
        entry.retired, entry.on_disk = False, on_disk
        self.update(entry)

    def retire(self, digest: str) -> None:
        """Serve the adapter's requests to their end, then let it leave everywhere and forget it."""
        entry = self.entry(digest)
        entry.retired = True
        self.update(entry)

    def count_request(self, entry: CacheEntry, now_s: float) -> bool:
        """A request for the adapter has come, and waits. Returns whether it hit: the adapter is resident."""
        self._history.used(entry, now_s)
        self.update(entry)
        hit = entry.state is State.RESIDENT
        self._hits += hit
        self._misses += not hit
        return hit

    def use(self, entry: CacheEntry, now_s: float) -> None:
        """A request has begun or ceased to run on the adapter. Raises IllegalChange where it cannot be computed on."""
        if entry.running and entry.state is not State.RESIDENT:
            raise IllegalChange(f"a request runs on adapter {entry.digest}, which is {entry.state}")
        self._history.touched(entry, now_s)
        self.update(entry)

    @property
    def is_busy(self) -> bool:
        """Whether adapters are on their way: fetches and loads, and those that are to leave everywhere."""
        return bool(self.loading or self.fetching or self.leavers)

    @property
    def settled(self) -> bool:
        """Whether plans for needed adapters that are resident or on their way are empty until something changes."""
        unused = self.idle and not self._keeps_idle
        return not (self.to_load.order or self.to_fetch.order or unused or self.leavers)

    def plan(self, needed: Iterable[str], free_blocks: int, now_s: float) -> Plan:
        """What to evict, load and fetch now, by the rules in ``policy/planning.py``.

        needed: digests of the adapters that the next requests to run need, most urgent first.
        free_blocks: what the pool has left once the next batch's KV is set aside; negative: evict for the KV as well.
        """
        entries = [self.entry(digest) for digest in dict.fromkeys(needed)]
        if free_blocks >= 0 and self.settled and all(entry.state in _NOT_TO_BE_MOVED for entry in entries):
            return Plan(version=self.version)
        may_prefetch = self.config.prefetch and now_s >= self._prefetch_from_s
        return self._planner.draft(entries, free_blocks, now_s, may_prefetch)

    def reclaim(self, num_blocks: int, now_s: float, keep: Collection[str] = ()) -> Plan:
        """The evictions that give ``num_blocks`` to a KV allocation that would fail, or all there are.

        The plan's ``freed_blocks`` says how many it frees; where too few, not to commit it leaves no trace.
        keep: digests that must stay, such as the adapter of the request that the allocation is for.
        """
        return self._planner.reclaim(num_blocks, keep, now_s)

    def commit(self, plan: Plan, now_s: float) -> None:
        """Take the plan as done: evicted and dropped, loads and fetches under way. Raises StalePlan."""
        if plan.version != self.version:
            raise StalePlan(f"plan of version {plan.version} for a cache at version {self.version}: plan again")
        for eviction in plan.evict:
            entry = self.entry(eviction.digest)
            self.evict(entry)
            self._history.evicted(entry)
            self._evictions[eviction.reason] += 1
            if eviction.reason is EvictReason.KV_PRESSURE:
                self._prefetch_from_s = now_s + self.config.prefetch_pause_s
        for digest in plan.drop:
            self.drop_host(self.entry(digest))
        for digest in plan.load:
            entry = self.entry(digest)
            self.move(entry, (State.HOST,), State.LOADING)
            self._history.loaded(entry, now_s)
        for digest in plan.fetch:
            entry = self.entry(digest)
            self.move(entry, (State.ABSENT,), State.FETCHING)
            self._history.touched(entry, now_s)
        self._loads += len(plan.load)
        self._prefetches += plan.num_prefetch
        self._fetches += len(plan.fetch)
        self._host_drops += len(plan.drop)

    def fetched(self, digest: str) -> None:
        """The host copy is complete, and the files are on disk."""
        entry = self.entry(digest)
        self.move(entry, (State.FETCHING,), State.HOST)
        entry.on_disk = True

    def loaded(self, digest: str) -> None:
        """The adapter's weights can be computed on: it is resident."""
        self.move(self.entry(digest), (State.LOADING,), State.RESIDENT)

    def failed(self, digest: str) -> None:
        """The fetch or load under way has failed: host copy and blocks are given back."""
        entry = self.entry(digest)
        was_loading = entry.state is State.LOADING
        self.move(entry, (State.FETCHING, State.LOADING), State.ABSENT)
        self._load_failures += was_loading
        self._fetch_failures += not was_loading

    def eviction_cost_s(self, free_blocks: int, now_s: float, load_s: Callable[[int], float]) -> float:
        """Seconds that later requests are expected to lose if one more adapter of mean size is loaded.

        load_s: seconds that a load of so many bytes takes. Each victim costs its load time, times the chance that
        somebody asks for it again: 1 where a request is queued, else by its uses lately,
        ``1 - exp(-uses in the window)``. Where not even that makes room, one mean load is added for the wait.
        """
        entries = self.entries.values()
        if not entries:
            return 0.0
        mean_blocks = ceil(sum(entry.num_blocks for entry in entries) / len(entries))
        fits, victims = self._planner.victims(mean_blocks, free_blocks, now_s)
        cost_s = 0.0
        for entry, uses in zip(victims, self._history.frequencies(victims, now_s), strict=True):
            chance = 1.0 if entry.queued else 1.0 - exp(-uses)
            cost_s += load_s(entry.adapter.size_bytes) * chance
        if not fits:
            cost_s += load_s(sum(entry.adapter.size_bytes for entry in entries) // len(entries))
        return cost_s

    def stats(self) -> CacheStats:
        """Counters and gauges for the metrics."""
        entries = self.entries.values()
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
            blocks_held=self.blocks_held,
            host_bytes_held=self.host_bytes_held,
            adapters_known=len(entries),
            adapters_resident=len(self.held) - len(self.loading),
            adapters_in_host=len(self.hosted),
            loads_in_flight=len(self.loading),
            fetches_in_flight=len(self.fetching),
            requests_running=sum(len(entry.running) for entry in entries),
            requests_queued=sum(len(entry.queued) for entry in entries),
            requests_waiting=sum(len(entry.queued) for entry in entries if entry.state is not State.RESIDENT),
        )

    def check(self, owned_blocks: Mapping[str, int] | None = None) -> None:
        """See ``Residency.check``; the bounds hold as well."""
        super().check(owned_blocks)
        if self.blocks_held > self.config.max_blocks or self.host_bytes_held > self.config.adapter_host_bytes:
            raise CacheCorrupt(f"{self.blocks_held} blocks and {self.host_bytes_held} host bytes held: over the bounds")
