"""Fits cost models to measurements: non-negative least squares of relative errors."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from chameleon_ray.sim.costs import FitError, StepCosts

_ROUNDS = 50
_ROOFLINE_GAIN = 0.98
"""A bend is believed only if it lowers the error by more than this: two roofs fit noise better than one."""
_LEAST_S_PER_BYTE = 1e-11
"""Where time does not grow with the bytes at all, 100 GB/s are assumed."""

Floats = npt.NDArray[np.float64]


class FitFailed(ValueError):
    """There is too little to fit; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Composition:
    """What an engine step computes: the arguments of ``StepCosts.seconds``."""

    tokens: int
    context_tokens: int
    token_ranks: int
    adapter_bytes: int
    requests: int
    attended_tokens: float


@dataclass(frozen=True, slots=True)
class StepPoint(Composition):
    """One kind of engine step and how long it takes.

    fastest_s: of all such steps measured; seconds: their median. count: how many there were.
    """

    seconds: float
    fastest_s: float
    count: int = 1


def nnls(matrix: Floats, target: Floats) -> Floats:
    """The x >= 0 that minimises ``|matrix @ x - target|`` (Lawson and Hanson's active sets)."""
    scales = np.linalg.norm(matrix, axis=0)
    columns = matrix / np.where(scales > 0, scales, 1.0)
    x = np.zeros(matrix.shape[1])
    free = np.zeros(matrix.shape[1], bool)
    tolerance = 1e-10 * max(1.0, float(np.linalg.norm(target)))
    for _ in range(10 * matrix.shape[1]):
        pull = np.where(free, -np.inf, columns.T @ (target - columns @ x))
        if pull.max() <= tolerance:
            break
        free[pull.argmax()] = True
        while True:
            trial = np.zeros_like(x)
            trial[free] = np.linalg.lstsq(columns[:, free], target, rcond=None)[0]
            negative = free & (trial <= 0)
            if not negative.any():
                break
            step = np.min(x[negative] / (x[negative] - trial[negative]))
            x = x + step * (trial - x)
            free &= x > 1e-14
            x[~free] = 0.0
        x = trial
    fitted: Floats = x / np.where(scales > 0, scales, 1.0)
    return fitted


def fit_step(points: Sequence[StepPoint]) -> tuple[StepCosts, FitError]:
    """The step costs that fit best, and their error. Raises FitFailed.

    Which steps lie under which roof of the formula (reading, arithmetic) is not known beforehand: starting from several
    guesses, fit and assign in turn until nothing changes, and keep the best.
    """
    tokens = np.array([point.tokens for point in points], float)
    if len(points) < 8 or len(set(tokens)) < 3:
        raise FitFailed(
            f"{len(points)} kinds of step with {len(set(tokens))} numbers of tokens: that fits no cost model"
        )
    best = _fit_under(points, np.zeros(len(points), bool))
    for bound in np.unique(np.quantile(tokens, (0.2, 0.35, 0.5, 0.65, 0.8))):
        reading = tokens <= bound
        for _ in range(_ROUNDS):
            costs = _fit_under(points, reading)
            if _root_mean_square(costs, points) + 1e-6 < _ROOFLINE_GAIN * _root_mean_square(best, points):
                best = costs
            assigned = np.array([_reads(costs, point) for point in points])
            if (assigned == reading).all():
                break
            reading = assigned
    return best, fit_error(best, points)


def fit_error(costs: StepCosts, points: Sequence[StepPoint]) -> FitError:
    """Distances of the costs from the points, as shares of the measured seconds."""
    errors = _errors(costs, points)
    return FitError(
        points=len(points),
        mean=float(errors.mean()),
        p90=float(np.quantile(errors, 0.9)),
        worst=float(errors.max()),
    )


def fit_transfer(measured: Iterable[tuple[int, float]]) -> tuple[float, float]:
    """(bytes/s, fixed seconds) of transfers, measured as (bytes, seconds). Raises FitFailed."""
    pairs = [(float(num_bytes), max(seconds, 1e-9)) for num_bytes, seconds in measured]
    sizes = {num_bytes for num_bytes, _ in pairs}
    if len(sizes) < 2:
        raise FitFailed(f"transfers of {len(sizes)} size(s): a bandwidth needs adapters of two sizes at least")
    num_bytes, seconds = np.array(pairs).T
    per_byte, fixed = nnls(np.stack([num_bytes, np.ones(len(pairs))], 1) / seconds[:, None], np.ones(len(pairs)))
    return float(1 / max(per_byte, _LEAST_S_PER_BYTE)), float(fixed)


def step_seconds(costs: StepCosts, point: StepPoint) -> float:
    """What the costs say of the point."""
    return costs.seconds(
        point.tokens,
        point.context_tokens,
        point.token_ranks,
        point.adapter_bytes,
        point.requests,
        point.attended_tokens,
    )


def _fit_under(points: Sequence[StepPoint], reading: npt.NDArray[np.bool_]) -> StepCosts:
    """reading: which points lie under the roof of reading; the others under that of arithmetic."""
    rows = [
        (
            1.0,
            point.requests,
            point.attended_tokens,
            point.token_ranks,
            point.adapter_bytes,
            float(reads),
            point.context_tokens * reads,
            point.tokens * (not reads),
        )
        for point, reads in zip(points, reading, strict=True)
    ]
    seconds = np.array([point.seconds for point in points])
    x = nnls(np.array(rows, float) / seconds[:, None], np.ones(len(points))).tolist()
    names = ("overhead_s", "request_s", "attention_s", "token_rank_s", "adapter_read_s")
    common = dict(zip(names, x, strict=False))
    return StepCosts(**common, weights_read_s=x[5], kv_read_s=x[6], token_s=x[7])


def _reads(costs: StepCosts, point: StepPoint) -> bool:
    return costs.weights_read_s + costs.kv_read_s * point.context_tokens > costs.token_s * point.tokens


def _errors(costs: StepCosts, points: Sequence[StepPoint]) -> Floats:
    return np.array([abs(step_seconds(costs, point) / point.seconds - 1) for point in points])


def _root_mean_square(costs: StepCosts, points: Sequence[StepPoint]) -> float:
    return float((_errors(costs, points) ** 2).mean() ** 0.5)
