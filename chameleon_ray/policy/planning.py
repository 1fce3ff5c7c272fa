"""How a plan of the adapter cache is drafted. Nothing here changes anything; ``AdapterCache`` is the way in.

Rules, in the order in which they are applied:

1. Adapters that are retired (or, under ``discard``, merely unused) and that no request wants leave at once.
2. Needed adapters are served in the order given. One that lies in host memory is loaded if idle adapters can make
   room: exactly as many leave as it takes, lowest score first, those of queued requests after all others, and needed
   ones only for a more urgent needed one. Where not even that is enough, nothing leaves for it, and nothing behind it
   is loaded: room that appears is the first one's. Needed adapters that are still being fetched do not hold up others.
3. Afterwards queued requests' adapters are loaded ahead of time, oldest request first, into blocks that are free
   anyhow. No adapter is evicted for one loaded ahead.
4. Adapters without a host copy are fetched in the same order. Host copies leave by the same score; those that queued
   requests are waiting for leave for needed adapters only.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain

from chameleon_ray.policy.cache_types import CacheConfig, Eviction, EvictReason, Plan
from chameleon_ray.policy.eviction import POLICIES, UseHistory
from chameleon_ray.policy.records import CacheEntry, State
from chameleon_ray.policy.residency import Residency, num_blocks, size_bytes


class _Room:
    """One tier's space while a plan is drafted: what is free, and who leaves to make more of it."""

    def __init__(self, free: int, order: Callable[[], list[CacheEntry]], size_of: Callable[[CacheEntry], int]) -> None:
        self.free = free
        self.leaving: dict[str, CacheEntry] = {}
        self._order = order
        self._size_of = size_of
        self._candidates: Iterator[CacheEntry] | None = None

    def take(self, size: int, last_resort: Callable[[], Iterable[CacheEntry]] = tuple) -> bool:
        """Use up ``size``, making room first; False, with nobody leaving for it, where that is not possible."""
        before = self.leaving.copy() if self.free < size else None
        if not self.make(size, last_resort):
            assert before is not None
            for digest in self.leaving.keys() - before.keys():
                self.free -= self._size_of(self.leaving[digest])
            self.leaving, self._candidates = before, None
            return False
        self.free -= size
        return True

    def make(self, size: int, last_resort: Callable[[], Iterable[CacheEntry]] = tuple) -> bool:
        """Let candidates leave until ``size`` is free. False, with all of them leaving, where it never is."""
        if self.free >= size:
            return True
        if self._candidates is None:
            self._candidates = iter(self._order())
        for entry in chain(self._candidates, last_resort()):
            if entry.digest not in self.leaving:
                self.leaving[entry.digest] = entry
                self.free += self._size_of(entry)
            if self.free >= size:
                return True
        return False

    def trim(self) -> None:
        """Let stay whoever need not leave, the most valuable first, so that no more leave than it takes."""
        for entry in reversed(list(self.leaving.values())):
            if (size := self._size_of(entry)) <= self.free:
                del self.leaving[entry.digest]
                self.free -= size
                self._candidates = None


class Planner:
    """Drafts plans from the cache's facts, which it only reads."""

    def __init__(self, config: CacheConfig, facts: Residency, history: UseHistory) -> None:
        self._config = config
        self._facts = facts
        self._history = history
        self._scorer = POLICIES[config.adapter_policy].scorer(config.weights)

    def draft(self, needed: Sequence[CacheEntry], free_blocks: int, now_s: float, may_prefetch: bool) -> Plan:
        """The plan by the rules above; ``free_blocks`` may be negative: so many are to be given back as well."""
        needed_digests = {entry.digest for entry in needed}
        forced, dropped = self._leavers(needed_digests)
        forced_blocks = sum(e.num_blocks for e in forced)
        pool = free_blocks + forced_blocks
        share = self._config.max_blocks - self._facts.blocks_held + forced_blocks
        protected = needed_digests.union(e.digest for e in forced)
        room = _Room(min(pool, share), lambda: self.idle_order(protected, now_s), num_blocks)

        enough_kv = room.make(0, partial(self._idle_of, needed[::-1]))
        room.trim()
        for_kv = set(room.leaving)
        loads: list[CacheEntry] = []
        blocked = self._load_needed(needed, room, loads) if enough_kv else _first_short(needed, room.leaving)
        room.trim()
        num_needed = len(loads)
        if may_prefetch and enough_kv and blocked is None:
            self._load_ahead(room, loads)
        evicted = forced + [
            Eviction(e.digest, e.num_blocks, _reason(e.digest in for_kv, share < pool)) for e in room.leaving.values()
        ]
        more_dropped, fetches = self._fetch(needed, loads, {e.digest for e in evicted}, dropped, now_s)
        return Plan(
            version=self._facts.version,
            evict=tuple(evicted),
            drop=(*dropped, *more_dropped),
            load=tuple(entry.digest for entry in loads),
            num_prefetch=len(loads) - num_needed,
            fetch=tuple(fetches),
            blocked=blocked,
        )

    def reclaim(self, blocks: int, keep: Collection[str], now_s: float) -> Plan:
        """Evictions that give ``blocks`` back to the KV cache, or as many as idle adapters hold."""
        room = _Room(-blocks, lambda: self.idle_order(keep, now_s), num_blocks)
        room.make(0)
        room.trim()
        evict = (Eviction(e.digest, e.num_blocks, EvictReason.KV_PRESSURE) for e in room.leaving.values())
        return Plan(version=self._facts.version, evict=tuple(evict))

    def victims(self, blocks: int, free_blocks: int, now_s: float) -> tuple[bool, list[CacheEntry]]:
        """Whether one more adapter of ``blocks`` can be made to fit, and who would leave for it."""
        share = self._config.max_blocks - self._facts.blocks_held
        room = _Room(min(free_blocks, share), lambda: self.idle_order((), now_s), num_blocks)
        fits = room.make(blocks)
        room.free -= blocks
        room.trim()
        return fits, list(room.leaving.values())

    def idle_order(self, protected: Collection[str], now_s: float) -> list[CacheEntry]:
        """Idle adapters but the protected, the one to evict first in front."""
        candidates = [entry for digest, entry in self._facts.idle.items() if digest not in protected]
        ordered = self._history.order(candidates, self._scorer, now_s)
        unwanted = [entry for entry in ordered if not entry.queued]
        return unwanted + [entry for entry in ordered if entry.queued]

    def _idle_of(self, entries: Iterable[CacheEntry]) -> Iterator[CacheEntry]:
        return (entry for entry in entries if entry.digest in self._facts.idle)

    def _leavers(self, needed: Collection[str]) -> tuple[list[Eviction], list[str]]:
        """Rule 1: (evictions, host copies to drop)."""
        evictions, drops = [], []
        for digest, entry in self._facts.leavers.items():
            if digest in needed:
                continue
            if entry.state is State.RESIDENT:
                evictions.append(Eviction(digest, entry.num_blocks, EvictReason.RETIRED))
            if entry.in_host and entry.state is not State.LOADING:
                drops.append(digest)
        if not POLICIES[self._config.adapter_policy].keeps_idle:
            evictions += [
                Eviction(digest, entry.num_blocks, EvictReason.DISCARD)
                for digest, entry in self._facts.idle.items()
                if not (entry.queued or digest in needed or entry.retired)
            ]
        return evictions, drops

    def _load_needed(self, needed: Sequence[CacheEntry], room: _Room, loads: list[CacheEntry]) -> str | None:
        """Rule 2: appends to ``loads``; returns the digest of the first one that does not fit."""
        for position, entry in enumerate(needed):
            if entry.digest in room.leaving:
                return entry.digest
            if entry.state is not State.HOST:
                continue
            if not room.take(entry.num_blocks, partial(self._idle_of, needed[:position:-1])):
                return entry.digest
            loads.append(entry)
        return None

    def _load_ahead(self, room: _Room, loads: list[CacheEntry]) -> None:
        """Rule 3: appends to ``loads``."""
        num_more = self._config.prefetch_loads - len(self._facts.loading) - len(loads)
        if num_more <= 0 or room.free <= 0:
            return
        taken = {entry.digest for entry in loads}
        for _, entry in self._facts.to_load.order:
            if entry.digest in taken:
                continue
            if num_more <= 0 or entry.num_blocks > room.free:
                return
            room.free -= entry.num_blocks
            num_more -= 1
            loads.append(entry)

    def _fetch(
        self, needed: Sequence[CacheEntry], loads: list[CacheEntry], evicted: set[str], dropped: list[str], now_s: float
    ) -> tuple[list[str], list[str]]:
        """Rule 4: (host copies to drop for it, adapters to fetch)."""
        facts = self._facts
        urgent = [entry for entry in needed if entry.state is State.ABSENT]
        num_more = self._config.max_fetches - len(facts.fetching)
        kept = {entry.digest for entry in (*needed, *loads) if entry.state is State.HOST}.union(dropped)

        def copies(awaited: bool) -> list[CacheEntry]:
            """Host copies that may leave, first one first: those that queued requests wait for, or all others."""
            candidates = [
                entry
                for digest, entry in facts.hosted.items()
                if entry.state is not State.LOADING
                and digest not in kept
                and awaited == (bool(entry.queued) and (entry.state is State.HOST or digest in evicted))
            ]
            return self._history.order(candidates, self._scorer, now_s)

        def last_resort(entry: CacheEntry) -> Iterator[CacheEntry]:
            yield from copies(awaited=True)
            less_urgent = needed[: needed.index(entry) : -1]
            yield from (other for other in less_urgent if other.state is State.HOST and other not in loads)

        free_bytes = self._config.adapter_host_bytes - facts.host_bytes_held
        free_bytes += sum(size_bytes(facts.entries[digest]) for digest in dropped)
        host = _Room(free_bytes, partial(copies, awaited=False), size_bytes)
        fetches: list[str] = []

        def fetch(entry: CacheEntry, *more: Callable[[], Iterable[CacheEntry]]) -> bool:
            if entry.digest not in fetches:
                if len(fetches) >= num_more or not host.take(size_bytes(entry), *more):
                    return False
                fetches.append(entry.digest)
            return True

        waiting = (entry for _, entry in facts.to_fetch.order)
        if all(fetch(entry, partial(last_resort, entry)) for entry in urgent):
            all(map(fetch, waiting))
        host.trim()
        return list(host.leaving), fetches


def _first_short(needed: Sequence[CacheEntry], leaving: Collection[str]) -> str | None:
    return next((e.digest for e in needed if e.state is State.HOST or e.digest in leaving), None)


def _reason(for_kv: bool, share_bound: bool) -> EvictReason:
    if for_kv:
        return EvictReason.KV_PRESSURE
    return EvictReason.SHARE_BOUND if share_bound else EvictReason.LOAD
