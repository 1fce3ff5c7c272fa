"""Where each adapter of a replica is: the facts of the adapter cache, and their legal changes.

An adapter is in one state:

    absent --fetch--> fetching --fetched--> host --load--> loading --loaded--> resident
                         |                   |                |                    |
                       fails               drop             fails                evict
                         v                   v                v                    v
                       absent              absent           absent      host (copy kept) or absent

1. Blocks are held while it is loading or resident; host bytes from the start of a fetch until the copy is dropped, or
   the fetch or the load fails (what failed to load is not trusted: its host copy goes as well).
2. A host copy may stay beside the resident weights, and may be dropped from there; it stays while it is being loaded.
3. Only on a resident adapter a request can run, and one with running requests never leaves.
4. A retired adapter is forgotten once it holds nothing and no request wants it.
5. Illegal changes raise a ``CacheError`` and change nothing.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Mapping

from chameleon_ray.policy.adapter import Tier
from chameleon_ray.policy.cache_types import CacheCorrupt, IllegalChange, UnknownAdapter
from chameleon_ray.policy.records import CacheEntry, State


class Group(dict[str, CacheEntry]):
    """Adapters of which something is true, by digest, with the total of what they take."""

    def __init__(self, size_of: Callable[[CacheEntry], int]) -> None:
        super().__init__()
        self.total = 0
        self._size_of = size_of

    def sort(self, entry: CacheEntry, belongs: bool) -> None:
        """Take the adapter in or out."""
        if belongs:
            if entry.digest not in self:
                self[entry.digest] = entry
                self.total += self._size_of(entry)
        elif self.pop(entry.digest, None) is not None:
            self.total -= self._size_of(entry)


class WaitingLine:
    """Adapters that requests wait for, by the oldest one's arrival; kept sorted, as each plan reads its front."""

    def __init__(self) -> None:
        self.order: list[tuple[int, CacheEntry]] = []
        self._arrivals: dict[str, int] = {}

    def sort(self, entry: CacheEntry, belongs: bool) -> None:
        """Take the adapter in or out, or to its place."""
        old = self._arrivals.pop(entry.digest, None)
        new = next(iter(entry.queued.values())).arrival if belongs and entry.queued else None
        if new is not None:
            self._arrivals[entry.digest] = new
        if old != new:
            if old is not None:
                del self.order[bisect_left(self.order, (old, entry))]
            if new is not None:
                insort(self.order, (new, entry))


class Residency:
    """All adapters of one replica, in the groups that planning needs.

    held: with blocks. idle: those of them that no running request uses. hosted: with a host copy. loading, fetching: as
    the words say. leavers: retired, and no request wants them.
    to_load, to_fetch: adapters that queued requests wait for, in host memory, or absent or failed.
    version: grows with every change.
    """

    def __init__(self) -> None:
        self.entries: dict[str, CacheEntry] = {}
        self.version = 0
        self.held, self.idle, self.loading, self.leavers = (Group(num_blocks) for _ in range(4))
        self.hosted, self.fetching = Group(size_bytes), Group(size_bytes)
        self.to_load, self.to_fetch = WaitingLine(), WaitingLine()

    @property
    def blocks_held(self) -> int:
        """Blocks of adapters that are loading or resident."""
        return self.held.total

    @property
    def idle_blocks(self) -> int:
        """Blocks of resident adapters that no running request uses."""
        return self.idle.total

    @property
    def host_bytes_held(self) -> int:
        """Bytes of host copies, those being read included."""
        return self.hosted.total + self.fetching.total

    def knows(self, digest: str) -> bool:
        """Whether the adapter was added and not forgotten since."""
        return digest in self.entries

    def entry(self, digest: str) -> CacheEntry:
        """The one record of the adapter. Raises UnknownAdapter."""
        try:
            return self.entries[digest]
        except KeyError:
            raise UnknownAdapter(f"adapter {digest} is not known to the cache: add it first") from None

    def state(self, digest: str) -> State:
        """The adapter's state. Raises UnknownAdapter."""
        return self.entry(digest).state

    def tier(self, digest: str) -> Tier:
        """The adapter's tier, for placement. Raises UnknownAdapter."""
        return self.entry(digest).tier

    def tiers(self) -> dict[str, Tier]:
        """Digest -> tier of every known adapter, for placement."""
        return {digest: entry.tier for digest, entry in self.entries.items()}

    def update(self, entry: CacheEntry) -> None:
        """Take note that a record has changed, or the requests that want the adapter."""
        self.version += 1
        self._sort(entry)
        if entry.digest in self.leavers and entry.state is State.ABSENT:
            self.leavers.sort(entry, False)
            self.entries.pop(entry.digest, None)

    def move(self, entry: CacheEntry, before: tuple[State, ...], after: State) -> None:
        """Change the state. Raises IllegalChange unless it is one of ``before``."""
        if entry.state not in before:
            raise IllegalChange(f"adapter {entry.digest} is {entry.state}, not {' or '.join(before)}")
        entry.state = after
        if after is not State.RESIDENT:
            entry.in_host = after in (State.HOST, State.LOADING)
        self.update(entry)

    def evict(self, entry: CacheEntry) -> None:
        """Its blocks are free again."""
        if entry.running:
            raise IllegalChange(
                f"adapter {entry.digest} has {len(entry.running)} running requests: it cannot be evicted"
            )
        self.move(entry, (State.RESIDENT,), State.HOST if entry.in_host else State.ABSENT)

    def drop_host(self, entry: CacheEntry) -> None:
        """The host copy is gone; resident weights stay."""
        if not entry.in_host:
            raise IllegalChange(f"adapter {entry.digest} has no host copy to drop")
        if entry.state is State.RESIDENT:
            entry.in_host = False
            self.update(entry)
        else:
            self.move(entry, (State.HOST,), State.ABSENT)

    def check(self, owned_blocks: Mapping[str, int] | None = None) -> None:
        """Raise CacheCorrupt, with the numbers, unless records and groups add up.

        owned_blocks: what the driver's pool says each adapter holds.
        """
        own = {digest: entry.num_blocks for digest, entry in self.held.items()}
        if owned_blocks is not None and own != owned_blocks:
            raise CacheCorrupt(f"blocks by adapter: {own} in the cache, {dict(owned_blocks)} in the pool")
        again = Residency()
        for entry in self.entries.values():
            again._sort(entry)
            arrivals = [request.arrival for request in entry.queued.values()]
            if (
                (entry.running and entry.state is not State.RESIDENT)
                or (entry.in_host != (entry.state in (State.HOST, State.LOADING)) and entry.state is not State.RESIDENT)
                or arrivals != sorted(arrivals)
            ):
                raise CacheCorrupt(f"a record contradicts itself: {entry}")
        for name, mine, due in zip(_NAMES, self._indices(), again._indices(), strict=True):
            if mine != due:
                raise CacheCorrupt(f"{name}: {mine} counted, {due} by the records")

    def _sort(self, entry: CacheEntry) -> None:
        state = entry.state
        self.held.sort(entry, state is State.LOADING or state is State.RESIDENT)
        self.idle.sort(entry, state is State.RESIDENT and not entry.running)
        self.hosted.sort(entry, entry.in_host)
        self.fetching.sort(entry, state is State.FETCHING)
        self.loading.sort(entry, state is State.LOADING)
        self.leavers.sort(entry, entry.retired and not entry.wanted)
        self.to_load.sort(entry, state is State.HOST)
        self.to_fetch.sort(entry, state is State.ABSENT)

    def _indices(self) -> tuple[object, ...]:
        groups = (self.idle, self.held, self.hosted, self.fetching, self.loading, self.leavers)
        lines = (self.to_load.order, self.to_fetch.order)
        return tuple((dict(group), group.total) for group in groups) + lines


_NAMES = ("idle", "held", "hosted", "fetching", "loading", "leavers", "to_load", "to_fetch")


def num_blocks(entry: CacheEntry) -> int:
    """What the adapter takes in GPU memory."""
    return entry.num_blocks


def size_bytes(entry: CacheEntry) -> int:
    """What the adapter takes in host memory."""
    return entry.adapter.size_bytes
