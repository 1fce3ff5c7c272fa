"""Which replica should serve a request: ranking by expected time to first token (TTFT).

The rules, in order:

1. A replica's expected TTFT is prefill + what others there cost (``replica_table.py``) + loading the adapter from the
   tier the replica holds it at + the cost of evicting something for it, if it has to load and has no room.
2. Every adapter has an order of preference over the replicas: higher tier first, then rendezvous order
   (``rendezvous_weight``). Its first place is stable, so requests for an adapter meet at one replica.
3. The first choice is the most preferred replica among those that are nearly as good as the best: within the share
   ``LoadCosts.hysteresis``, or within ``MIN_GAIN_S``. An adapter so spreads to its second place when waiting at the
   first costs clearly more than loading at the second, and comes back when that ends.

Nothing is remembered between decisions: routers in several processes agree as far as their hints do, and small
differences between the hints stay inside the hysteresis.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from chameleon_ray.policy.adapter import Adapter, Tier
from chameleon_ray.routing.replica_table import Floats, ReplicaTable, Rows, Tiers, Weights

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


@dataclass(frozen=True, slots=True)
class LoadCosts:
    """What loading an adapter is assumed to cost, and what a move must gain.

    host_load_bytes_s, disk_load_bytes_s, source_load_bytes_s: bytes/s from host to GPU, disk to
        host, source to disk.
    load_overhead_s: fixed cost of any load.
    hysteresis: an adapter leaves its preferred replica only if that one is worse than the best by more than this share.

    Raises ValueError for a bandwidth that is not positive, or a negative overhead or hysteresis.
    """

    host_load_bytes_s: float
    disk_load_bytes_s: float
    source_load_bytes_s: float
    load_overhead_s: float
    hysteresis: float

    def __post_init__(self) -> None:
        for name in ("host_load_bytes_s", "disk_load_bytes_s", "source_load_bytes_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}: a bandwidth is positive")
        for name in ("load_overhead_s", "hysteresis"):
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
    table: ReplicaTable,
    holders: Mapping[str, Tier],
    costs: LoadCosts,
    request_key: str = "",
) -> Decision:
    """The replicas for one request, best first, by the rules at the top of this file.

    adapter: what the request needs; None for the base model, which goes to the least expected TTFT.
    holders: where the adapter is, as far as known, by replica id; of any replicas, alive or not.
    request_key: anything that differs between requests; rotates base-model requests over equally good replicas.

    Raises ValueError when the table is empty.
    """
    if not table.ids:
        raise ValueError("no replica to choose from: wait for one to come up before routing")
    expected_s = table.ttft_s + table.waiting_s()
    if adapter is None:
        rows = _soonest(NUM_RANKED, expected_s, table.weights(request_key))
        return _decision(table, rows, "base", Tier.GPU, expected_s)
    tiers = table.tiers(holders)
    has_hints = table.is_reported or bool(tiers.any())
    if has_hints:  # without any hint a load costs the same everywhere: counting it would only blunt the balance by load
        expected_s += np.array(_load_times_s(adapter, costs))[tiers]
        expected_s += table.eviction_costs_s() * (tiers != Tier.GPU)
    best_s = float(expected_s.min())
    is_good = expected_s <= max(best_s * (1 + costs.hysteresis), best_s + MIN_GAIN_S)
    weights = table.weights(adapter.digest)
    preference = _preference(tiers, weights)
    good, worse = is_good.nonzero()[0], (~is_good).nonzero()[0]
    rows = good[_highest(NUM_RANKED, preference[good])].tolist()
    if (missing := NUM_RANKED - len(rows)) > 0:
        rows += worse[_soonest(missing, expected_s[worse], weights[worse])].tolist()
    first = rows[0]
    reason: Reason = _reason(first, worse, tiers, preference) if has_hints else "no_hint"
    return _decision(table, rows, reason, Tier(int(tiers[first])), expected_s)


def _decision(table: ReplicaTable, rows: list[int], reason: Reason, tier: Tier, expected_s: Floats) -> Decision:
    return Decision(tuple([table.ids[row] for row in rows]), reason, tier, float(expected_s[rows[0]]))


def _load_times_s(adapter: Adapter, costs: LoadCosts) -> tuple[float, ...]:
    """Seconds to get the adapter into GPU memory, indexed by the tier that holds it; a load passes every tier above."""
    host_s = costs.load_overhead_s + adapter.size_bytes / costs.host_load_bytes_s
    disk_s = host_s + adapter.size_bytes / costs.disk_load_bytes_s
    absent_s = disk_s + adapter.size_bytes / costs.source_load_bytes_s
    return absent_s, disk_s, host_s, 0.0


def _preference(tiers: Tiers, weights: Weights) -> Weights:
    """An adapter's order of preference over replicas, the highest first: the tier, then the rendezvous weight."""
    return (tiers.astype(np.uint64) << np.uint64(62)) | (weights >> np.uint64(2))


def _highest(count: int, values: Weights) -> Rows:
    """Indices of the ``count`` highest values, the highest first."""
    if len(values) > count:
        chosen = np.argpartition(values, -count)[-count:]
        return chosen[np.argsort(values[chosen])[::-1]]
    return np.argsort(values)[::-1]


def _soonest(count: int, expected_s: Floats, weights: Weights) -> list[int]:
    """Indices of the ``count`` least expected TTFTs, the least first; of equal ones the higher weight first."""
    rows = np.arange(len(expected_s))
    if len(rows) > count:
        rows = (expected_s <= np.partition(expected_s, count - 1)[count - 1]).nonzero()[0]
    order: list[int] = rows[np.lexsort((~weights[rows], expected_s[rows]))][:count].tolist()
    return order


def _reason(first: int, worse: Rows, tiers: Tiers, preference: Weights) -> Reason:
    """Why ``first`` is first, of an adapter that some replica reports on. worse: those that hysteresis let go."""
    if tiers[first] == Tier.GPU:
        return "resident"
    if (tiers[worse] > tiers[first]).any():
        return "overload"
    if tiers[first] == Tier.HOST:
        return "host"
    return "overload" if (preference[worse] > preference[first]).any() else "cold"
