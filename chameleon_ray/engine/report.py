"""What an engine says about its adapters and queues, in the policy's own types. Imports no vLLM."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from chameleon_ray.policy.admission import QueuesState, QueueState
from chameleon_ray.policy.cache_types import CacheStats, EvictReason
from chameleon_ray.policy.lengths import AccuracySnapshot

WAITING_FOR = ("inspection", "fetch", "room", "load", "turn")
"""What requests wait for: see ``AdapterMemory.waiting``."""
STAGES = ("inspection", "fetch", "load")
"""What can fail: reading an adapter's headers, reading it into host memory, copying it into KV blocks."""
_MAX_EVENTS = 100_000
"""Durations kept for a reader that does not come; the oldest go."""


@dataclass(frozen=True, slots=True)
class MemoryLimits:
    """block_bytes: of one KV block over all ranks and layers. max_blocks: most that adapters may hold, of num_blocks.
    host_bytes: most bytes of host copies per rank."""

    block_bytes: int
    max_blocks: int
    num_blocks: int
    host_bytes: int


@dataclass(frozen=True, slots=True)
class PolicyReport:
    """The state of one replica's policy as of an engine step.

    waiting: requests by what they wait for (``WAITING_FOR``). oldest_waiting_s: since the oldest of them came.
    num_inspection_failures: since the start.
    """

    cache: CacheStats
    queues: QueuesState
    accuracy: AccuracySnapshot
    limits: MemoryLimits
    waiting: Mapping[str, int]
    oldest_waiting_s: float
    num_inspection_failures: int

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "PolicyReport":
        """From ``AdapterStats.data`` (engine/paged/stats.py)."""
        evictions = {EvictReason(reason): count for reason, count in data["cache"]["evictions"].items()}
        queues = tuple(QueueState(**queue) for queue in data["queues"]["queues"])
        return cls(
            cache=CacheStats(**{**data["cache"], "evictions": evictions}),
            queues=QueuesState(**{**data["queues"], "queues": queues}),
            accuracy=AccuracySnapshot(**data["predictions"]),
            limits=MemoryLimits(**data["limits"]),
            waiting=data["waiting"],
            oldest_waiting_s=data["oldest_waiting_s"],
            num_inspection_failures=data["num_inspection_failures"],
        )

    @property
    def num_failures(self) -> dict[str, int]:
        """Failures since the start, by stage (``STAGES``)."""
        counts = (self.num_inspection_failures, self.cache.fetch_failures, self.cache.load_failures)
        return dict(zip(STAGES, counts, strict=True))


@dataclass(frozen=True, slots=True)
class PolicyEvents:
    """What has happened since somebody last asked.

    waited: (queue, queueing delay in s) of admitted requests. seconds: (``fetch`` or ``load``, duration) per rank.
    """

    waited: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_MAX_EVENTS))
    seconds: deque[tuple[str, float]] = field(default_factory=lambda: deque(maxlen=_MAX_EVENTS))

    def record(self, data: Mapping[str, Any]) -> None:
        """Add those of ``AdapterStats.data``."""
        self.waited.extend((int(queue), float(delay_s)) for queue, delay_s in data.get("waited", ()))
        for what, durations in data.get("seconds", {}).items():
            self.seconds.extend((what, float(duration_s)) for duration_s in durations)
