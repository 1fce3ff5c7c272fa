"""What queues and adapter cache tell each other about a request that wants to run."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from chameleon_ray.policy.sizing import QueuedRequest


class Admission(Enum):
    """Whether a request's adapter lets it run now."""

    READY = "ready"
    """Resident, or the request needs none."""
    FITS = "fits"
    """Not resident, but room can be made: the request is offered, the driver loads the adapter or passes it over."""
    LOADING = "loading"
    """On its way."""
    NO_ROOM = "no room"
    """Cannot fit even if all idle adapters are evicted."""


class AdapterRoom(Protocol):
    """What queues ask of the adapter cache. Both are questions: they change nothing."""

    def admission(self, request: QueuedRequest) -> Admission:
        """Whether the request's adapter lets it run now."""

    def ends_needed(self, request: QueuedRequest, leaving: Sequence[str]) -> int | None:
        """How many of the running requests ``leaving`` must be gone, in that order, for the request to have room.

        Idle adapters are evicted for it. None where not even all of them suffice.
        """


class Obstacle(Enum):
    """Why a request does not run in this step. Drivers report the first four."""

    LOADING = "its adapter is loading"
    NO_ROOM = "no room for its adapter"
    NO_MEMORY = "no memory for its KV cache"
    NOT_READY = "the engine waits for something else (a grammar, a remote transfer)"
    QUOTA = "not enough quota"
    NO_BYPASS = "may not bypass its queue's head"


@dataclass(frozen=True, slots=True)
class Admitted:
    """What admitting a request meant: its queue, how long it waited, and whether it bypassed an older one."""

    queue: int
    waited_s: float
    bypass: bool


@dataclass(frozen=True, slots=True)
class QueueState:
    """One queue, for metrics.

    max_size: its upper cut-off, infinite for the last. num_waiting includes num_loading.
    quota_tokens, used_tokens: its quota and what is lent of it. max_running: its share of the batch's seats.
    """

    max_size: float
    num_waiting: int
    num_loading: int
    num_running: int
    max_running: int
    quota_tokens: int
    used_tokens: int


@dataclass(frozen=True, slots=True)
class QueuesState:
    """All queues and lifetime counts, for metrics.

    minima_scale: below 1, the quotas cannot hold the SLO and were scaled by it.
    num_holds: times the replica was kept free for one request (rule 6).
    """

    queues: tuple[QueueState, ...]
    num_running: int
    minima_scale: float
    num_admissions: int
    num_bypasses: int
    num_squashes: int
    num_refreshes: int
    num_holds: int
