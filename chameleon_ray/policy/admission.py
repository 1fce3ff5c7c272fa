"""What is said of a request that wants to run, and of the queues as they are."""

from dataclasses import dataclass, field
from enum import Enum

from chameleon_ray.policy.figures import level, total


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
    """One queue. ``num_waiting`` includes ``num_loading``, requests whose adapter is on its way."""

    max_size: float = field(
        metadata=level(
            "chameleon_queue_cutoff", "Largest weighted request size of the queue; 0: the last one, without bound."
        )
    )
    num_waiting: int = field(metadata=level("chameleon_queue_waiting", "Requests that wait, by queue."))
    num_loading: int
    num_running: int = field(metadata=level("chameleon_queue_running", "Requests that run, by queue."))
    max_running: int = field(
        metadata=level("chameleon_queue_max_running", "Requests that may run at once, by queue; 0: no bound.")
    )
    quota_tokens: int = field(
        metadata=level("chameleon_queue_quota_tokens", "Tokens that running requests may borrow; 0: no bound.")
    )
    used_tokens: int = field(metadata=level("chameleon_queue_used_tokens", "Tokens of the quota that are lent."))


@dataclass(frozen=True, slots=True)
class QueuesState:
    """All queues, and counts since the start."""

    queues: tuple[QueueState, ...] = field(
        metadata=level("chameleon_queues", "Queues that requests are split into at present.", key_tag="queue")
    )
    num_running: int
    minima_scale: float = field(
        metadata=level(
            "chameleon_quota_minima_scale",
            "Below 1: the quotas cannot hold the SLO, and were scaled down by this.",
        )
    )
    num_admissions: int = field(
        metadata=total("chameleon_admissions", "Requests that began to run; after a preemption once more.")
    )
    num_bypasses: int = field(
        metadata=total("chameleon_bypasses", "Requests that ran before an older one whose adapter had no room.")
    )
    num_squashes: int = field(
        metadata=total(
            "chameleon_squashes", "Requests that had bypassed and were stopped again: the room came earlier."
        )
    )
    num_refreshes: int = field(
        metadata=total("chameleon_queue_refreshes", "Times that cut-offs and quotas were measured anew.")
    )
    num_holds: int = field(
        metadata=total("chameleon_holds", "Times that the replica was kept free for one request overtaken too often.")
    )
