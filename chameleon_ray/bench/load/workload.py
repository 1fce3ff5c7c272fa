"""Which requests are sent when, by name: arrivals and popularity as in the simulator, lengths drawn from a set."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chameleon_ray.bench.load.errors import LoadError
from chameleon_ray.bench.load.lengths import Lengths
from chameleon_ray.policy.sizing import Scales, SizingOptions, weighted_size
from chameleon_ray.sim.workload import Popularity, poisson_arrivals, popularity_shares

Ranks = Mapping[str, int | None]

SIZE_CLASSES = ("small", "medium", "large")
CLASS_SAMPLE = 10_000


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request to send. at_s: seconds after the window's start. rank: None for the base model or when unknown."""

    at_s: float
    model: str
    rank: int | None
    size_class: str
    num_prompt_tokens: int
    num_output_tokens: int


def adapter_shares(ranks: Ranks, among_ranks: Popularity, within_rank: Popularity, exponent: float) -> dict[str, float]:
    """Each model's share of the requests: popularity of its rank times its popularity within the rank.

    Power law: the i-th has weight ``i ** -exponent``; ranks in ascending order, models of a rank in the order given.
    The paper's set-up: ranks uniform, a power law within each (evaluation set-up).
    """
    groups: dict[int, list[str]] = {}
    for model, rank in ranks.items():
        groups.setdefault(rank or 0, []).append(model)
    if not groups:
        raise LoadError("there is no model to send requests to")
    shares = {}
    rank_weights = popularity_shares(len(groups), among_ranks, exponent)
    for (_, models), rank_weight in zip(sorted(groups.items()), rank_weights, strict=True):
        for model, weight in zip(models, popularity_shares(len(models), within_rank, exponent), strict=True):
            shares[model] = float(rank_weight * weight)
    return shares


class Workload:
    """Seeded requests. The same seed and window number give the same requests at every rate, only closer together."""

    def __init__(self, lengths: Lengths, ranks: Ranks, shares: Mapping[str, float], seed: int):
        self._lengths = lengths
        self._models = list(shares)
        self._ranks = [ranks[model] for model in self._models]
        self._shares = np.array([shares[model] for model in self._models])
        self._seed = seed
        known = [rank for rank in self._ranks if rank]
        self._rank_sizes = np.array([float(rank or min(known, default=1)) for rank in self._ranks])
        self._options = SizingOptions(kv_token_bytes=1)  # sizes are relative: the unit of adapters does not matter
        self._scales = Scales(
            float(lengths.num_prompt_tokens.max()), float(lengths.num_output_tokens.max()), float(max(known, default=1))
        )
        sizes = self._sizes(*self._draw(np.random.default_rng([seed, 0]), CLASS_SAMPLE))
        self._cutoffs = np.quantile(sizes, [1 / 3, 2 / 3])

    def poisson(self, window: int, rate_per_s: float, duration_s: float) -> list[PlannedRequest]:
        """Requests of one window of time, by arrival; none when the first would come after its end."""
        rng = np.random.default_rng([self._seed, 1, window])
        times: list[float] = poisson_arrivals(rate_per_s, duration_s, rng).tolist()
        return self._requests(np.random.default_rng([self._seed, 2, window]), times)

    def one_by_one(self, count: int) -> list[PlannedRequest]:
        """Requests for an unloaded system: all due at once, to be sent each after the one before."""
        return self._requests(np.random.default_rng([self._seed, 3]), [0.0] * count)

    def _draw(self, rng: np.random.Generator, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Positions of lengths and of models. One request takes the same numbers whatever ``count`` is."""
        uniform = rng.random((count, 2))
        rows = (uniform[:, 0] * len(self._lengths.num_prompt_tokens)).astype(np.int64)
        models = np.searchsorted(np.cumsum(self._shares), uniform[:, 1], side="right")
        return rows, np.minimum(models, len(self._models) - 1)

    def _sizes(self, rows: NDArray[np.int64], models: NDArray[np.int64]) -> NDArray[np.float64]:
        """The paper's WRS, true output length instead of a prediction, ranks instead of bytes."""
        return weighted_size(
            self._lengths.num_prompt_tokens[rows].astype(np.float64),
            self._lengths.num_output_tokens[rows].astype(np.float64),
            self._rank_sizes[models],
            self._scales,
            self._options,
        )

    def _requests(self, rng: np.random.Generator, times_s: list[float]) -> list[PlannedRequest]:
        rows, models = self._draw(rng, len(times_s))
        classes = np.searchsorted(self._cutoffs, self._sizes(rows, models), side="left")
        return [
            PlannedRequest(
                at_s,
                self._models[model],
                self._ranks[model],
                SIZE_CLASSES[size_class],
                int(self._lengths.num_prompt_tokens[row]),
                int(self._lengths.num_output_tokens[row]),
            )
            for at_s, row, model, size_class in zip(times_s, rows, models, classes, strict=True)
        ]
