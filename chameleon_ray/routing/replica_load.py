"""What a replica tells routers of its load."""

import math
from dataclasses import dataclass, fields

_SMOOTHING = 0.1


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """A replica's own account of its load, as it publishes it with every heartbeat.

    num_running, num_waiting: requests in the engine's batch and in its queues.
    max_num_seqs: how many requests the engine runs at once.
    service_s: mean seconds from a request's admission to its end, over recent requests; 0 when unknown.
    ttft_s: mean seconds to first token of recent requests that neither queued nor loaded; 0 when unknown.
    eviction_cost_s: expected seconds that making room for one more adapter costs later requests (0 with free room).
    kv_used_share: share of the KV pool that running requests and the adapters they use hold; what can be evicted at
        once (idle adapters, cached prefixes) is free. 0 when unknown.

    Raises ValueError for a value that is negative or not finite, or a ``max_num_seqs`` below 1.
    """

    num_running: int = 0
    num_waiting: int = 0
    max_num_seqs: int = 1
    service_s: float = 0.0
    ttft_s: float = 0.0
    eviction_cost_s: float = 0.0
    kv_used_share: float = 0.0

    def __post_init__(self) -> None:
        # Every replica of a simulated cluster reports every second: look at the names only when something is wrong.
        times_s = (self.service_s, self.ttft_s, self.eviction_cost_s)
        values = (self.num_running, self.num_waiting, self.kv_used_share, *times_s)
        if min(values) >= 0 and self.max_num_seqs >= 1 and math.isfinite(sum(values) + self.max_num_seqs):
            return
        for field in fields(self):
            lowest = 1 if field.name == "max_num_seqs" else 0
            value = getattr(self, field.name)
            if not lowest <= value < math.inf:
                raise ValueError(
                    f"{field.name} of a replica's load is {value!r}: report a finite number from {lowest} up"
                )


@dataclass(slots=True)
class RecentRequests:
    """Running means over a replica's latest requests, about 20 of them, for its ``ReplicaLoad``; 0 before the first."""

    ttft_s: float = 0.0
    service_s: float = 0.0

    def record(self, ttft_s: float, service_s: float) -> None:
        """A request ended by itself, so many seconds after its first admission; its first token came after ttft_s."""
        self.ttft_s = ttft_s if not self.ttft_s else self.ttft_s + _SMOOTHING * (ttft_s - self.ttft_s)
        self.service_s = service_s if not self.service_s else self.service_s + _SMOOTHING * (service_s - self.service_s)
