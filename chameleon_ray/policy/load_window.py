"""Recent traffic of one replica: what scales, sizes, durations and arrival rates are measured from."""

from array import array
from collections.abc import Sequence

import numpy as np

from chameleon_ray.policy.records import QueuedRequest
from chameleon_ray.policy.sizing import Floats, QueueLoad, Scales, SizingOptions, weighted_size

_ROW_CELLS = 4
_SLO_DURATIONS = 5.0
"""The paper's SLO: five times the mean duration of a request."""
_PAUSE_GAPS = 20
"""A pause is longer than so many median gaps between arrivals: of a million gaps between Poisson arrivals, one is."""
_RATE_WEIGHT = 0.05
"""Weight of the latest request in the moving mean of seconds per output token."""


class _Rows:
    """The latest rows of (time or duration in s, prompt, predicted output, adapter bytes), in no particular order."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_added = 0
        # Every request adds a row, few steps read them: writing an array costs a fifth of writing a numpy row.
        self._cells = array("d", bytes(capacity * _ROW_CELLS * 8))

    def add(self, first: float, request: QueuedRequest) -> None:
        adapter_bytes = request.adapter.size_bytes if request.adapter else 0
        start = self.num_added % self.capacity * _ROW_CELLS
        row = (first, request.num_prompt_tokens, request.num_predicted_tokens, adapter_bytes)
        self._cells[start : start + _ROW_CELLS] = array("d", row)
        self.num_added += 1

    def values(self) -> Floats:
        """A view of shape [rows, 4]."""
        return np.frombuffer(self._cells).reshape(-1, _ROW_CELLS)[: self.num_added]


class LoadWindow:
    """The latest requests that arrived and that ended: the source of scales, sizes, D and lambda."""

    def __init__(self, options: SizingOptions, num_requests: int = 1024) -> None:
        self._options = options
        self._arrivals, self._ends = _Rows(num_requests), _Rows(num_requests)
        self.seconds_per_token: float | None = None
        """Moving mean of a request's duration per output token; None before the first end."""

    @property
    def capacity(self) -> int:
        """Requests that the window holds."""
        return self._arrivals.capacity

    @property
    def num_arrived(self) -> int:
        """Arrivals ever recorded."""
        return self._arrivals.num_added

    def arrived(self, request: QueuedRequest, now_s: float) -> None:
        """Record an arrival."""
        self._arrivals.add(now_s, request)

    def ended(self, request: QueuedRequest, duration_s: float, num_output_tokens: int) -> None:
        """Record a request that ran to its end, ``duration_s`` after its admission."""
        self._ends.add(duration_s, request)
        pace = duration_s / max(1, num_output_tokens)
        known = self.seconds_per_token
        self.seconds_per_token = pace if known is None else known + _RATE_WEIGHT * (pace - known)

    def scales(self) -> Scales:
        """Maxima from the options, else from the window."""
        recent = self._arrivals.values()
        inputs, outputs, adapter_bytes = (recent[:, column].max(initial=1.0) for column in (1, 2, 3))
        largest = float(self._options.max_adapter_bytes or adapter_bytes)
        with_adapter = recent[recent[:, 3] > 0, 3]
        return Scales(
            float(self._options.max_input_tokens or inputs),
            float(self._options.max_output_tokens or outputs),
            largest,
            float(with_adapter.min()) if with_adapter.size else largest,
        )

    def sizes(self, scales: Scales) -> Floats:
        """WRS of the arrivals in the window, in no particular order."""
        return self._sizes(self._arrivals.values(), scales)

    def loads(self, cutoffs: Sequence[float], scales: Scales, now_s: float) -> tuple[QueueLoad, ...]:
        """S, D, lambda and the mean request of each queue that ``cutoffs`` make.

        D is the overall mean where no request has ended.
        """
        recent, ends = self._arrivals.values(), self._ends.values()
        queues = np.searchsorted(cutoffs, self._sizes(recent, scales))
        end_queues = np.searchsorted(cutoffs, self._sizes(ends, scales))
        tokens = recent[:, 1] + recent[:, 2]
        if self._options.kv_token_bytes is not None:
            tokens = tokens + np.ceil(recent[:, 3] / self._options.kv_token_bytes)
        span_s = _span_s(recent[:, 0], now_s, self.slo_s())
        loads = []
        for queue in range(len(cutoffs) + 1):
            durations = ends[end_queues == queue, 0]
            members = tokens[queues == queue]
            duration_s = float(durations.mean()) if durations.size else self.mean_duration_s()
            mean_tokens = float(members.mean()) if members.size else 1.0
            loads.append(QueueLoad(int(members.max(initial=1.0)), duration_s, members.size / span_s, mean_tokens))
        return tuple(loads)

    def mean_duration_s(self) -> float:
        """Mean seconds from admission to end over the window; 1 before any request ended."""
        ends = self._ends.values()
        return max(1e-9, float(ends[:, 0].mean())) if len(ends) else 1.0

    def slo_s(self) -> float:
        """The SLO when the operator sets none: five mean durations."""
        return _SLO_DURATIONS * self.mean_duration_s()

    def _sizes(self, rows: Floats, scales: Scales) -> Floats:
        adapter_bytes = np.where(rows[:, 3] > 0, rows[:, 3], scales.base_adapter_bytes)
        return weighted_size(rows[:, 1], rows[:, 2], adapter_bytes, scales, self._options)


def _span_s(arrivals_s: Floats, now_s: float, slo_s: float) -> float:
    """Seconds since the first arrival, of each pause in the traffic but so much as may be chance, or as the SLO is.

    Quotas are for the rate while requests come. With its pauses, on-and-off traffic would look like little traffic, and
    when there is little, large requests get more than their share of the work.
    """
    gaps_s = np.diff(np.append(np.sort(arrivals_s), now_s))
    if gaps_s.size:
        gaps_s = np.minimum(gaps_s, max(slo_s, _PAUSE_GAPS * float(np.median(gaps_s))))
    # A burst within one second says little about a rate: count it as one second's worth.
    return max(1.0, float(gaps_s.sum()))
