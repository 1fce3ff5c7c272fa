"""One queue of requests of like size: who waits in it, in which order, and how much of its quota is lent."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from chameleon_ray.policy.sizing import QueuedRequest

Order = tuple[float, int]
"""Place in a queue: seniority (or size), then arrival number, which no two requests share."""


_INSERTS_PER_MERGE = 32
"""A merge passes over the whole queue: so many of its requests cost as much as one insertion."""


class Place(Enum):
    """Where a request is; always exactly one of these."""

    WAITING = "waiting"
    """In its queue, looked at by steps."""
    LOADING = "loading"
    """Set aside until its adapter is loaded; keeps its order."""
    RUNNING = "running"
    """Admitted; its tokens are borrowed."""
    GONE = "gone"
    """Ended or aborted."""


@dataclass(slots=True, eq=False)
class Entry:
    """A request in the queues.

    arrival: number of the request, in order of arrival.
    tokens, adapter_tokens: what it borrows while it runs, and the part of it that is for its adapter.
    own_adapter_tokens: that part if nobody else used the adapter.
    size: its WRS by the scales in force. admitted_s: when it last began to run.
    waiting_since_s: when it arrived or last came back.
    overtaken: requests admitted while only capacity, not its queue's quota, kept it waiting.
    was_ready: its adapter was resident while it waited. was_squashed: it lost a bypass once.
    loans: (queue, tokens) that it borrowed. bypassed: the older request that it overtook by a bypass, while both live.
    """

    request: QueuedRequest
    arrival: int
    arrival_s: float
    tokens: int
    queue: "SizeQueue"
    adapter_tokens: int = 0
    own_adapter_tokens: int = 0
    size: float = 0.0
    order: Order = (0.0, 0)
    place: Place = Place.WAITING
    waiting_since_s: float = 0.0
    admitted_s: float = 0.0
    overtaken: int = 0
    was_ready: bool = False
    was_squashed: bool = False
    loans: list[tuple["SizeQueue", int]] = field(default_factory=list)
    bypassed: "Entry | None" = None

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id


class SizeQueue:
    """Waiting requests in order, and the quota.

    used_tokens: lent to running requests, of this queue or of others; above the quota only for a request that is larger
        than the quota, or after a refresh made the quota smaller.
    num_running, max_running: its requests that run, and its share of the engine's seats.
    num_loading: its requests that are set aside for a loading adapter.
    stuck: requests that the latest step found unable to run for want of capacity rather than quota.
    resume: where the latest step ran out of quota, so that spare tokens are offered from there.
    """

    def __init__(self, index: int, quota_tokens: int, max_running: int) -> None:
        self.index = index
        self.quota_tokens = quota_tokens
        self.used_tokens = 0
        self.max_running = max_running
        self.num_running = 0
        self.num_loading = 0
        self.stuck: list[Entry] = []
        self.resume: Entry | None = None
        self._waiting: list[tuple[float, int, Entry]] = []

    def __len__(self) -> int:
        return len(self._waiting) + self.num_loading

    @property
    def free_tokens(self) -> int:
        """What the queue can still lend, never negative."""
        return max(0, self.quota_tokens - self.used_tokens)

    @property
    def free_seats(self) -> int:
        """Seats of the queue's share that its requests do not use, never negative."""
        return max(0, self.max_running - self.num_running)

    def waiting(self) -> list[Entry]:
        """Requests that steps look at, in order."""
        return [entry for _, _, entry in self._waiting]

    def first(self) -> Entry | None:
        """The head."""
        return self._waiting[0][2] if self._waiting else None

    def at(self, index: int) -> Entry | None:
        """The waiting request at that position, the head's being 0."""
        return self._waiting[index][2] if index < len(self._waiting) else None

    def index_of(self, order: Order) -> int:
        """The position of the request at that place, or of the first one behind it."""
        return bisect_left(self._waiting, order)

    def after(self, order: Order) -> Entry | None:
        """The first waiting request behind that place."""
        return self.at(self.index_of((order[0], order[1] + 1)))

    def note_stuck(self, entry: Entry) -> None:
        """Capacity rather than quota keeps the request waiting in this step."""
        if entry not in self.stuck:
            self.stuck.append(entry)

    def insert(self, entry: Entry) -> None:
        """Put a request at its place."""
        insort(self._waiting, (*entry.order, entry))

    def insert_all(self, entries: Sequence[Entry]) -> None:
        """Put several requests at their places: few one by one, many at the cost of one merge."""
        if len(entries) * _INSERTS_PER_MERGE < len(self._waiting):
            for entry in entries:
                self.insert(entry)
        else:
            self._waiting.extend((*entry.order, entry) for entry in entries)
            self._waiting.sort()

    def remove(self, entry: Entry) -> None:
        """Take a waiting request out."""
        index = self.index_of(entry.order)
        assert self._waiting[index][2] is entry, f"{entry.request_id} is not at its place"
        del self._waiting[index]
