"""The records that queues and cache share: one of every request, one of every adapter on its replica, and a queue.

The queues own requests: what becomes of each, and so who waits for an adapter and who runs on it. The cache owns
adapters: where each is on its way to the GPU. Nobody keeps a copy.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum

from chameleon_ray.policy.adapter import Adapter, Tier

_INSERTS_PER_MERGE = 32
"""A merge passes over the whole queue: so many of its requests cost as much as one insertion."""

Order = tuple[float, int]
"""Place in a queue: seniority (or size), then arrival number, which no two requests share."""


class State(StrEnum):
    """Where an adapter is on its way to the GPU. The legal changes are in ``residency.py``."""

    ABSENT = "absent"
    FETCHING = "fetching"
    HOST = "host"
    LOADING = "loading"
    RESIDENT = "resident"


@dataclass(slots=True, eq=False)
class CacheEntry:
    """One adapter on a replica.

    num_blocks: blocks that its weights take in GPU memory. on_disk: whether the node's store has its files.
    in_host: whether there is a copy in host memory. retired: not to be served any more; it leaves
    once no request wants it.
    queued, running: by id, requests that wait for it, oldest first, and that run on it, in order of admission.
    use_counts: (bucket of time, requests that came in it), num_uses in all; last_used_s, uses_since_load, clock_at_use:
    see ``eviction.UseHistory``.
    """

    adapter: Adapter
    num_blocks: int
    on_disk: bool = True
    state: State = State.ABSENT
    in_host: bool = False
    retired: bool = False
    queued: dict[str, "QueuedRequest"] = field(default_factory=dict)
    running: dict[str, "QueuedRequest"] = field(default_factory=dict)
    use_counts: deque[tuple[int, int]] = field(default_factory=deque)
    num_uses: int = 0
    last_used_s: float = 0.0
    uses_since_load: int = 0
    clock_at_use: float = 0.0
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        self.digest = self.adapter.digest

    @property
    def wanted(self) -> bool:
        """Whether a request is queued for it or runs on it."""
        return bool(self.running or self.queued)

    @property
    def tier(self) -> Tier:
        """Where its weights can be used from."""
        if self.state is State.RESIDENT:
            return Tier.GPU
        if self.in_host:
            return Tier.HOST
        return Tier.DISK if self.on_disk else Tier.ABSENT


class Place(Enum):
    """Where a request is; always exactly one of these."""

    WAITING = "waiting"
    """In its queue, looked at by steps."""
    LOADING = "loading"
    """Set aside until its adapter is loaded; keeps its order."""
    RUNNING = "running"
    """Admitted; its tokens are borrowed."""
    GONE = "gone"
    """Ended or aborted, or not arrived yet."""


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """A request. Its driver makes it, of the first five fields, for one arrival; the rest is the policy's.

    num_predicted_tokens: predicted output length (see ``predictor``). adapter: None for the base model.
    priority: the client's, as in vLLM: a lower value goes earlier.

    entry: its adapter's record. arrival: its number, in order of arrival.
    size: its WRS by the scales in force; queue, order: where it waits by that.
    tokens, adapter_tokens: what it borrows while it runs, and the part of it that is for its adapter.
    loans: (queue, tokens) that it borrowed. admitted_s: when it last began to run.
    waiting_since_s: when it arrived or last came back.
    overtaken: requests admitted while only capacity, not its queue's quota, kept it waiting.
    was_ready: its adapter was resident while it waited. was_squashed: it lost a bypass once.
    bypassed: the older request that it overtook by a bypass, while both live.
    """

    request_id: str
    num_prompt_tokens: int
    num_predicted_tokens: int
    adapter: Adapter | None = None
    priority: int = 0
    entry: CacheEntry | None = field(default=None, repr=False)
    arrival: int = 0
    arrival_s: float = 0.0
    size: float = 0.0
    queue: "SizeQueue" = field(init=False, repr=False)
    order: Order = (0.0, 0)
    place: Place = Place.GONE
    tokens: int = 0
    adapter_tokens: int = 0
    loans: list[tuple["SizeQueue", int]] = field(default_factory=list, repr=False)
    admitted_s: float = 0.0
    waiting_since_s: float = 0.0
    overtaken: int = 0
    was_ready: bool = False
    was_squashed: bool = False
    bypassed: "QueuedRequest | None" = field(default=None, repr=False)


class SizeQueue:
    """Waiting requests of like size, in order, and how much of the queue's quota is lent.

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
        self.stuck: list[QueuedRequest] = []
        self.resume: QueuedRequest | None = None
        self._waiting: list[tuple[float, int, QueuedRequest]] = []

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

    def waiting(self) -> list[QueuedRequest]:
        """Requests that steps look at, in order."""
        return [request for _, _, request in self._waiting]

    def at(self, index: int) -> QueuedRequest | None:
        """The waiting request at that position, the head's being 0."""
        return self._waiting[index][2] if index < len(self._waiting) else None

    def index_of(self, order: Order) -> int:
        """The position of the request at that place, or of the first one behind it."""
        return bisect_left(self._waiting, order)

    def after(self, order: Order) -> QueuedRequest | None:
        """The first waiting request behind that place."""
        return self.at(self.index_of((order[0], order[1] + 1)))

    def note_stuck(self, request: QueuedRequest) -> None:
        """Capacity rather than quota keeps the request waiting in this step."""
        if request not in self.stuck:
            self.stuck.append(request)

    def insert(self, requests: Sequence[QueuedRequest]) -> None:
        """Put requests at their places: few one by one, many at the cost of one merge."""
        if len(requests) * _INSERTS_PER_MERGE < len(self._waiting):
            for request in requests:
                insort(self._waiting, (*request.order, request))
        else:
            self._waiting.extend((*request.order, request) for request in requests)
            self._waiting.sort()

    def remove(self, request: QueuedRequest) -> None:
        """Take a waiting request out."""
        index = self.index_of(request.order)
        assert self._waiting[index][2] is request, f"{request.request_id} is not at its place"
        del self._waiting[index]
