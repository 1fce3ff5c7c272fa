"""Which replica should serve a request: ranking by expected time to first token."""

from dataclasses import dataclass

from chameleon_ray.policy.adapter import Tier


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """A replica's own account of its load, as it publishes it with every heartbeat.

    num_running, num_waiting: requests in the engine's batch and in its queues.
    max_running: how many requests the engine runs at once (``max_num_seqs``).
    service_s: mean seconds from a request's admission to its end, over recent requests; 0 when unknown.
    ttft_s: mean seconds to first token of recent requests that neither queued nor loaded; 0 when unknown.
    eviction_cost_s: expected seconds that making room for one more adapter costs later requests (0 with free room).
    """

    num_running: int = 0
    num_waiting: int = 0
    max_running: int = 1
    service_s: float = 0.0
    ttft_s: float = 0.0
    eviction_cost_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """What the router believes about one live replica at the moment of a decision (hints, not truth).

    tier: where it holds the request's adapter (``Tier.GPU`` for a base-model request).
    in_flight: requests that this router has sent there and that have not ended.
    report_in_flight: how many of this router's requests were in flight there when ``load`` was published.
    load: its last published load; None when nothing was ever published or it is too old to trust.
    """

    replica_id: str
    tier: Tier
    in_flight: int
    load: ReplicaLoad | None = None
    report_in_flight: int = 0
