"""What tells scheduling policies apart: how recent traffic becomes queues, and which rules of ``queues.py`` apply."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from chameleon_ray.policy.load_window import LoadWindow
from chameleon_ray.policy.ordering import GAINS, MAX_AGE_SLOS
from chameleon_ray.policy.sizing import QueueLoad, Scales, SizingOptions, cluster, token_quotas

UNLIMITED = 1 << 62
_MIN_SAMPLES = 32
"""Requests seen before their sizes are split into several queues."""
_STATIC_QUEUES = 4


@dataclass(frozen=True, slots=True)
class QueueOptions:
    """What an operator may set.

    total_tokens: tokens that running requests may hold together (KV cache plus adapters, in tokens).
    max_num_seqs: requests that the engine runs at once, its seats; None: tokens alone limit.
    scheduler_slo_s: None takes five mean durations.
    scheduler_refresh_s: the paper's T_refresh; see rule 7 of ``queues``.
    max_overtakes: how often capacity may let younger requests pass one (rule 6).
    max_squash_share: bypasses are allowed as long as squashing them all would stay within this share of admissions.
    priority_s: seconds of seniority that one level of client priority is worth.
    """

    total_tokens: int
    sizing: SizingOptions
    max_num_seqs: int | None = None
    scheduler_max_queues: int = 4
    k_rule: Literal["elbow", "min_wcss"] = "elbow"
    scheduler_slo_s: float | None = None
    scheduler_refresh_s: float = 300.0
    max_overtakes: int = 32
    max_squash_share: float = 0.05
    priority_s: float = 1.0

    def __post_init__(self) -> None:
        if self.total_tokens < _STATIC_QUEUES:
            raise ValueError(f"total_tokens is {self.total_tokens}: give the tokens that the KV cache holds")
        if min(self.scheduler_max_queues, self.max_overtakes, self.max_num_seqs or 1) < 1:
            raise ValueError("scheduler_max_queues, max_overtakes and max_num_seqs must be at least 1")
        if self.scheduler_refresh_s <= 0 or (self.scheduler_slo_s is not None and self.scheduler_slo_s <= 0):
            raise ValueError("scheduler_refresh_s and scheduler_slo_s must be positive")


@dataclass(frozen=True, slots=True)
class Layout:
    """Queues in force.

    cutoffs: sizes between them. quotas: tokens that each may lend. seats: requests of each that may run.
    minima_scale: how far infeasible minima were scaled (1: feasible). max_age_s: see ``ordering.py``.
    """

    cutoffs: tuple[float, ...]
    quotas: tuple[int, ...]
    seats: tuple[int, ...]
    minima_scale: float = 1.0
    max_age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Discipline:
    """One scheduling policy.

    layout: queues from recent traffic. shortest_first: order inside a queue by size instead of seniority.
    bypass: rule 5 applies. boosted: rule 8 instead of rule 3.
    """

    layout: Callable[[LoadWindow, Scales, QueueOptions, float], Layout]
    shortest_first: bool = False
    bypass: bool = False
    boosted: bool = False


def _measured_queues(window: LoadWindow, scales: Scales, options: QueueOptions, now_s: float) -> Layout:
    cutoffs, loads = _cutoffs_and_loads(window, scales, options, now_s)
    slo_s = options.scheduler_slo_s or window.slo_s()
    quotas = token_quotas(options.total_tokens, loads, slo_s)
    seats = (UNLIMITED,) * len(loads)
    if options.max_num_seqs is not None:
        # Where seats run out before tokens, the smallest queue would take every seat that comes free. The quota formula
        # in seats instead of tokens, D*(1/SLO + lambda), gives each queue what it needs of them.
        by_seat = [replace(load, max_request_tokens=1) for load in loads]
        seats = tuple(max(1, share) for share in token_quotas(options.max_num_seqs, by_seat, slo_s).tokens)
    return Layout(cutoffs, quotas.tokens, seats, quotas.scale)


def _cutoffs_and_loads(
    window: LoadWindow, scales: Scales, options: QueueOptions, now_s: float
) -> tuple[tuple[float, ...], tuple[QueueLoad, ...]]:
    """As many queues as clustering finds and as have room for their largest request each, all at once.

    A queue with less could run that request only by holding up all others (rule 6 of ``queues.py``).
    """
    max_queues = options.scheduler_max_queues if window.num_arrived >= _MIN_SAMPLES else 1
    sizes = window.sizes(scales)
    while max_queues > 1:
        cutoffs = cluster(sizes, max_queues, options.k_rule).cutoffs
        loads = window.loads(cutoffs, scales, now_s)
        if sum(load.max_request_tokens for load in loads) <= options.total_tokens:
            return cutoffs, loads
        max_queues = len(cutoffs)
    return (), window.loads((), scales, now_s)


def _thirds(window: LoadWindow, scales: Scales, options: QueueOptions, now_s: float) -> Layout:
    """Classes of equally many recent requests each; fewer where sizes are equal."""
    cutoffs: tuple[float, ...] = ()
    if window.num_arrived >= _MIN_SAMPLES:
        shares = [number / len(GAINS) for number in range(1, len(GAINS))]
        cutoffs = tuple(np.unique(np.quantile(window.sizes(scales), shares)).tolist())
    unlimited = (UNLIMITED,) * (len(cutoffs) + 1)
    return Layout(cutoffs, unlimited, unlimited, max_age_s=MAX_AGE_SLOS * (options.scheduler_slo_s or window.slo_s()))


def _one_queue(window: LoadWindow, scales: Scales, options: QueueOptions, now_s: float) -> Layout:
    return Layout((), (UNLIMITED,), (UNLIMITED,))


def _equal_queues(window: LoadWindow, scales: Scales, options: QueueOptions, now_s: float) -> Layout:
    cutoffs = tuple(queue / _STATIC_QUEUES for queue in range(1, _STATIC_QUEUES))
    seats = UNLIMITED if options.max_num_seqs is None else max(1, options.max_num_seqs // _STATIC_QUEUES)
    return Layout(cutoffs, (options.total_tokens // _STATIC_QUEUES,) * _STATIC_QUEUES, (seats,) * _STATIC_QUEUES)


DISCIPLINES = {
    "chameleon": Discipline(_thirds, bypass=True, boosted=True),
    "paper": Discipline(_measured_queues, bypass=True),
    "fifo": Discipline(_one_queue),
    "sjf": Discipline(_one_queue, shortest_first=True),
    "static": Discipline(_equal_queues, bypass=True),
}
"""``chameleon``: classes measured, without quotas, in one order. ``paper``: queues and quotas measured.
``static``: four queues of equal width in size and equal quota.
``fifo``, ``sjf``: one queue, limited by memory alone. SJF goes by predicted size, and does starve large requests."""
