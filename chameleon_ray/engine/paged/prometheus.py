"""Queues and adapter cache at vLLM's own ``/metrics``, for servers without Ray, by the names of the replicas' metrics.

Inside a Ray Serve replica ``deployments/policy_metrics.py`` publishes the same figures and more: nothing is made there.
"""

from collections.abc import Callable
from math import isinf
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics

Report = dict[str, Any]

TOTALS: dict[str, tuple[str, Callable[[Report], int]]] = {
    "chameleon_admissions": ("Requests that began to run.", lambda r: r["queues"]["num_admissions"]),
    "chameleon_bypasses": ("Requests that went before an older one.", lambda r: r["queues"]["num_bypasses"]),
    "chameleon_squashes": ("Requests stopped again for it.", lambda r: r["queues"]["num_squashes"]),
    "chameleon_queue_refreshes": ("Times queues were measured anew.", lambda r: r["queues"]["num_refreshes"]),
    "chameleon_adapter_hits": ("Requests whose adapter was resident.", lambda r: r["cache"]["hits"]),
    "chameleon_adapter_misses": ("Requests whose adapter was not.", lambda r: r["cache"]["misses"]),
}
"""Name (Prometheus adds ``_total``) -> description, and the lifetime total in a report (``AdapterStats.data``)."""
QUEUE_GAUGES = {
    "chameleon_queue_cutoff": "Largest request size of the queue; 0: the last one, without bound.",
    "chameleon_queue_quota_tokens": "Tokens that the queue may lend.",
    "chameleon_queue_max_running": "Requests of the queue that may run at once.",
}
UNLIMITED = 1 << 53
"""Quotas and seats from here on mean that there is no limit: they are shown as 0."""


class PolicyPrometheus(KVConnectorPromMetrics):
    """See the module's head; vLLM calls ``observe`` with every report."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        _forget_earlier_engine()
        counter, gauge = metric_types[Counter], metric_types[Gauge]
        self._counters = {name: counter(name, text, labelnames) for name, (text, _) in TOTALS.items()}
        self._gauges = {name: gauge(name, text, [*labelnames, "queue"]) for name, text in QUEUE_GAUGES.items()}
        self._seen: dict[tuple[int, str], int] = {}
        self._num_queues: dict[int, int] = {}

    def observe(self, transfer_stats_data: Report, engine_idx: int = 0) -> None:
        report, labels = transfer_stats_data, self.per_engine_labelvalues[engine_idx]
        if "queues" not in report:
            return
        for name, (_, total_of) in TOTALS.items():
            total = total_of(report)
            self._counters[name].labels(*labels).inc(total - self._seen.get((engine_idx, name), 0))
            self._seen[engine_idx, name] = total
        queues = report["queues"]["queues"]
        for number, queue in enumerate(queues):
            values = (queue["max_size"], queue["quota_tokens"], queue["max_running"])
            for gauge, value in zip(self._gauges.values(), values, strict=True):
                gauge.labels(*labels, number).set(0 if isinf(value) or value >= UNLIMITED else value)
        for number in range(len(queues), self._num_queues.get(engine_idx, 0)):
            for gauge in self._gauges.values():
                gauge.remove(*labels, number)
        self._num_queues[engine_idx] = len(queues)


def _forget_earlier_engine() -> None:
    """Drop the metrics of an engine that this process had before, as vLLM does with its own: a name is taken once."""
    ours = {*TOTALS, *QUEUE_GAUGES}
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", None) in ours:
            REGISTRY.unregister(collector)
