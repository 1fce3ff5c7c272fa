"""Which replica should serve a request: ranking by expected time to first token (TTFT).

The rules, in order:

1. A replica's expected TTFT is prefill + queueing delay + loading the adapter from the tier the replica holds it at +
   the cost of evicting something for it, if it has to load and has no room (`_Cluster.expected_s`, `_load_times_s`).
2. Every adapter has an order of preference over the replicas: higher tier first, then rendezvous order
   (`rendezvous_weight`). Its first place is stable, so requests for an adapter meet at one replica.
3. The first choice is the most preferred replica among those that are nearly as good as the best: within the share
   `LoadCosts.hysteresis`, or within `MIN_GAIN_S`. An adapter so spreads to its second place when waiting at the first
   costs clearly more than loading at the second, and comes back when that ends.

Nothing is remembered between decisions: routers in several processes agree as far as their hints do, and small
differences between the hints stay inside the hysteresis. One decision takes time linear in the number of replicas
given: of a large cluster, ``shortlist.py`` says which are worth giving.
"""

import hashlib
import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from chameleon_ray.policy.adapter import Adapter, Tier

Reason = Literal["resident", "host", "cold", "overload", "no_hint", "base"]
"""Why the first choice was made.

resident, host: it holds the adapter in GPU or host memory.
cold: nobody does (nobody nearly as good); it is the adapter's home.
overload: a replica that holds the adapter at a higher tier, or its home, would have answered clearly later.
no_hint: nothing is known of any replica; chosen by this router's own requests in flight, the adapter's home first.
base: the request is for the base model.
"""

MIN_GAIN_S = 0.005
"""A difference in expected TTFT below this never moves an adapter."""

NUM_RANKED = 8
"""How many replicas a decision names: enough alternatives when some are full or have just died."""

_SMOOTHING = 0.1

UNKNOWN_TTFT_S = 0.05
UNKNOWN_SERVICE_S = 1.0
UNKNOWN_MAX_RUNNING = 16.0
"""Stand-ins while no replica has reported the real value; they set how soon a router without hints leaves a home."""


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """A replica's own account of its load, as it publishes it with every heartbeat.

    num_running, num_waiting: requests in the engine's batch and in its queues.
    max_running: how many requests the engine runs at once (``max_num_seqs``).
    service_s: mean seconds from a request's admission to its end, over recent requests; 0 when unknown.
    ttft_s: mean seconds to first token of recent requests that neither queued nor loaded; 0 when unknown.
    eviction_cost_s: expected seconds that making room for one more adapter costs later requests (0 with free room).
    kv_used_share: share of the KV pool that running requests and the adapters they use hold; what can be evicted at
        once (idle adapters, cached prefixes) is free. 0 when unknown.

    Raises ValueError for a value that is negative or not finite, or a ``max_running`` below 1.
    """

    num_running: int = 0
    num_waiting: int = 0
    max_running: int = 1
    service_s: float = 0.0
    ttft_s: float = 0.0
    eviction_cost_s: float = 0.0
    kv_used_share: float = 0.0

    def __post_init__(self) -> None:
        # Every replica of a simulated cluster reports every second: look at the names only when something is wrong.
        times_s = (self.service_s, self.ttft_s, self.eviction_cost_s)
        values = (self.num_running, self.num_waiting, self.kv_used_share, *times_s)
        if min(values) >= 0 and self.max_running >= 1 and math.isfinite(sum(values) + self.max_running):
            return
        for field in fields(self):
            lowest = 1 if field.name == "max_running" else 0
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


@dataclass(frozen=True, slots=True)
class LoadCosts:
    """What loading an adapter is assumed to cost, and what a move must gain.

    host_bytes_s, disk_bytes_s, source_bytes_s: bandwidth host to GPU, disk to host, source to disk, in bytes/s.
    overhead_s: fixed cost of any load.
    hysteresis: an adapter leaves its preferred replica only if that one is worse than the best by more than this share.

    Raises ValueError for a bandwidth that is not positive, or a negative overhead or hysteresis.
    """

    host_bytes_s: float
    disk_bytes_s: float
    source_bytes_s: float
    overhead_s: float
    hysteresis: float

    def __post_init__(self) -> None:
        for name in ("host_bytes_s", "disk_bytes_s", "source_bytes_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}: a bandwidth is positive")
        for name in ("overhead_s", "hysteresis"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it cannot be negative")


@dataclass(frozen=True, slots=True)
class Decision:
    """Where to send a request, best first.

    replica_ids: up to NUM_RANKED replicas; the rest is for when all of these refuse.
    reason: why the first is first.
    tier: where the first holds the adapter, as far as the router knows (``Tier.GPU`` for the base model).
    expected_ttft_s: what was expected of the first; relative to its alternatives it means more than in seconds.
    """

    replica_ids: tuple[str, ...]
    reason: Reason
    tier: Tier
    expected_ttft_s: float


def rank_replicas(
    adapter: Adapter | None,
    replicas: Sequence[ReplicaView],
    costs: LoadCosts,
    request_key: str = "",
    num_ranked: int = NUM_RANKED,
) -> Decision:
    """The replicas for one request, best first, by the rules at the top of this file.

    adapter: what the request needs; None for the base model, which goes to the least expected TTFT.
    request_key: anything that differs between requests; rotates base-model requests over equally good replicas.
    num_ranked: how many replicas the decision names; the fewer, the less there is to put in order.

    The order of ``replicas`` does not matter. Raises ValueError when there is none.
    """
    if not replicas:
        raise ValueError("no replica to choose from: wait for one to come up before routing")
    cluster = _Cluster.of(replicas)
    if adapter is None:
        return _rank_for_base(replicas, cluster, request_key, num_ranked)
    # Without any hint a load costs the same everywhere: counting it would only blunt the balance by load.
    load_times_s = _load_times_s(adapter, costs) if cluster.has_hints else (0.0,) * len(Tier)
    expected_s = cluster.expected_s(replicas, load_times_s)
    best_s = min(expected_s)
    bound_s = max(best_s * (1 + costs.hysteresis), best_s + MIN_GAIN_S)
    good = [view for view, ttft_s in zip(replicas, expected_s, strict=True) if ttft_s <= bound_s]
    preference = _preference(adapter)
    ranked = _most_preferred(num_ranked, good, preference)
    first = ranked[0]
    worse: list[_Expected] = []
    if first.tier is not Tier.GPU or len(ranked) < num_ranked:
        worse = [item for item in zip(expected_s, replicas, strict=True) if item[0] > bound_s]
    if len(ranked) < num_ranked:
        ranked += _soonest(num_ranked - len(ranked), worse, adapter.digest)
    return Decision(
        replica_ids=tuple([view.replica_id for view in ranked]),
        reason=_reason(first, [view for _, view in worse], preference) if cluster.has_hints else "no_hint",
        tier=first.tier,
        expected_ttft_s=next(ttft_s for ttft_s, view in zip(expected_s, replicas, strict=True) if view is first),
    )


def rendezvous_weight(key: str, replica_id: str) -> int:
    """The 64-bit weight of a replica for a key; the highest weight is the key's home (highest random weight hashing).

    Adding a replica moves only the keys whose home it becomes, one in the new number of replicas; removing one moves
    only its own. Source: Thaler and Ravishankar, "Using name-based mappings to increase hit rates", 1998.
    """
    digest = hashlib.blake2b(f"{key}\0{replica_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


_Expected = tuple[float, ReplicaView]
"""A replica with the TTFT expected of it, in seconds."""


@dataclass(frozen=True, slots=True)
class _Cluster:
    """What the replicas' reports say taken together: means over those that reported a value, else the stand-ins.

    The prefill time of a request depends on the request, not on what a replica happened to serve before it: so one
    ``ttft_s`` counts for all replicas.
    """

    has_hints: bool
    ttft_s: float
    service_s: float
    max_running: float

    @staticmethod
    def of(replicas: Iterable[ReplicaView]) -> "_Cluster":
        ttfts_s, services_s, seats = [], [], []
        for view in replicas:
            if (load := view.load) is not None:
                seats.append(load.max_running)
                if load.ttft_s > 0:
                    ttfts_s.append(load.ttft_s)
                if load.service_s > 0:
                    services_s.append(load.service_s)
        return _Cluster(
            has_hints=bool(seats) or any(view.tier > Tier.ABSENT for view in replicas),
            ttft_s=_mean(ttfts_s, UNKNOWN_TTFT_S),
            service_s=_mean(services_s, UNKNOWN_SERVICE_S),
            max_running=_mean(seats, UNKNOWN_MAX_RUNNING),
        )

    def expected_s(self, replicas: Iterable[ReplicaView], load_times_s: Sequence[float] = ()) -> list[float]:
        """The expected TTFT of each replica: the delay from other requests there, which grows with each of them, and,
        with ``load_times_s`` by tier, the adapter's load and what is evicted for it.

        n: requests there, as last reported, and those that this router has sent since. m: requests that run at once.
        Up to m, requests share the steps that do the prefill: delay = ttft * n / m. Beyond, a request waits until
        n - m + 1 others have ended, of which m end per service time: another service * (n - m + 1) / m. An engine can
        be full before m requests run (out of KV blocks): those it reports as waiting count as that excess at least.
        """
        ttft_s, mean_service_s, mean_running = self.ttft_s, self.service_s, self.max_running
        expected_s = []
        for view in replicas:
            load = view.load
            if load is None:
                num_requests, num_waiting = view.in_flight, 0
                max_running, service_s = mean_running, mean_service_s
            else:
                num_requests = load.num_running + (num_waiting := load.num_waiting)
                if (sent_since := view.in_flight - view.report_in_flight) > 0:
                    num_requests += sent_since
                max_running, service_s = load.max_running, load.service_s or mean_service_s
            delay_s = ttft_s * num_requests / max_running if num_requests < max_running else ttft_s
            num_excess = num_requests - max_running + 1
            if num_excess < num_waiting:
                num_excess = num_waiting
            if num_excess > 0:
                delay_s += service_s * num_excess / max_running
            if load_times_s:
                delay_s += load_times_s[view.tier]
                if load is not None and view.tier is not Tier.GPU:
                    delay_s += load.eviction_cost_s
            expected_s.append(ttft_s + delay_s)
        return expected_s


def _mean(values: Sequence[float], otherwise: float) -> float:
    return math.fsum(values) / len(values) if values else otherwise


def _load_times_s(adapter: Adapter, costs: LoadCosts) -> tuple[float, ...]:
    """Seconds to get the adapter into GPU memory, indexed by the tier that holds it; a load passes every tier above."""
    host_s = costs.overhead_s + adapter.size_bytes / costs.host_bytes_s
    disk_s = host_s + adapter.size_bytes / costs.disk_bytes_s
    absent_s = disk_s + adapter.size_bytes / costs.source_bytes_s
    return absent_s, disk_s, host_s, 0.0


def _preference(adapter: Adapter) -> Callable[[ReplicaView], tuple[int, int, str]]:
    """The sort key of an adapter's order of preference over replicas."""
    return lambda view: (-view.tier, -rendezvous_weight(adapter.digest, view.replica_id), view.replica_id)


def _most_preferred(
    count: int, replicas: Iterable[ReplicaView], preference: Callable[[ReplicaView], tuple[int, int, str]]
) -> list[ReplicaView]:
    """As sorting by ``preference`` would have it; without the weights of tiers that are not reached."""
    by_tier: dict[Tier, list[ReplicaView]] = {}
    for view in replicas:
        by_tier.setdefault(view.tier, []).append(view)
    ranked: list[ReplicaView] = []
    for tier in sorted(by_tier, reverse=True):
        views = by_tier[tier]
        if len(views) == 1 and len(ranked) < count:
            ranked += views
        elif len(ranked) < count:
            ranked += heapq.nsmallest(count - len(ranked), views, key=preference)
    return ranked


def _soonest(count: int, expected: Iterable[_Expected], tie_key: str) -> list[ReplicaView]:
    def order(item: _Expected) -> tuple[float, int, str]:
        return item[0], -rendezvous_weight(tie_key, item[1].replica_id), item[1].replica_id

    return [view for _, view in heapq.nsmallest(count, expected, key=order)]


def _rank_for_base(replicas: Sequence[ReplicaView], cluster: _Cluster, request_key: str, num_ranked: int) -> Decision:
    expected = list(zip(cluster.expected_s(replicas), replicas, strict=True))
    ranked = _soonest(num_ranked, expected, request_key)
    return Decision(
        replica_ids=tuple([view.replica_id for view in ranked]),
        reason="base",
        tier=Tier.GPU,
        expected_ttft_s=min([ttft_s for ttft_s, _ in expected]),
    )


def _reason(
    first: ReplicaView, worse: Iterable[ReplicaView], preference: Callable[[ReplicaView], tuple[int, int, str]]
) -> Reason:
    """Why ``first`` is first, of an adapter that some replica reports on. ``worse``: those that hysteresis let go."""
    if first.tier == Tier.GPU:
        return "resident"
    if any(view.tier > first.tier for view in worse):
        return "overload"
    if first.tier == Tier.HOST:
        return "host"
    place = preference(first)
    return "overload" if any(preference(view) < place for view in worse) else "cold"
