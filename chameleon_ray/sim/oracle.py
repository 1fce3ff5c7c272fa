"""A length predictor that knows the truth, and is told how often to say it."""

from itertools import pairwise
from random import Random

from chameleon_ray.predictor.lengths import LENGTH_BUCKETS, LengthFeatures, capped, length_bucket, output_limit


class OraclePredictor:
    """Knows the truth and tells it with a set probability; otherwise answers from a wrong length class.

    accuracy: share of predictions in the right class. rng: the caller's, so that runs repeat.
    """

    def __init__(self, accuracy: float, rng: Random, max_model_len: int) -> None:
        if not 0 <= accuracy <= 1:
            raise ValueError(f"accuracy is {accuracy}; give a share from 0 to 1")
        self._accuracy = accuracy
        self._rng = rng
        self._max_model_len = max_model_len

    def predict(self, features: LengthFeatures) -> int:
        """See ``LengthPredictor.predict``. Draws from ``rng`` once or twice; always right where only one class can be.

        Raises ValueError for features without ``true_output_tokens``.
        """
        if features.true_output_tokens is None:
            raise ValueError("the oracle needs true_output_tokens; outside a simulation use HistoryPredictor")
        truth = capped(features.true_output_tokens, features, self._max_model_len)
        classes = _class_lengths(output_limit(features, self._max_model_len))
        wrong = [length for length in classes if length_bucket(length) != length_bucket(truth)]
        if self._rng.random() < self._accuracy or not wrong:
            return truth
        return self._rng.choice(wrong)

    def observe(self, features: LengthFeatures, num_output_tokens: int) -> None:
        """Nothing: the oracle has nothing to learn."""


def _class_lengths(limit: int) -> list[int]:
    """A typical length (the middle) of each class that a request of at most ``limit`` tokens can end in."""
    bounds = [0, *(bound for bound in LENGTH_BUCKETS if bound < limit), limit]
    return [max(1, (low + 1 + high) // 2) for low, high in pairwise(bounds)]
