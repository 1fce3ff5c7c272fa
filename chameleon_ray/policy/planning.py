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
from dataclasses import dataclass
from functools import partial
from itertools import chain

from chameleon_ray.policy.cache_types import CacheConfig, Eviction, EvictReason, Plan
from chameleon_ray.policy.eviction import POLICIES, Scorer, UseHistory
from chameleon_ray.policy.residency import Entry, Residency, State, WaitingLine


class _Room:
    """One tier's space while a plan is drafted: what is free, and who leaves to make more of it."""

    def __init__(self, free: int, order: Callable[[], list[Entry]], size_of: Callable[[Entry], int]) -> None:
        self.free = free
        self.leaving: dict[str, Entry] = {}
        self._order = order
        self._size_of = size_of
        self._candidates: Iterator[Entry] | None = None

    def take(self, size: int, last_resort: Callable[[], Iterable[Entry]] = tuple) -> bool:
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

    def make(self, size: int, last_resort: Callable[[], Iterable[Entry]] = tuple) -> bool:
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


@dataclass(frozen=True, slots=True)
class Planner:
    """Drafts plans from the cache's facts, which it only reads."""

    config: CacheConfig
    scorer: Scorer
    residency: Residency
    history: UseHistory

    def draft(self, version: int, needed: Sequence[Entry], free_blocks: int, now_s: float, may_prefetch: bool) -> Plan:
        """The plan by the rules above; ``free_blocks`` may be negative: so many are to be given back as well."""
        needed_digests = {entry.digest for entry in needed}
        forced, dropped = self._leavers(needed_digests)
        forced_blocks = sum(eviction.num_blocks for eviction in forced)
        pool = free_blocks + forced_blocks
        share = self.config.max_blocks - self.residency.blocks_held + forced_blocks
        protected = needed_digests.union(eviction.digest for eviction in forced)
        room = _Room(min(pool, share), lambda: self.idle_order(protected, now_s), _num_blocks)

        enough_kv = room.make(0, partial(self._idle_of, needed[::-1]))
        room.trim()
        for_kv = set(room.leaving)
        loads: list[Entry] = []
        blocked = self._load_needed(needed, room, loads) if enough_kv else _first_short(needed, room.leaving)
        room.trim()
        num_needed = len(loads)
        if may_prefetch and enough_kv and blocked is None:
            self._load_ahead(room, loads)
        evicted = forced + [
            Eviction(e.digest, e.num_blocks, _reason(e.digest in for_kv, share < pool)) for e in room.leaving.values()
        ]
        host, fetches = self._fetch(needed, loads, {eviction.digest for eviction in evicted}, dropped, now_s)
        return Plan(
            version=version,
            evict=tuple(evicted),
            drop=(*dropped, *host.leaving),
            load=tuple(entry.digest for entry in loads),
            num_prefetch=len(loads) - num_needed,
            fetch=tuple(entry.digest for entry in fetches),
            blocked=blocked,
        )

    def reclaim(self, version: int, num_blocks: int, keep: Collection[str], now_s: float) -> Plan:
        """Evictions that give ``num_blocks`` back to the KV cache, or as many as idle adapters hold."""
        room = _Room(-num_blocks, lambda: self.idle_order(keep, now_s), _num_blocks)
        room.make(0)
        room.trim()
        evict = (Eviction(e.digest, e.num_blocks, EvictReason.KV_PRESSURE) for e in room.leaving.values())
        return Plan(version=version, evict=tuple(evict))

    def victims(self, num_blocks: int, free_blocks: int, now_s: float) -> tuple[bool, list[Entry]]:
        """Whether one more adapter of ``num_blocks`` can be made to fit, and who would leave for it."""
        share = self.config.max_blocks - self.residency.blocks_held
        room = _Room(min(free_blocks, share), lambda: self.idle_order((), now_s), _num_blocks)
        fits = room.make(num_blocks)
        room.free -= num_blocks
        room.trim()
        return fits, list(room.leaving.values())

    def idle_order(self, protected: Collection[str], now_s: float) -> list[Entry]:
        """Idle adapters but the protected, the one to evict first in front."""
        candidates = [entry for digest, entry in self.residency.idle.items() if digest not in protected]
        ordered = self._by_score(candidates, now_s)
        unwanted = [entry for entry in ordered if not entry.queued]
        return unwanted + [entry for entry in ordered if entry.queued]

    def _by_score(self, entries: list[Entry], now_s: float) -> list[Entry]:
        order = self.history.order([entry.row for entry in entries], self.scorer, now_s)
        return [entries[position] for position in order]

    def _idle_of(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        return (entry for entry in entries if entry.digest in self.residency.idle)

    def _leavers(self, needed: Collection[str]) -> tuple[list[Eviction], list[str]]:
        """Rule 1: (evictions, host copies to drop)."""
        evictions, drops = [], []
        for digest, entry in self.residency.retired.items():
            if entry.wanted or digest in needed:
                continue
            if entry.state is State.RESIDENT:
                evictions.append(Eviction(digest, entry.num_blocks, EvictReason.RETIRED))
            if entry.in_host and entry.state is not State.LOADING:
                drops.append(digest)
        if not POLICIES[self.config.adapter_policy].keeps_idle:
            evictions += [
                Eviction(digest, entry.num_blocks, EvictReason.DISCARD)
                for digest, entry in self.residency.idle.items()
                if not (entry.queued or digest in needed or entry.retired)
            ]
        return evictions, drops

    def _load_needed(self, needed: Sequence[Entry], room: _Room, loads: list[Entry]) -> str | None:
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

    def _load_ahead(self, room: _Room, loads: list[Entry]) -> None:
        """Rule 3: appends to ``loads``."""
        num_more = self.config.prefetch_loads - len(self.residency.loading) - len(loads)
        if num_more <= 0 or room.free <= 0:
            return
        taken = {entry.digest for entry in loads}
        for entry in self._lined_up(self.residency.to_load):
            if entry.digest in taken:
                continue
            if num_more <= 0 or entry.num_blocks > room.free:
                return
            room.free -= entry.num_blocks
            num_more -= 1
            loads.append(entry)

    def _fetch(
        self, needed: Sequence[Entry], loads: list[Entry], evicted: set[str], dropped: Collection[str], now_s: float
    ) -> tuple[_Room, list[Entry]]:
        """Rule 4: (host room with the copies that leave for it, adapters to fetch)."""
        urgent = [entry for entry in needed if _fetchable(entry, now_s)]
        num_more = self.config.max_fetches - len(self.residency.fetching)
        kept = {entry.digest for entry in (*needed, *loads) if entry.state is State.HOST}.union(dropped)
        host = self._host_room(kept, evicted, dropped, now_s)
        fetches: dict[str, Entry] = {}

        def last_resort(entry: Entry) -> Iterator[Entry]:
            yield from self._host_order(kept, evicted, True, now_s)
            less_urgent = needed[: needed.index(entry) : -1]
            yield from (other for other in less_urgent if other.state is State.HOST and other not in loads)

        def fetch(entry: Entry, *more: Callable[[], Iterable[Entry]]) -> bool:
            if entry.digest in fetches:
                return True
            if len(fetches) >= num_more or not host.take(_size_bytes(entry), *more):
                return False
            fetches[entry.digest] = entry
            return True

        waiting = (e for e in self._lined_up(self.residency.to_fetch) if _fetchable(e, now_s))
        if all(fetch(entry, partial(last_resort, entry)) for entry in urgent):
            all(map(fetch, waiting))
        host.trim()
        return host, list(fetches.values())

    def _host_room(
        self, kept: Collection[str], evicted: Collection[str], dropped: Collection[str], now_s: float
    ) -> _Room:
        free_bytes = self.config.adapter_host_bytes - self.residency.host_bytes_held
        free_bytes += sum(self.residency.entries[digest].adapter.size_bytes for digest in dropped)
        return _Room(free_bytes, partial(self._host_order, kept, evicted, False, now_s), _size_bytes)

    def _host_order(self, kept: Collection[str], evicted: Collection[str], awaited: bool, now_s: float) -> list[Entry]:
        """Host copies that may leave, first one first: those that queued requests wait for, or all others."""
        candidates = [
            entry
            for digest, entry in self.residency.hosted.items()
            if entry.state is not State.LOADING
            and digest not in kept
            and awaited == (bool(entry.queued) and (entry.state is State.HOST or digest in evicted))
        ]
        return self._by_score(candidates, now_s)

    def _lined_up(self, line: WaitingLine) -> Iterator[Entry]:
        """Adapters that queued requests wait for, the one with the oldest request first."""
        return (self.residency.entries[digest] for _, digest in line.order)


def _num_blocks(entry: Entry) -> int:
    return entry.num_blocks


def _size_bytes(entry: Entry) -> int:
    return entry.adapter.size_bytes


def _first_short(needed: Sequence[Entry], leaving: Collection[str]) -> str | None:
    return next((e.digest for e in needed if e.state is State.HOST or e.digest in leaving), None)


def _fetchable(entry: Entry, now_s: float) -> bool:
    if entry.state is State.FAILED:
        return entry.failure is not None and entry.failure.is_over(now_s)
    return entry.state is State.ABSENT


def _reason(for_kv: bool, share_bound: bool) -> EvictReason:
    if for_kv:
        return EvictReason.KV_PRESSURE
    return EvictReason.SHARE_BOUND if share_bound else EvictReason.LOAD
