"""Queues and adapter cache at vLLM's own ``/metrics``, for servers without Ray, by the names of the replicas' metrics.

Inside a Ray Serve replica ``deployments/policy_metrics.py`` publishes the same figures: nothing is made there.
"""

from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics

from chameleon_ray.engine.report import PolicyReport
from chameleon_ray.policy import figures

SERIES = figures.declared(PolicyReport)


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
        self._metrics = {
            name: metric_types[Counter if series.is_total else Gauge](
                name, series.description, [*labelnames, *series.tag_keys]
            )
            for name, series in SERIES.items()
        }
        self._totals: dict[tuple[str, tuple[object, ...]], float] = {}
        self._gauges: dict[int, set[tuple[str, tuple[object, ...]]]] = {}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """transfer_stats_data: ``AdapterStats.data``. A gauge's series that it has no more, such as a queue's, ends."""
        if not transfer_stats_data:
            return
        shown = set()
        for sample in figures.samples(PolicyReport.of(transfer_stats_data)):
            tags = (sample.tags[key] for key in SERIES[sample.name].tag_keys)
            series = sample.name, (*self.per_engine_labelvalues[engine_idx], *tags)
            metric = self._metrics[sample.name].labels(*series[1])
            if sample.is_total:
                metric.inc(sample.value - self._totals.get(series, 0))
                self._totals[series] = sample.value
            else:
                metric.set(sample.value)
                shown.add(series)
        for name, labels in self._gauges.get(engine_idx, set()) - shown:
            self._metrics[name].remove(*labels)
        self._gauges[engine_idx] = shown


def _forget_earlier_engine() -> None:
    """Drop the metrics of an engine that this process had before, as vLLM does with its own: a name is taken once."""
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", None) in SERIES:
            REGISTRY.unregister(collector)
