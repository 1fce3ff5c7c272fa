"""How long an output will be: the predictor interface, and a predictor that learns from served traffic."""

from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from chameleon_ray.policy.figures import level

LENGTH_BUCKETS = (16, 64, 256, 1024, 4096)
"""Upper bounds (inclusive) of the output-length classes that predictions are judged by; above the last: one more."""

PREDICTED_TOKENS = "chameleon_predicted_tokens"
"""Key in vLLM's ``SamplingParams.extra_args``: the output tokens predicted for a request, an int."""

_MIN_OBSERVATIONS = 4
"""A group of requests is trusted from so many ends on; below, the next wider group answers."""


@dataclass(frozen=True, slots=True)
class LengthFeatures:
    """What is known of a request before it runs.

    adapter_digest: None for the base model.
    max_tokens: the client's limit on the output; None when it set none.
    true_output_tokens: only a simulation knows it, and only its oracle (``sim/oracle.py``) reads it.
    prompt_text: None where it is not known; only predictors that read prompts (``predictor/proxy.py``) use it.
    """

    adapter_digest: str | None
    num_prompt_tokens: int
    max_tokens: int | None = None
    true_output_tokens: int | None = None
    prompt_text: str | None = None


class LengthPredictor(Protocol):
    """Predicts output lengths and learns from ends."""

    def predict(self, features: LengthFeatures) -> int:
        """Expected output tokens, at least 1 and at most what the request may produce. Changes nothing it learned."""

    def observe(self, features: LengthFeatures, num_output_tokens: int) -> None:
        """Learn that a request with these features ended on its own after ``num_output_tokens``."""


def length_bucket(num_tokens: int, buckets: Sequence[int] = LENGTH_BUCKETS) -> int:
    """Index of the class that an output length falls in."""
    return bisect_left(buckets, num_tokens)


@dataclass(frozen=True, slots=True)
class AccuracySnapshot:
    """Accuracy over the latest ends, as numbers to publish. Shares and errors are None before the first end.

    mean_error_tokens: signed; above 0: predictions are too long.
    """

    num_requests: int
    right_bucket_share: float | None = field(
        metadata=level(
            "chameleon_length_accuracy",
            "Share of the latest output lengths that were predicted in the right length class.",
        )
    )
    mean_absolute_error_tokens: float | None = field(
        metadata=level("chameleon_length_error_tokens", "Mean absolute error of these predictions.")
    )
    mean_error_tokens: float | None


class PredictionAccuracy:
    """Accuracy over the latest ends, as a live metric. Recording and reading cost the same however long the window."""

    def __init__(self, num_requests: int = 1000) -> None:
        if num_requests < 1:
            raise ValueError(f"num_requests is {num_requests}; the window holds at least 1")
        self._outcomes: deque[tuple[bool, int]] = deque(maxlen=num_requests)
        self._num_right = 0
        self._sum_absolute = 0
        self._sum_signed = 0

    def record(self, num_predicted_tokens: int, num_output_tokens: int) -> None:
        """Compare one prediction with what came of it."""
        if len(self._outcomes) == self._outcomes.maxlen:
            self._count(*self._outcomes[0], sign=-1)
        right = length_bucket(num_predicted_tokens) == length_bucket(num_output_tokens)
        self._outcomes.append((right, num_predicted_tokens - num_output_tokens))
        self._count(*self._outcomes[-1], sign=1)

    def snapshot(self) -> AccuracySnapshot:
        """The figures of this moment."""
        n = len(self._outcomes)
        return AccuracySnapshot(
            num_requests=n,
            right_bucket_share=self._num_right / n if n else None,
            mean_absolute_error_tokens=self._sum_absolute / n if n else None,
            mean_error_tokens=self._sum_signed / n if n else None,
        )

    def _count(self, right: bool, error: int, sign: int) -> None:
        self._num_right += sign * right
        self._sum_absolute += sign * abs(error)
        self._sum_signed += sign * error


class HistoryPredictor:
    """Predicts the median output of like requests served recently; needs no model.

    Like requests are those of the same adapter and prompt-length class (powers of two), else of the same adapter, else
    of the same prompt-length class, else all. Each group keeps its latest ``num_recent`` ends, so it follows drift; of
    the groups, the ``max_groups`` last observed are kept.
    """

    def __init__(
        self, max_model_len: int, default_tokens: int = 128, max_groups: int = 4096, num_recent: int = 32
    ) -> None:
        if min(max_model_len, default_tokens) < 1 or min(max_groups, num_recent) < _MIN_OBSERVATIONS:
            raise ValueError(
                "max_model_len and default_tokens must be at least 1, "
                f"max_groups and num_recent at least {_MIN_OBSERVATIONS}"
            )
        self._max_model_len = max_model_len
        self._default_tokens = default_tokens
        self._max_groups = max_groups
        self._num_recent = num_recent
        self._groups: OrderedDict[Hashable, deque[int]] = OrderedDict()

    @property
    def num_groups(self) -> int:
        """Groups of requests remembered."""
        return len(self._groups)

    def predict(self, features: LengthFeatures) -> int:
        """See ``LengthPredictor.predict``; ``default_tokens`` before anything like it was served."""
        for key in _group_keys(features):
            recent = self._groups.get(key)
            if recent is not None and len(recent) >= _MIN_OBSERVATIONS:
                return capped(sorted(recent)[len(recent) // 2], features, self._max_model_len)
        return capped(self._default_tokens, features, self._max_model_len)

    def observe(self, features: LengthFeatures, num_output_tokens: int) -> None:
        """See ``LengthPredictor.observe``."""
        groups = self._groups
        for key in reversed(_group_keys(features)):
            if (recent := groups.get(key)) is None:
                recent = groups[key] = deque(maxlen=self._num_recent)
            else:
                groups.move_to_end(key)
            recent.append(num_output_tokens)
        while len(groups) > self._max_groups:
            groups.popitem(last=False)

    def forget(self, adapter_digest: str) -> None:
        """Drop what was learned of one adapter's requests alone."""
        self._groups.pop(("adapter", adapter_digest), None)
        for prompt_class in range(self._max_model_len.bit_length() + 1):
            self._groups.pop(("both", adapter_digest, prompt_class), None)


def _group_keys(features: LengthFeatures) -> tuple[Hashable, ...]:
    """Groups that a request belongs to, narrowest first."""
    prompt_class = features.num_prompt_tokens.bit_length()
    digest = features.adapter_digest
    return (("both", digest, prompt_class), ("adapter", digest), ("prompt", prompt_class), ("all",))


def output_limit(features: LengthFeatures, max_model_len: int) -> int:
    """The most tokens that a request may produce; at least 1."""
    room = max(1, max_model_len - features.num_prompt_tokens)
    return room if features.max_tokens is None else max(1, min(room, features.max_tokens))


def capped(num_tokens: int, features: LengthFeatures, max_model_len: int) -> int:
    """A predicted length within what the request may produce."""
    return max(1, min(num_tokens, output_limit(features, max_model_len)))
