"""Which adapters will be asked for next: a histogram of inter-arrival times per adapter.

The rule is the hybrid histogram policy of "Serverless in the Wild" (Shahrad et al., ATC 2020, section 4.2), in seconds
instead of minutes. Each gap between two requests of an adapter falls into a geometric bin. An adapter is *due* from 0.9
times the 5th percentile of its gaps until 1.1 times the 99th percentile after its last request: before, loading it
would only hold memory; after, the request is no longer expected. No prediction is made while the histogram says
little: fewer than 10 gaps, more than half of them longer than the histogram's range, or bin counts spread too evenly
(coefficient of variation under 2).
"""

import math

import numpy as np

from chameleon_ray.policy.eviction import Floats, Ints

_NUM_BINS = 40
_SHORTEST_S = 0.05
_GROWTH = 1.35
_EDGES_S: Floats = np.geomspace(_SHORTEST_S, _SHORTEST_S * _GROWTH ** (_NUM_BINS - 1), _NUM_BINS)
"""Upper edges of the bins, 0.05 s to about 1.7 hours; the last one is followed by an overflow bin."""
_MIN_GAPS = 10
_MIN_VARIATION = 2.0
_NEVER = math.nan


class ArrivalHistogram:
    """Gaps between requests, one row per adapter (``UseHistory``'s rows), and what they predict."""

    def __init__(self) -> None:
        self._gaps: Ints = np.zeros((0, _NUM_BINS + 1), np.int64)
        self._last_arrival_s: Floats = np.zeros(0)
        self._head_s: Floats = np.zeros(0)
        self._median_s: Floats = np.zeros(0)
        self._tail_s: Floats = np.zeros(0)

    def arrived(self, row: int, now_s: float) -> None:
        """A request for the row's adapter arrived."""
        while row >= len(self._last_arrival_s):
            self._grow()
        gap_s = now_s - self._last_arrival_s[row]
        if not math.isnan(gap_s):
            self._gaps[row, np.searchsorted(_EDGES_S, gap_s)] += 1
            self._head_s[row], self._median_s[row], self._tail_s[row] = _window(self._gaps[row])
        self._last_arrival_s[row] = now_s

    def remove(self, row: int) -> None:
        """Forget the row."""
        if row < len(self._last_arrival_s):
            self._gaps[row] = 0
            for column in (self._last_arrival_s, self._head_s, self._median_s, self._tail_s):
                column[row] = _NEVER

    def due(self, now_s: float) -> list[tuple[float, int]]:
        """(expected arrival in seconds, row) of each adapter that may be asked for soon, soonest first."""
        elapsed_s = now_s - self._last_arrival_s
        rows = np.flatnonzero((elapsed_s >= self._head_s) & (elapsed_s <= self._tail_s))
        expected_s = self._last_arrival_s[rows] + self._median_s[rows]
        return sorted(zip(expected_s.tolist(), rows.tolist(), strict=True))

    def _grow(self) -> None:
        more = max(64, len(self._last_arrival_s))
        self._gaps = np.vstack([self._gaps, np.zeros((more, _NUM_BINS + 1), np.int64)])
        self._last_arrival_s = np.concatenate([self._last_arrival_s, np.full(more, _NEVER)])
        self._head_s = np.concatenate([self._head_s, np.full(more, _NEVER)])
        self._median_s = np.concatenate([self._median_s, np.full(more, _NEVER)])
        self._tail_s = np.concatenate([self._tail_s, np.full(more, _NEVER)])


def _window(gaps: Ints) -> tuple[float, float, float]:
    """(start, middle, end) in seconds after the last request, all NaN where the gaps predict nothing."""
    within = gaps[:_NUM_BINS]
    num_gaps = int(within.sum())
    if num_gaps < _MIN_GAPS or gaps[_NUM_BINS] > num_gaps or within.std() < _MIN_VARIATION * within.mean():
        return _NEVER, _NEVER, _NEVER
    cumulative = within.cumsum()
    head, middle, tail = (int(np.searchsorted(cumulative, share * num_gaps)) for share in (0.05, 0.5, 0.99))
    start_s = 0.9 * float(_EDGES_S[head]) / _GROWTH if head else 0.0
    return start_s, float(_EDGES_S[middle]), 1.1 * float(_EDGES_S[tail])
