"""How large a request is, which sizes queue together, and how many tokens each queue may hold (paper: Scheduler).

Three independent steps, each a pure function: ``weighted_size`` (WRS) -> ``cluster`` (K queues and their cut-offs) ->
``token_quotas``. The window of recent traffic that feeds them is in ``load_window.py``.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, inf
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from chameleon_ray.policy.adapter import Adapter
from chameleon_ray.policy.records import QueuedRequest

Floats = NDArray[np.float64]
_Number = TypeVar("_Number", float, Floats)

_MAX_BREAKS = 128
"""Places between two sizes that clustering considers: exact up to so many distinct sizes, else at quantiles."""


@dataclass(frozen=True, slots=True)
class SizingOptions:
    """Weights and maxima of the weighted request size.

    kv_token_bytes: KV-cache bytes of one token; turns adapter bytes into tokens. None where adapters take nothing of
    the KV cache.
    request_size: ``product`` is the paper's WRS, ``sum`` its degree-1 variant with three terms.
    adapter_weight: weight of the adapter term in ``sum`` (the product has none).
    max_input_tokens, max_output_tokens, max_adapter_bytes: None takes the largest in the window of recent requests.
    """

    kv_token_bytes: int | None
    input_weight: float = 0.4
    output_weight: float = 0.6
    adapter_weight: float = 0.5
    request_size: Literal["product", "sum"] = "product"
    max_input_tokens: int | None = None
    max_output_tokens: int | None = None
    max_adapter_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.kv_token_bytes is not None and self.kv_token_bytes <= 0:
            raise ValueError(f"kv_token_bytes is {self.kv_token_bytes}; give the KV-cache bytes of one token")
        if min(self.input_weight, self.output_weight, self.adapter_weight) < 0:
            raise ValueError("weights of the request size must not be negative")


@dataclass(frozen=True, slots=True)
class Scales:
    """What sizes are relative to.

    base_adapter_bytes: what a base-model request counts as. The product would make it 0, however long it runs, so it
        is sized as if it carried the smallest adapter seen: never above an adapter's request of the same lengths,
        and by its lengths among its like. Without any adapter in sight it is ``max_adapter_bytes`` (factor 1).
    """

    max_input_tokens: float = 1.0
    max_output_tokens: float = 1.0
    max_adapter_bytes: float = 1.0
    base_adapter_bytes: float = 1.0


def adapter_tokens(adapter: Adapter, options: SizingOptions) -> int:
    """An adapter's bytes as KV tokens."""
    return 0 if options.kv_token_bytes is None else ceil(adapter.size_bytes / options.kv_token_bytes)


def request_size(request: QueuedRequest, scales: Scales, options: SizingOptions) -> float:
    """WRS of one request; 1 for the largest in every respect, above 1 beyond the maxima."""
    adapter_bytes = float(request.adapter.size_bytes) if request.adapter else scales.base_adapter_bytes
    inputs, outputs = float(request.num_prompt_tokens), float(request.num_predicted_tokens)
    return weighted_size(inputs, outputs, adapter_bytes, scales, options)


def weighted_size(
    inputs: _Number, outputs: _Number, adapter_bytes: _Number, scales: Scales, options: SizingOptions
) -> _Number:
    """``(A*in/max_in + B*out/max_out) * bytes/max_bytes``, or the sum of three terms; floats or equal-shaped arrays."""
    tokens = options.input_weight / scales.max_input_tokens * inputs
    tokens = tokens + options.output_weight / scales.max_output_tokens * outputs
    adapter = adapter_bytes / scales.max_adapter_bytes
    return tokens * adapter if options.request_size == "product" else tokens + options.adapter_weight * adapter


@dataclass(frozen=True, slots=True)
class Clustering:
    """Sizes grouped into queues.

    centroids: mean size of each queue, ascending; empty without samples.
    cutoffs: midpoints between neighbouring centroids; a size equal to a cut-off belongs to the smaller queue.
    wcss_shares: for K = 1, 2, ...: the share of one queue's within-cluster sum of squares that K queues leave.
    """

    centroids: tuple[float, ...]
    cutoffs: tuple[float, ...]
    wcss_shares: tuple[float, ...]


def cluster(
    sizes: Sequence[float] | Floats,
    max_queues: int = 4,
    rule: Literal["elbow", "min_wcss"] = "elbow",
    elbow_gain: float = 0.5,
) -> Clustering:
    """One-dimensional K-means by dynamic programming: deterministic, and exact up to 128 distinct sizes.

    rule: ``elbow`` takes the smallest K after which one more queue removes less than ``elbow_gain`` of the WCSS that is
        left. Relative to what is left, a few huge requests get their queue and the many small ones still get theirs.
        ``min_wcss`` takes the K of least WCSS as the paper literally says (nearly always ``max_queues``).
    Raises ValueError for sizes that are negative or not finite.
    """
    points = np.sort(np.asarray(sizes, dtype=np.float64))
    if points.size and not (np.isfinite(points[-1]) and np.isfinite(points).all() and points[0] >= 0):
        raise ValueError("sizes must be finite and not negative")
    if points.size == 0:
        return Clustering((), (), ())
    low, spread = points[0], points[-1] - points[0]
    if spread == 0:
        return Clustering((float(low),), (), (0.0,))
    scaled = (points - low) / spread
    wcss, partitions = _partitions(scaled, max_queues)
    shares = tuple(value / wcss[0] for value in wcss)
    breaks = partitions[_choose_k(shares, rule, elbow_gain) - 1]
    centroids = tuple(float(low + spread * scaled[a:b].mean()) for a, b in pairwise(breaks))
    cutoffs = tuple(a / 2 + b / 2 for a, b in pairwise(centroids))
    return Clustering(centroids, cutoffs, shares)


def _choose_k(shares: Sequence[float], rule: str, elbow_gain: float) -> int:
    if rule == "min_wcss":
        return 1 + shares.index(min(shares))
    for k, (share, next_share) in enumerate(pairwise(shares), start=1):
        if share - next_share < elbow_gain * share or share == 0:
            return k
    return len(shares)


def _partitions(points: Floats, max_queues: int) -> tuple[list[float], list[list[int]]]:
    """WCSS and break indices ([0, ..., n]) of the best partition of sorted ``points`` for each K."""
    breaks = np.concatenate(([0], np.flatnonzero(np.diff(points)) + 1, [points.size]))
    if breaks.size - 1 > _MAX_BREAKS:
        # Evenly by rank among the samples, not among distinct values: dense regions get the finer grid.
        ranks = np.linspace(0, points.size, _MAX_BREAKS + 1)
        breaks = np.unique(breaks[np.searchsorted(breaks, ranks)])
    sums = np.concatenate(([0.0], np.cumsum(points)))[breaks]
    squares = np.concatenate(([0.0], np.cumsum(points**2)))[breaks]
    counts = breaks[None, :] - breaks[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = squares[None, :] - squares[:, None] - (sums[None, :] - sums[:, None]) ** 2 / counts
    cost = np.where(counts > 0, np.maximum(cost, 0.0), np.inf)

    best, choices = cost[0], []
    wcss, partitions = [float(best[-1])], [[0, int(breaks[-1])]]
    for _ in range(2, min(max_queues, breaks.size - 1) + 1):
        totals = best[:, None] + cost
        choices.append(totals.argmin(axis=0))
        best = totals.min(axis=0)
        path = [breaks.size - 1]
        for choice in reversed(choices):
            path.append(int(choice[path[-1]]))
        wcss.append(float(best[-1]))
        partitions.append([0, *(int(breaks[i]) for i in reversed(path))])
    return wcss, partitions


@dataclass(frozen=True, slots=True)
class QueueLoad:
    """Measured load of one queue: its largest request in tokens (S), expected duration (D), arrival rate (lambda).

    mean_request_tokens: its mean request, where known; nothing above S counts.
    """

    max_request_tokens: int
    duration_s: float
    arrivals_per_s: float
    mean_request_tokens: float = inf

    def minimum_tokens(self, slo_s: float) -> float:
        """The paper's ``tok_min``."""
        return self.max_request_tokens * self.duration_s * (1 / slo_s + self.arrivals_per_s)

    @property
    def tokens_in_flight(self) -> float:
        """Tokens that its requests hold at a time if none has to wait (Little's law)."""
        tokens = min(self.mean_request_tokens, self.max_request_tokens)
        return tokens * self.duration_s * self.arrivals_per_s


@dataclass(frozen=True, slots=True)
class Quotas:
    """Token quotas, one per queue, adding up to the total.

    minima: ``tok_min`` of each queue. scale: total over minima, at most 1; below 1 they cannot all be met.
    """

    tokens: tuple[int, ...]
    minima: tuple[float, ...]
    scale: float = 1.0


def token_quotas(total_tokens: int, loads: Sequence[QueueLoad], slo_s: float) -> Quotas:
    """Quotas from ``tok_min = S*D*(1/SLO + lambda)`` (an M/M/1 queue that holds the SLO); the rest in proportion.

    When the minima exceed the total, every queue gets what its requests hold on average, and of the rest a share in
    proportion to what it lacks to its minimum, so that every queue keeps up with its arrivals for as long as that is
    possible; only then is what arrives scaled down as well. By the formula alone, which counts every request as if it
    were the queue's largest, shares would go by how far that is from the mean.
    One bound the formula lacks: no quota is below the queue's largest request while the total has room for one of each
    queue; it could else only run on what other queues leave.
    Raises ValueError without queues or when ``total_tokens`` or ``slo_s`` is not positive.
    """
    if not loads or total_tokens <= 0 or slo_s <= 0:
        raise ValueError("quotas need at least one queue and a positive token total and SLO")
    minima = tuple(load.minimum_tokens(slo_s) for load in loads)
    arriving = [load.tokens_in_flight for load in loads]
    needed, lacking = sum(minima), sum(minima) - sum(arriving)
    kept = min(1.0, max(0.0, total_tokens - sum(arriving)) / lacking) if needed > total_tokens else 1.0
    weights = [work + kept * (minimum - work) for work, minimum in zip(arriving, minima, strict=True)]
    floors = [load.max_request_tokens for load in loads]
    shares = _shares(total_tokens, weights, floors if sum(floors) <= total_tokens else [0] * len(loads))
    tokens = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda queue: (tokens[queue] - shares[queue], queue))
    for queue in by_remainder[: total_tokens - sum(tokens)]:
        tokens[queue] += 1
    return Quotas(tuple(tokens), minima, min(1.0, total_tokens / needed) if needed else 1.0)


def _shares(total: int, weights: Sequence[float], floors: Sequence[int]) -> list[float]:
    """``total`` split by weight, no part below its floor."""
    at_floor: set[int] = set()
    while True:
        rest = total - sum(floors[queue] for queue in at_floor)
        weight = sum(weight for queue, weight in enumerate(weights) if queue not in at_floor)
        even = rest / max(1, len(weights) - len(at_floor))
        shares = [
            float(floors[queue]) if queue in at_floor else rest * weights[queue] / weight if weight else even
            for queue in range(len(weights))
        ]
        below = {queue for queue, share in enumerate(shares) if share < floors[queue]}
        if not below:
            return shares
        at_floor |= below


def queue_of(size: float, cutoffs: Sequence[float]) -> int:
    """Index of the queue for a request of that size."""
    return bisect_left(cutoffs, size)
