"""Where each adapter of a replica is and which requests want it: the adapter cache's facts, and their legal changes.

An adapter is in one state:

    absent --start_fetch--> fetching --finish_fetch--> host --start_load--> loading --finish_load--> resident
                               |                        |                      |                        |
                           fail_fetch               drop_host              fail_load                  evict
                               v                        v                      v                        v
                             failed                   absent                 failed          host (copy kept) or absent

1. Blocks are held from ``start_load`` until ``evict`` or ``fail_load``; host bytes from ``start_fetch`` until
   ``drop_host``, ``fail_fetch`` or ``fail_load`` (what failed to load is not trusted: its host copy goes as well).
2. A host copy may stay beside the resident weights, and may be dropped from there; it stays while it is being loaded.
3. A request is queued (``enqueue``, ``requeue``) or running (``acquire``), until ``release``. Only a resident adapter
   can be acquired, and one with running requests never leaves.
4. Illegal changes raise a ``CacheError`` and change nothing.
"""

from bisect import bisect_left, insort
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from chameleon_ray.policy.adapter import Adapter, Tier
from chameleon_ray.policy.cache_types import CacheCorrupt, IllegalChange, UnknownAdapter, UnknownRequest


class State(StrEnum):
    """Where an adapter is on its way to the GPU."""

    ABSENT = "absent"
    FETCHING = "fetching"
    HOST = "host"
    LOADING = "loading"
    RESIDENT = "resident"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an adapter could not be fetched or loaded, and from when on it may be tried again; None: never."""

    reason: str
    retry_at_s: float | None

    def is_over(self, now_s: float) -> bool:
        """Whether the adapter may be tried again."""
        return self.retry_at_s is not None and now_s >= self.retry_at_s


@dataclass(slots=True, eq=False)
class Entry:
    """One adapter. Changed by ``Residency`` only.

    row: its row in the use history. running: requests that hold a reference; queued: requests that wait, oldest first;
    both map request ids to arrival numbers.
    retired: not to be served any more; leaves once no request wants it.
    """

    adapter: Adapter
    num_blocks: int
    row: int
    on_disk: bool
    state: State = State.ABSENT
    in_host: bool = False
    retired: bool = False
    failure: Failure | None = None
    running: dict[str, int] = field(default_factory=dict)
    queued: dict[str, int] = field(default_factory=dict)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        self.digest = self.adapter.digest

    @property
    def wanted(self) -> bool:
        """Whether a request is queued for it or runs on it."""
        return bool(self.running or self.queued)

    @property
    def tier(self) -> Tier:
        """Where its weights can be used from; a failed adapter counts as absent, so that routers look elsewhere."""
        if self.state is State.RESIDENT:
            return Tier.GPU
        if self.in_host:
            return Tier.HOST
        return Tier.DISK if self.on_disk and self.state is not State.FAILED else Tier.ABSENT


class WaitingLine:
    """Adapters by the arrival number of their oldest queued request; kept sorted, as each plan reads its front."""

    def __init__(self) -> None:
        self.order: list[tuple[int, str]] = []
        self._places: dict[str, tuple[int, str]] = {}

    def put(self, digest: str, arrival: int | None) -> None:
        """Place the adapter by that arrival number; None takes it out."""
        old = self._places.pop(digest, None)
        new = None if arrival is None else (arrival, digest)
        if new is not None:
            self._places[digest] = new
        if old != new:
            if old is not None:
                del self.order[bisect_left(self.order, old)]
            if new is not None:
                insort(self.order, new)


class Residency:
    """All adapters of one replica, with running totals and the groups that planning needs.

    idle: resident and without running requests. hosted: with a host copy. retired, loading, fetching: as the words say.
    Each maps digests to entries.
    blocks_held: those of loading and resident adapters. idle_blocks: those of them that nobody uses.
    to_load, to_fetch: adapters that queued requests wait for, in host memory, or absent or failed.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.idle: dict[str, Entry] = {}
        self.hosted: dict[str, Entry] = {}
        self.retired: dict[str, Entry] = {}
        self.loading: dict[str, Entry] = {}
        self.fetching: dict[str, Entry] = {}
        self.to_load = WaitingLine()
        self.to_fetch = WaitingLine()
        self.blocks_held = 0
        self.idle_blocks = 0
        self.host_bytes_held = 0
        self._digest_of: dict[str, str] = {}
        self._num_arrivals = 0

    def entry(self, digest: str) -> Entry:
        """The adapter's entry. Raises UnknownAdapter."""
        try:
            return self.entries[digest]
        except KeyError:
            raise UnknownAdapter(f"adapter {digest} is not known to the cache: add it first") from None

    def entry_of(self, request_id: str) -> Entry:
        """The entry of the adapter that a live request wants. Raises UnknownRequest."""
        try:
            return self.entries[self._digest_of[request_id]]
        except KeyError:
            raise UnknownRequest(f"request {request_id} is neither queued nor running (released twice?)") from None

    def add(self, entry: Entry) -> None:
        """A new adapter, absent."""
        self.entries[entry.digest] = entry

    def set_retired(self, entry: Entry, retired: bool) -> None:
        """Mark or unmark an adapter that is not to be served any more."""
        entry.retired = retired
        self._regroup(entry)

    def can_forget(self, entry: Entry) -> bool:
        """Whether the adapter is known, retired, not wanted, and holds nothing."""
        done = entry.retired and not entry.wanted and entry.state in (State.ABSENT, State.FAILED)
        return done and entry.digest in self.entries

    def forget(self, entry: Entry) -> None:
        """Remove an adapter; only where ``can_forget``."""
        del self.entries[entry.digest]
        self.retired.pop(entry.digest, None)

    def enqueue(self, entry: Entry, request_id: str) -> None:
        """A new request waits for the adapter."""
        if request_id in self._digest_of:
            raise IllegalChange(f"request {request_id} is in the cache already: release it first")
        self._digest_of[request_id] = entry.digest
        entry.queued[request_id] = self._num_arrivals
        self._num_arrivals += 1
        self._wanted_otherwise(entry)

    def acquire(self, request_id: str) -> Entry:
        """A queued request starts to run; returns its adapter's entry."""
        entry = self.entry_of(request_id)
        if entry.state is not State.RESIDENT or request_id not in entry.queued:
            waits = "runs already" if request_id in entry.running else f"waits for an adapter that is {entry.state}"
            raise IllegalChange(f"request {request_id} cannot start: it {waits}")
        entry.running[request_id] = entry.queued.pop(request_id)
        self._wanted_otherwise(entry)
        return entry

    def requeue(self, request_id: str) -> Entry:
        """A running request was preempted and waits again, at its old place; returns its adapter's entry."""
        entry = self.entry_of(request_id)
        if request_id not in entry.running:
            raise IllegalChange(f"request {request_id} is not running: it cannot be queued again")
        entry.queued[request_id] = entry.running.pop(request_id)
        entry.queued = dict(sorted(entry.queued.items(), key=lambda item: item[1]))
        self._wanted_otherwise(entry)
        return entry

    def release(self, request_id: str) -> Entry:
        """A request ended, was aborted or failed, wherever it was; returns its adapter's entry."""
        entry = self.entry_of(request_id)
        del self._digest_of[request_id]
        entry.running.pop(request_id, None)
        entry.queued.pop(request_id, None)
        self._wanted_otherwise(entry)
        return entry

    def start_fetch(self, entry: Entry) -> None:
        """Host bytes are reserved and reading begins; a failure before is forgotten."""
        self._require(entry, State.ABSENT, State.FAILED)
        self.host_bytes_held += entry.adapter.size_bytes
        self._move(entry, State.FETCHING)

    def finish_fetch(self, entry: Entry) -> None:
        """The host copy is complete; what came from the source is on disk now as well."""
        self._require(entry, State.FETCHING)
        entry.in_host = entry.on_disk = True
        self._move(entry, State.HOST)

    def fail_fetch(self, entry: Entry, failure: Failure) -> None:
        """The host bytes are free again."""
        self._require(entry, State.FETCHING)
        self.host_bytes_held -= entry.adapter.size_bytes
        self._move(entry, State.FAILED, failure)

    def drop_host(self, entry: Entry) -> None:
        """The host copy is gone; resident weights stay."""
        self._require(entry, State.HOST, State.RESIDENT)
        if not entry.in_host:
            raise IllegalChange(f"adapter {entry.digest} has no host copy to drop")
        self.host_bytes_held -= entry.adapter.size_bytes
        entry.in_host = False
        self._move(entry, State.RESIDENT if entry.state is State.RESIDENT else State.ABSENT)

    def start_load(self, entry: Entry) -> None:
        """Blocks are held from here on."""
        self._require(entry, State.HOST)
        self.blocks_held += entry.num_blocks
        self._move(entry, State.LOADING)

    def finish_load(self, entry: Entry) -> None:
        """Its weights can be computed on."""
        self._require(entry, State.LOADING)
        self._move(entry, State.RESIDENT)

    def fail_load(self, entry: Entry, failure: Failure) -> None:
        """Blocks and host bytes are free again."""
        self._require(entry, State.LOADING)
        self.blocks_held -= entry.num_blocks
        self.host_bytes_held -= entry.adapter.size_bytes
        entry.in_host = False
        self._move(entry, State.FAILED, failure)

    def evict(self, entry: Entry) -> None:
        """Its blocks are free again."""
        self._require(entry, State.RESIDENT)
        if entry.running:
            raise IllegalChange(
                f"adapter {entry.digest} has {len(entry.running)} running requests: it cannot be evicted"
            )
        self.blocks_held -= entry.num_blocks
        self._move(entry, State.HOST if entry.in_host else State.ABSENT)

    def check(self, owned_blocks: Mapping[str, int] | None, live_requests: Collection[str] | None) -> None:
        """Raises CacheCorrupt with the numbers that disagree, among themselves or with the driver's."""
        entries = self.entries.values()
        if owned_blocks is not None:
            own = {e.digest: e.num_blocks for e in entries if e.state in (State.LOADING, State.RESIDENT)}
            _demand(own == owned_blocks, f"blocks by adapter: {own} in the cache, {dict(owned_blocks)} in the pool")
        if live_requests is not None:
            ghosts = self._digest_of.keys() ^ set(live_requests)
            _demand(not ghosts, f"requests known only to the cache or only to its driver: {sorted(ghosts)}")
        blocks = sum(e.num_blocks for e in entries if e.state in (State.LOADING, State.RESIDENT))
        host_bytes = sum(e.adapter.size_bytes for e in entries if e.in_host or e.state is State.FETCHING)
        _demand(self.blocks_held == blocks, f"{self.blocks_held} blocks counted, {blocks} held")
        idle_blocks = sum(e.num_blocks for e in self.idle.values())
        _demand(self.idle_blocks == idle_blocks, f"{self.idle_blocks} idle blocks counted, {idle_blocks} idle")
        _demand(self.host_bytes_held == host_bytes, f"{self.host_bytes_held} host bytes counted, {host_bytes} held")
        requests = {r: e.digest for e in entries for r in (*e.running, *e.queued)}
        _demand(self._digest_of == requests, f"requests {self._digest_of} counted, {requests} held")
        _demand(
            len(requests) == sum(len(e.running) + len(e.queued) for e in entries),
            "a request is queued and running at once",
        )
        for entry in entries:
            state = entry.state
            _demand(not entry.running or state is State.RESIDENT, f"{entry.digest} runs while {state}")
            _demand(
                entry.in_host or state not in (State.HOST, State.LOADING), f"{entry.digest} {state} without host copy"
            )
            _demand(not entry.in_host or state in _WITH_HOST_COPY, f"{entry.digest} has a host copy while {state}")
            _demand((entry.failure is not None) == (state is State.FAILED), f"{entry.digest} {state}: {entry.failure}")
            numbers = list(entry.queued.values())
            _demand(numbers == sorted(numbers), f"{entry.digest}: queue out of order {entry.queued}")
            for name, (group, belongs) in zip(_GROUP_NAMES, self._groups(entry), strict=True):
                _demand((entry.digest in group) == belongs, f"{entry.digest} {state} wrongly in or out of {name!r}")
        for name, group in zip(_GROUP_NAMES, self._all_groups(), strict=True):
            _demand(group.keys() <= self.entries.keys(), f"{name!r} has forgotten adapters")
        for line, states in ((self.to_load, _LOADABLE), (self.to_fetch, _FETCHABLE)):
            waiting = sorted((min(e.queued.values()), e.digest) for e in entries if e.queued and e.state in states)
            _demand(line.order == waiting, f"{line.order} lined up, {waiting} waiting")

    def _require(self, entry: Entry, *states: State) -> None:
        if entry.state not in states:
            raise IllegalChange(f"adapter {entry.digest} is {entry.state}, not {' or '.join(states)}")

    def _move(self, entry: Entry, state: State, failure: Failure | None = None) -> None:
        entry.state = state
        entry.failure = failure
        self._regroup(entry)

    def _all_groups(self) -> tuple[dict[str, Entry], ...]:
        return self.idle, self.hosted, self.retired, self.loading, self.fetching

    def _groups(self, entry: Entry) -> tuple[tuple[dict[str, Entry], bool], ...]:
        state = entry.state
        return (
            (self.idle, state is State.RESIDENT and not entry.running),
            (self.hosted, entry.in_host),
            (self.retired, entry.retired),
            (self.loading, state is State.LOADING),
            (self.fetching, state is State.FETCHING),
        )

    def _wanted_otherwise(self, entry: Entry) -> None:
        """``_regroup`` where only its requests have changed."""
        if entry.state is State.RESIDENT:
            self._count_idle(entry)
        else:
            self._line_up(entry)

    def _regroup(self, entry: Entry) -> None:
        self._count_idle(entry)
        for group, belongs in self._groups(entry)[1:]:
            if belongs:
                group[entry.digest] = entry
            else:
                group.pop(entry.digest, None)
        self._line_up(entry)

    def _count_idle(self, entry: Entry) -> None:
        if entry.state is State.RESIDENT and not entry.running:
            if entry.digest not in self.idle:
                self.idle[entry.digest] = entry
                self.idle_blocks += entry.num_blocks
        elif self.idle.pop(entry.digest, None) is not None:
            self.idle_blocks -= entry.num_blocks

    def _line_up(self, entry: Entry) -> None:
        oldest = next(iter(entry.queued.values()), None)
        self.to_load.put(entry.digest, oldest if entry.state in _LOADABLE else None)
        self.to_fetch.put(entry.digest, oldest if entry.state in _FETCHABLE else None)


_LOADABLE = (State.HOST,)
_FETCHABLE = (State.ABSENT, State.FAILED)
_GROUP_NAMES = ("idle", "hosted", "retired", "loading", "fetching")
_WITH_HOST_COPY = (State.HOST, State.LOADING, State.RESIDENT)


def _demand(holds: bool, problem: str) -> None:
    if not holds:
        raise CacheCorrupt(problem)
