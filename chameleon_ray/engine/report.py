"""What an engine says about its adapters and queues, in the policy's own types. Imports no vLLM."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from chameleon_ray.policy.admission import QueuesState, QueueState
from chameleon_ray.policy.cache_types import CacheStats, EvictReason
from chameleon_ray.policy.figures import level, total
from chameleon_ray.predictor.lengths import AccuracySnapshot

WAITING_FOR = ("inspection", "fetch", "room", "load", "turn")
"""What requests wait for: see ``AdapterMemory.waiting``."""
_MAX_EVENTS = 100_000
"""Durations kept for a reader that does not come; the oldest go."""
MAX_EVICTIONS = 50
"""Evictions that an engine lists one by one."""
RECENT_S = 10.0
"""The time that rates and latencies of an engine's activity are taken over."""


@dataclass(frozen=True, slots=True)
class MemoryLimits:
    """block_bytes: of one block over all ranks and layers. max_blocks: most that adapters may hold, of num_blocks.
    adapter_host_bytes: most bytes of host copies per rank.
    shares_kv: blocks are the KV cache's; else slots, of adapters alone.
    """

    block_bytes: int
    max_blocks: int = field(
        metadata=level("chameleon_adapter_blocks_limit", "KV-cache blocks, or slots, that adapters may hold.")
    )
    num_blocks: int
    adapter_host_bytes: int
    shares_kv: bool = True


@dataclass(frozen=True, slots=True)
class PolicyReport:
    """The state of one replica's policy as of an engine step.

    waiting: requests by what they wait for (``WAITING_FOR``). num_inspection_failures: since the start.
    """

    cache: CacheStats
    queues: QueuesState
    accuracy: AccuracySnapshot
    limits: MemoryLimits
    waiting: Mapping[str, int] = field(
        metadata=level(
            "chameleon_waiting_requests",
            "Requests in the engine that do not run, by what they wait for: their turn, or their adapter (inspection "
            "of its files, fetch, room, load).",
            key_tag="reason",
        )
    )
    oldest_waiting_s: float = field(
        metadata=level(
            "chameleon_oldest_waiting_s", "Seconds since the oldest request that does not run came to the engine."
        )
    )
    num_inspection_failures: int = field(
        metadata=total(
            "chameleon_adapter_load_failures",
            "inspection: adapters whose headers could not be read.",
            stage="inspection",
        )
    )
    adapter_bytes: int = field(
        init=False,
        metadata=level(
            "chameleon_adapter_bytes", "GPU memory of the blocks or slots that adapters hold, over all ranks."
        ),
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapter_bytes", self.cache.blocks_held * self.limits.block_bytes)

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


@dataclass(frozen=True, slots=True)
class RecentEviction:
    """An adapter that left KV memory ``age_s`` seconds ago; ``reason``: a value of ``EvictReason``."""

    adapter: str
    reason: str
    age_s: float


@dataclass(frozen=True, slots=True)
class Activity:
    """What an engine does, for people who look on.

    kv_requests_share, kv_adapters_share: of the KV pool's blocks, those of requests and those of adapters; the rest is
    free. requests_per_s: requests that got their first token within the last ``RECENT_S``. ttft_p50_s, ttft_p95_s: time
    to first token of these, from the request's arrival in the engine; None without any. evictions: latest first.
    """

    kv_requests_share: float = 0.0
    kv_adapters_share: float = 0.0
    requests_per_s: float = 0.0
    ttft_p50_s: float | None = None
    ttft_p95_s: float | None = None
    evictions: tuple[RecentEviction, ...] = ()

    @property
    def kv_free_share(self) -> float:
        """Of the KV pool's blocks, those that nobody uses; what the prefix cache keeps in them can be replaced."""
        return max(0.0, 1.0 - self.kv_requests_share - self.kv_adapters_share)


class RecentTtfts:
    """Times to first token within the last ``RECENT_S``; times in seconds of any one clock."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, float]] = deque(maxlen=_MAX_EVENTS)

    def record(self, ttft_s: float, now_s: float) -> None:
        """A request's first token."""
        self._recent.append((now_s, ttft_s))

    def values_s(self, now_s: float) -> list[float]:
        """All of them, in ascending order."""
        while self._recent and self._recent[0][0] <= now_s - RECENT_S:
            self._recent.popleft()
        return sorted(ttft_s for _, ttft_s in self._recent)


def percentile(ascending: list[float], share: float) -> float | None:
    """The value that ``share`` of them do not exceed (nearest rank); None of none."""
    return ascending[max(0, ceil(share * len(ascending)) - 1)] if ascending else None
