"""In which order ``chameleon`` takes requests of all queues: by arrival, moved by a boost for small work.

``order = arrival + gain * mean wait * ln(tokens / typical tokens)``: a small request is treated as if it had come a
little earlier, a large one a little later (Nudge, Grosof et al., SIGMETRICS 2021; gamma-Boost, Yu and Scully, 2024).
The logarithm is bounded, so nobody is ever moved by more than ``MAX_LOG * gain`` mean waits; without waiting, the order
is that of arrival.
"""

from math import exp, log

GAIN = 0.3
MAX_LOG = 4.0
_WAIT_WEIGHT = 0.02
_SIZE_WEIGHT = 0.01


class BoostedOrder:
    """The order of requests, from running means over recent traffic."""

    def __init__(self) -> None:
        self.mean_wait_s = 0.0
        self._mean_log: float | None = None

    @property
    def typical_tokens(self) -> float:
        """Geometric mean of recent requests' tokens; 1 before the first request."""
        return 1.0 if self._mean_log is None else exp(self._mean_log)

    def arrived(self, num_tokens: int) -> None:
        """A request of so many tokens (prompt, predicted output, adapter) has come."""
        size = log(max(1, num_tokens))
        self._mean_log = size if self._mean_log is None else self._mean_log + _SIZE_WEIGHT * (size - self._mean_log)

    def admitted(self, waited_s: float) -> None:
        """A request runs after so long a wait."""
        self.mean_wait_s += _WAIT_WEIGHT * (waited_s - self.mean_wait_s)

    def boosted_s(self, arrival_s: float, num_tokens: int) -> float:
        """The time by which a request is ordered, in seconds on the clock of ``arrival_s``."""
        size = log(max(1, num_tokens)) - (self._mean_log or 0.0)
        return arrival_s + GAIN * self.mean_wait_s * min(MAX_LOG, max(-MAX_LOG, size))
