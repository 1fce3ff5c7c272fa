"""What goes into the adapter cache and what comes out of it: configuration, plans, statistics, errors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from chameleon_ray.policy.eviction import PAPER_WEIGHTS, POLICIES, Weights
from chameleon_ray.policy.figures import level, total


class CacheError(Exception):
    """The adapter cache was asked for something it cannot do; nothing has changed."""


class UnknownAdapter(CacheError):
    """No adapter of this digest: ``add`` it first."""


class IllegalChange(CacheError):
    """The adapter's state does not allow the change."""


class AdapterTooLarge(CacheError):
    """The adapter can never fit the cache's bounds."""


class StalePlan(CacheError):
    """The cache has changed since the plan was made: make a new one."""


class CacheCorrupt(AssertionError):
    """A bug of ours: the cache's own numbers do not add up."""


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """What an operator decides about one replica's adapter cache.

    max_blocks: most KV-pool blocks that adapters may hold, against prefix-cache blocks and KV.
    adapter_host_bytes: most bytes of host copies, those being read included.
    adapter_policy: a name in ``POLICIES``. weights: of the ``chameleon`` policy.
    frequency_window_s: uses older than this do not count.
    max_fetches: reads into host memory under way at once.
    prefetch: load adapters of queued requests into free blocks before the requests are admitted.
    prefetch_loads: loads in flight (of any kind) up to which one more is started ahead of time.
    prefetch_pause_s: no loading ahead for so long after the KV cache took blocks back.
    """

    max_blocks: int
    adapter_host_bytes: int
    adapter_policy: str = "chameleon"
    weights: Weights = PAPER_WEIGHTS
    frequency_window_s: float = 300.0
    max_fetches: int = 4
    prefetch: bool = True
    prefetch_loads: int = 8
    prefetch_pause_s: float = 1.0

    def __post_init__(self) -> None:
        if self.adapter_policy not in POLICIES:
            raise ValueError(f"adapter_policy {self.adapter_policy!r} is not one of {', '.join(POLICIES)}")
        for name in ("max_blocks", "adapter_host_bytes", "frequency_window_s", "max_fetches", "prefetch_loads"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be more than 0, not {getattr(self, name)}")
        if not self.prefetch_pause_s >= 0:
            raise ValueError(f"prefetch_pause_s must be 0 or more, not {self.prefetch_pause_s}")

    def check_size(self, num_blocks: int, size_bytes: int) -> None:
        """Raises AdapterTooLarge for an adapter that can never be resident."""
        if not 0 < num_blocks <= self.max_blocks:
            raise AdapterTooLarge(
                f"it takes {num_blocks} blocks of KV memory, and all adapters may hold {self.max_blocks}"
            )
        if not 0 < size_bytes <= self.adapter_host_bytes:
            raise AdapterTooLarge(
                f"it takes {size_bytes} bytes of host memory, and all adapters may hold {self.adapter_host_bytes}"
            )


class EvictReason(StrEnum):
    """Why an adapter leaves the GPU."""

    KV_PRESSURE = "kv_pressure"
    LOAD = "load"
    SHARE_BOUND = "share_bound"
    DISCARD = "discard"
    RETIRED = "retired"


@dataclass(frozen=True, slots=True)
class Eviction:
    """An idle adapter leaves the GPU and gives its blocks back."""

    digest: str
    num_blocks: int
    reason: EvictReason


@dataclass(frozen=True, slots=True)
class Plan:
    """What a driver has to do, in this order, once the plan is committed. False where that is nothing.

    evict: give these adapters' blocks back to the pool. drop: free these host copies.
    load: take blocks and copy from host memory, most urgent first; the last ``num_prefetch`` of them are ahead of time.
    fetch: read into host memory, most urgent first.
    blocked: the first needed adapter that does not fit, even if everything idle left.
    version: the cache's state that the plan is for.
    """

    version: int
    evict: tuple[Eviction, ...] = ()
    drop: tuple[str, ...] = ()
    load: tuple[str, ...] = ()
    num_prefetch: int = 0
    fetch: tuple[str, ...] = ()
    blocked: str | None = None

    @property
    def freed_blocks(self) -> int:
        """Blocks that the evictions give back."""
        return sum(eviction.num_blocks for eviction in self.evict)

    def __bool__(self) -> bool:
        return bool(self.evict or self.drop or self.load or self.fetch)


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Totals since the start, and what holds now.

    prefetches: those of ``loads`` that were ahead of time. host_drops: host copies that left.
    requests_waiting: queued requests whose adapter is not resident.
    """

    hits: int = field(
        metadata=total("chameleon_adapter_hits", "Requests whose adapter was resident when they came to the engine.")
    )
    misses: int = field(
        metadata=total("chameleon_adapter_misses", "Requests whose adapter was not resident when they came.")
    )
    evictions: Mapping[EvictReason, int] = field(
        metadata=total(
            "chameleon_adapter_evictions",
            "Adapters that left KV memory: kv_pressure, load (room for another), share_bound, discard, retired.",
            key_tag="reason",
        )
    )
    loads: int = field(
        metadata=total("chameleon_adapter_loads", "load: copies from host memory into KV blocks begun.", stage="load")
    )
    prefetches: int = field(
        metadata=total("chameleon_adapter_prefetches", "Loads into KV blocks that no request needed yet.")
    )
    load_failures: int = field(
        metadata=total("chameleon_adapter_load_failures", "load: copies into KV blocks that failed.", stage="load")
    )
    fetches: int = field(
        metadata=total("chameleon_adapter_loads", "fetch: reads from disk into host memory begun.", stage="fetch")
    )
    fetch_failures: int = field(
        metadata=total("chameleon_adapter_load_failures", "fetch: reads into host memory that failed.", stage="fetch")
    )
    host_drops: int
    blocks_held: int = field(
        metadata=level(
            "chameleon_adapter_blocks", "KV-cache blocks, or slots, that adapters hold, those being loaded included."
        )
    )
    host_bytes_held: int = field(
        metadata=level("chameleon_adapter_host_bytes", "Host memory of adapters per rank, those being read included.")
    )
    adapters_known: int
    adapters_resident: int
    adapters_in_host: int
    loads_in_flight: int = field(
        metadata=level("chameleon_adapter_loads_in_flight", "load: under way into KV blocks.", stage="load")
    )
    fetches_in_flight: int = field(
        metadata=level("chameleon_adapter_loads_in_flight", "fetch: under way into host memory.", stage="fetch")
    )
    requests_running: int
    requests_queued: int
    requests_waiting: int
