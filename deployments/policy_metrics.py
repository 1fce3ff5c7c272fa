"""What a replica's engine reports of its policy, as metrics."""

from collections import Counter
from collections.abc import Mapping

from chameleon_ray import metrics
from chameleon_ray.engine.report import PolicyEvents, PolicyReport
from chameleon_ray.metrics import MAX_QUEUES, RunningTotals
from chameleon_ray.policy import figures
from chameleon_ray.policy.adapter import Tier
from deployments.engine import EngineReports

_TIERS = (Tier.GPU, Tier.HOST, Tier.DISK)


class PolicyMetrics:
    """One replica's; ``publish`` with every heartbeat: Ray shows a gauge only for a while after it was set."""

    def __init__(self) -> None:
        self._totals = RunningTotals()
        self._gauges: set[tuple[str, frozenset[tuple[str, str]]]] = set()

    def publish(self, engine: EngineReports, tiers: Mapping[str, Tier]) -> None:
        """Everything that an engine reports, and where the replica holds adapters, by digest."""
        for source, total in engine.length_predictions().items():
            self._totals.publish(metrics.LENGTH_PREDICTIONS, total, source=source)
        self.publish_tiers(tiers)
        self.publish_events(engine.take_policy_events())
        if (found := engine.policy_report()) is not None:
            report, _ = found
            self.publish_report(report)

    def publish_tiers(self, tiers: Mapping[str, Tier]) -> None:
        """tiers: digest -> where the replica holds the adapter."""
        counts = Counter(tiers.values())
        for tier in _TIERS:
            metrics.ADAPTERS.gauge().set(counts[tier], tags={"tier": tier.name.lower()})

    def publish_events(self, events: PolicyEvents) -> None:
        """Durations of what has ended since the last call."""
        for stage, duration_s in events.seconds:
            metrics.ADAPTER_LOAD_S.histogram().observe(duration_s, tags={"stage": stage})
        for queue, waited_s in events.waited:
            metrics.QUEUE_WAIT_S.histogram().observe(waited_s, tags={"queue": str(min(queue, MAX_QUEUES - 1))})

    def publish_report(self, report: PolicyReport) -> None:
        """The engine's latest report; the same one again changes nothing. A gauge that it has no more is set to 0."""
        gone = set(self._gauges)
        for sample in figures.samples(report):
            metric = metrics.REPORTED[sample.name]
            if sample.is_total:
                self._totals.publish(metric, sample.value, **sample.tags)
            else:
                metric.gauge().set(sample.value, tags=dict(sample.tags))
                gone.discard(series := (sample.name, frozenset(sample.tags.items())))
                self._gauges.add(series)
        for name, tags in gone:
            metrics.REPORTED[name].gauge().set(0, tags=dict(tags))
