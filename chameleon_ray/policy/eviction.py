"""Which idle adapters leave first: what is remembered of their use, and the scores built on it.

A score says how much an adapter is worth keeping: the lowest leaves first, ties go by digest.

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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from chameleon_ray.policy.records import CacheEntry

Floats = npt.NDArray[np.float64]

_NUM_BUCKETS = 30


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of the ``chameleon`` score."""

    frequency: float = 0.45
    recency: float = 0.10
    size: float = 0.45


PAPER_WEIGHTS = Weights()
"""F, R and S of the paper."""


class UseHistory:
    """How often and how recently each adapter was used, kept in its record.

    Frequency is the number of uses in a sliding window, counted in 30 buckets of ``window_s / 30`` seconds: it covers
    between 29/30 of the window and all of it, and needs no memory per use. A time before the latest one seen counts
    as the latest one.
    """

    def __init__(self, window_s: float) -> None:
        self._bucket_s = window_s / _NUM_BUCKETS
        self._bucket = 0
        self._clock = 0.0

    def used(self, entry: CacheEntry, now_s: float) -> None:
        """A request asked for the adapter."""
        self._bucket = self._latest_bucket(now_s)
        counts = entry.use_counts
        while counts and counts[0][0] <= self._bucket - _NUM_BUCKETS:
            entry.num_uses -= counts.popleft()[1]
        before = counts.pop()[1] if counts and counts[-1][0] == self._bucket else 0
        counts.append((self._bucket, before + 1))
        entry.num_uses += 1
        entry.uses_since_load += 1
        entry.clock_at_use = self._clock
        self.touched(entry, now_s)

    def touched(self, entry: CacheEntry, now_s: float) -> None:
        """The adapter is in use at ``now_s``: recency moves, frequency does not."""
        entry.last_used_s = max(entry.last_used_s, now_s)

    def loaded(self, entry: CacheEntry, now_s: float) -> None:
        """The adapter entered the cache, for at least one use."""
        entry.uses_since_load = max(1, entry.uses_since_load)
        entry.clock_at_use = self._clock
        self.touched(entry, now_s)

    def evicted(self, entry: CacheEntry) -> None:
        """The adapter left the cache: the greedy-dual clock rises to its score, and its uses start again at 0."""
        self._clock = max(self._clock, greedy_dual(entry))
        entry.uses_since_load = 0

    def frequencies(self, entries: Sequence[CacheEntry], now_s: float) -> list[int]:
        """Uses of each adapter within the window that ends at ``now_s``."""
        first = self._latest_bucket(now_s) - _NUM_BUCKETS + 1
        return [
            entry.num_uses if not entry.use_counts or entry.use_counts[0][0] >= first else _uses_since(entry, first)
            for entry in entries
        ]

    def order(self, entries: Sequence[CacheEntry], scorer: "Scorer", now_s: float) -> list[CacheEntry]:
        """The adapters, the one to evict first in front."""
        if not entries:
            return []
        scores = scorer(self, entries, now_s).tolist()
        return [entry for _, _, entry in sorted(zip(scores, (entry.digest for entry in entries), entries, strict=True))]

    def _latest_bucket(self, now_s: float) -> int:
        return max(self._bucket, int(now_s // self._bucket_s))


Scorer = Callable[[UseHistory, Sequence[CacheEntry], float], Floats]
"""Scores of some adapters at a time in seconds: lowest leaves first."""


def _uses_since(entry: CacheEntry, first_bucket: int) -> int:
    return sum(uses for bucket, uses in entry.use_counts if bucket >= first_bucket)


def greedy_dual(entry: CacheEntry) -> float:
    """The GDSF priority."""
    return entry.clock_at_use + entry.uses_since_load / entry.num_blocks


def _normalised(values: list[float] | list[int]) -> Floats:
    array = np.array(values, np.float64)
    low = array.min()
    span = array.max() - low
    return (array - low) / span if span > 0 else np.zeros(len(array))


def _weighted(weights: Weights, history: UseHistory, entries: Sequence[CacheEntry], now_s: float) -> Floats:
    return (
        weights.frequency * _normalised(history.frequencies(entries, now_s))
        + weights.recency * _normalised([entry.last_used_s for entry in entries])
        + weights.size * _normalised([entry.adapter.size_bytes for entry in entries])
    )


def _least_recently_used(history: UseHistory, entries: Sequence[CacheEntry], now_s: float) -> Floats:
    return np.array([entry.last_used_s for entry in entries])


def _greedy_dual_size_frequency(history: UseHistory, entries: Sequence[CacheEntry], now_s: float) -> Floats:
    return np.array([greedy_dual(entry) for entry in entries])


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
