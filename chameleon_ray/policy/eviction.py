"""Which idle adapters leave first: what is remembered of their use, and the scores built on it.

``UseHistory`` keeps one row per known adapter in numpy columns, so that scoring a few hundred candidates costs a few
tens of microseconds. A score says how much an adapter is worth keeping: the lowest leaves first, ties go by digest.

Policies by name (``POLICIES``):

- ``chameleon``: ``F*frequency + R*recency + S*size``, by default 0.45, 0.10, 0.45 (Chameleon, MICRO 2025, adapter
  cache). Each term is min-max normalised to [0, 1] over the candidates at hand; a term on which all of them agree (so
  also with a single candidate) is 0 for all. A large adapter costs more to load again, so size protects.
- ``fairshare``: the same with three equal weights.
- ``lru``: the least recently used first.
- ``gdsf``: greedy dual size frequency (Cherkasova 1998): ``clock + uses since load / blocks``, the clock as it stood at
  the last use; each eviction raises the clock to the score that left, so that old popularity fades.
- ``discard``: no cache, as in S-LoRA: adapters leave as soon as no request wants them (least recently used first where
  memory is short before that).
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_NUM_BUCKETS = 30
_FIRST_CAPACITY = 64


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of the ``chameleon`` score."""

    frequency: float = 0.45
    recency: float = 0.10
    size: float = 0.45


PAPER_WEIGHTS = Weights()
"""F, R and S of the paper."""


class UseHistory:
    """How often, how recently and at which size each adapter was used; rows are handed out by ``add``.

    Frequency is the number of uses in a sliding window, counted in 30 buckets of ``window_s / 30`` seconds: it covers
    between 29/30 of the window and all of it, and needs no memory per use. A time before the latest one seen counts
    as the latest one.
    """

    def __init__(self, window_s: float) -> None:
        self._bucket_s = window_s / _NUM_BUCKETS
        self._bucket: int | None = None
        self._sorted_digests: list[str] = []
        self._free_rows: list[int] = list(range(_FIRST_CAPACITY - 1, -1, -1))
        self._counts: Ints = np.zeros((_FIRST_CAPACITY, _NUM_BUCKETS), np.int64)
        self._totals: Ints = np.zeros(_FIRST_CAPACITY, np.int64)
        self._digest_order: Ints = np.full(_FIRST_CAPACITY, -1, np.int64)
        self.last_used_s: Floats = np.zeros(_FIRST_CAPACITY)
        self.size_bytes: Floats = np.zeros(_FIRST_CAPACITY)
        self.num_blocks: Floats = np.ones(_FIRST_CAPACITY)
        self._clock = 0.0
        self._clock_at_use: Floats = np.zeros(_FIRST_CAPACITY)
        self._uses_since_load: Floats = np.zeros(_FIRST_CAPACITY)

    def add(self, digest: str, size_bytes: int, num_blocks: int) -> int:
        """A row for an adapter without any use so far."""
        if not self._free_rows:
            self._grow()
        row = self._free_rows.pop()
        position = bisect_left(self._sorted_digests, digest)
        self._sorted_digests.insert(position, digest)
        self._digest_order[self._digest_order >= position] += 1
        self._digest_order[row] = position
        self.size_bytes[row] = size_bytes
        self.num_blocks[row] = num_blocks
        return row

    def remove(self, row: int) -> None:
        """Forget a row; its number is handed out again."""
        position = int(self._digest_order[row])
        del self._sorted_digests[position]
        self._digest_order[self._digest_order > position] -= 1
        self._digest_order[row] = -1
        for column in (self._totals, self.last_used_s, self._clock_at_use, self._uses_since_load):
            column[row] = 0
        self._counts[row] = 0
        self._free_rows.append(row)

    def used(self, row: int, now_s: float) -> None:
        """A request asked for the adapter."""
        bucket = self._advance(now_s)
        self._counts[row, bucket % _NUM_BUCKETS] += 1
        self._totals[row] += 1
        self._uses_since_load[row] += 1
        self._clock_at_use[row] = self._clock
        self.touched(row, now_s)

    def touched(self, row: int, now_s: float) -> None:
        """The adapter is in use at ``now_s``: recency moves, frequency does not."""
        if now_s > self.last_used_s[row]:
            self.last_used_s[row] = now_s

    def loaded(self, row: int, now_s: float) -> None:
        """The adapter entered the cache, for at least one use."""
        self._uses_since_load[row] = max(1.0, self._uses_since_load[row])
        self._clock_at_use[row] = self._clock
        self.touched(row, now_s)

    def evicted(self, row: int) -> None:
        """The adapter left the cache: the greedy-dual clock rises to its score, and its uses start again at 0."""
        self._clock = max(self._clock, float(self.greedy_dual(np.array([row]))[0]))
        self._uses_since_load[row] = 0

    def frequency(self, rows: Ints, now_s: float) -> Floats:
        """Uses of each row within the window that ends at ``now_s``."""
        totals = self._totals[rows]
        if self._bucket is not None and (passed := int(now_s // self._bucket_s) - self._bucket) > 0:
            expired = (self._bucket + 1 + np.arange(min(passed, _NUM_BUCKETS))) % _NUM_BUCKETS
            totals = totals - self._counts[rows[:, None], expired].sum(axis=1)
        return totals.astype(np.float64)

    def greedy_dual(self, rows: Ints) -> Floats:
        """The GDSF priority of each row."""
        return self._clock_at_use[rows] + self._uses_since_load[rows] / self.num_blocks[rows]

    def order(self, rows: Sequence[int], scorer: "Scorer", now_s: float) -> list[int]:
        """Positions in ``rows``, the one to evict first in front."""
        if not rows:
            return []
        array = np.array(rows, np.int64)
        positions: list[int] = np.lexsort((self._digest_order[array], scorer(self, array, now_s))).tolist()
        return positions

    def _advance(self, now_s: float) -> int:
        bucket = int(now_s // self._bucket_s)
        if self._bucket is None:
            self._bucket = bucket
        passed = bucket - self._bucket
        if passed > 0:
            for step in range(min(passed, _NUM_BUCKETS)):
                column = (self._bucket + 1 + step) % _NUM_BUCKETS
                self._totals -= self._counts[:, column]
                self._counts[:, column] = 0
            self._bucket = bucket
        return self._bucket

    def _grow(self) -> None:
        capacity = len(self._totals)
        self._counts = np.vstack([self._counts, np.zeros((capacity, _NUM_BUCKETS), np.int64)])
        self._totals = np.concatenate([self._totals, np.zeros(capacity, np.int64)])
        self._digest_order = np.concatenate([self._digest_order, np.full(capacity, -1, np.int64)])
        self.last_used_s = np.concatenate([self.last_used_s, np.zeros(capacity)])
        self.size_bytes = np.concatenate([self.size_bytes, np.zeros(capacity)])
        self.num_blocks = np.concatenate([self.num_blocks, np.ones(capacity)])
        self._clock_at_use = np.concatenate([self._clock_at_use, np.zeros(capacity)])
        self._uses_since_load = np.concatenate([self._uses_since_load, np.zeros(capacity)])
        self._free_rows.extend(range(2 * capacity - 1, capacity - 1, -1))


Scorer = Callable[[UseHistory, Ints, float], Floats]
"""Scores of some rows at a time in seconds: lowest leaves first."""


def _normalised(values: Floats) -> Floats:
    low = values.min()
    span = values.max() - low
    return (values - low) / span if span > 0 else np.zeros(len(values))


def _weighted(weights: Weights, history: UseHistory, rows: Ints, now_s: float) -> Floats:
    return (
        weights.frequency * _normalised(history.frequency(rows, now_s))
        + weights.recency * _normalised(history.last_used_s[rows])
        + weights.size * _normalised(history.size_bytes[rows])
    )


def _least_recently_used(history: UseHistory, rows: Ints, now_s: float) -> Floats:
    return history.last_used_s[rows]


def _greedy_dual_size_frequency(history: UseHistory, rows: Ints, now_s: float) -> Floats:
    return history.greedy_dual(rows)


@dataclass(frozen=True, slots=True)
class EvictionPolicy:
    """How idle adapters are ordered, and whether they are kept at all.

    scorer: made from the configured weights. keeps_idle: False for ``discard``.
    """

    scorer: Callable[[Weights], Scorer]
    keeps_idle: bool = True


POLICIES: dict[str, EvictionPolicy] = {
    "chameleon": EvictionPolicy(lambda weights: partial(_weighted, weights)),
    "fairshare": EvictionPolicy(lambda _: partial(_weighted, Weights(1 / 3, 1 / 3, 1 / 3))),
    "lru": EvictionPolicy(lambda _: _least_recently_used),
    "gdsf": EvictionPolicy(lambda _: _greedy_dual_size_frequency),
    "discard": EvictionPolicy(lambda _: _least_recently_used, keeps_idle=False),
}
