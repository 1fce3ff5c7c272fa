"""What a replica's engine reports of its policy, as metrics."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from chameleon_ray import metrics
from chameleon_ray.engine.report import STAGES, PolicyEvents, PolicyReport
from chameleon_ray.metrics import MAX_QUEUES, RunningTotals
from chameleon_ray.policy.adapter import Tier
from chameleon_ray.policy.admission import QueuesState, QueueState
from chameleon_ray.policy.cache_types import CacheStats
from chameleon_ray.policy.disciplines import UNLIMITED
from chameleon_ray.policy.lengths import AccuracySnapshot

_TIERS = (Tier.GPU, Tier.HOST, Tier.DISK)
_NO_QUEUE = QueueState(
    max_size=0.0, num_waiting=0, num_loading=0, num_running=0, max_running=0, quota_tokens=0, used_tokens=0
)


class PolicyMetrics:
    """One replica's; ``publish`` with every heartbeat: Ray shows a gauge only for a while after it was set."""

    def __init__(self) -> None:
        self._totals = RunningTotals()

    def publish(self, engine: Any, tiers: Mapping[str, Tier]) -> None:
        """Everything that an engine (``EngineServer``) reports, and where the replica holds adapters, by digest."""
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
            metrics.QUEUE_WAIT_S.histogram().observe(waited_s, tags=_queue(queue))

    def publish_report(self, report: PolicyReport) -> None:
        """The engine's latest report; the same one again changes nothing."""
        self._publish_cache(report)
        self._publish_work(report.cache)
        self._publish_queues(report.queues)
        _publish_accuracy(report.accuracy)
        for reason, number in report.waiting.items():
            metrics.WAITING_REQUESTS.gauge().set(number, tags={"reason": reason})
        metrics.OLDEST_WAITING_S.gauge().set(report.oldest_waiting_s, tags={})
        for stage in STAGES:
            self._totals.publish(metrics.ADAPTER_LOAD_FAILURES, report.num_failures[stage], stage=stage)

    def _publish_cache(self, report: PolicyReport) -> None:
        cache, limits = report.cache, report.limits
        self._totals.publish(metrics.ADAPTER_HITS, cache.hits)
        self._totals.publish(metrics.ADAPTER_MISSES, cache.misses)
        for reason, total in cache.evictions.items():
            self._totals.publish(metrics.ADAPTER_EVICTIONS, total, reason=reason.value)
        metrics.ADAPTER_BLOCKS.gauge().set(cache.blocks_held, tags={})
        metrics.ADAPTER_BLOCKS_LIMIT.gauge().set(limits.max_blocks, tags={})
        metrics.ADAPTER_BYTES.gauge().set(cache.blocks_held * limits.block_bytes, tags={})
        metrics.ADAPTER_HOST_BYTES.gauge().set(cache.host_bytes_held, tags={})

    def _publish_work(self, cache: CacheStats) -> None:
        self._totals.publish(metrics.ADAPTER_LOADS, cache.fetches, stage="fetch")
        self._totals.publish(metrics.ADAPTER_LOADS, cache.loads, stage="load")
        self._totals.publish(metrics.ADAPTER_PREFETCHES, cache.prefetches)
        metrics.ADAPTER_LOADS_IN_FLIGHT.gauge().set(cache.fetches_in_flight, tags={"stage": "fetch"})
        metrics.ADAPTER_LOADS_IN_FLIGHT.gauge().set(cache.loads_in_flight, tags={"stage": "load"})

    def _publish_queues(self, state: QueuesState) -> None:
        metrics.QUEUES.gauge().set(len(state.queues), tags={})
        metrics.MINIMA_SCALE.gauge().set(state.minima_scale, tags={})
        for index in range(MAX_QUEUES):
            queue, tags = state.queues[index] if index < len(state.queues) else _NO_QUEUE, _queue(index)
            metrics.QUEUE_WAITING.gauge().set(queue.num_waiting, tags=tags)
            metrics.QUEUE_RUNNING.gauge().set(queue.num_running, tags=tags)
            metrics.QUEUE_QUOTA_TOKENS.gauge().set(_bound(queue.quota_tokens), tags=tags)
            metrics.QUEUE_USED_TOKENS.gauge().set(queue.used_tokens, tags=tags)
            metrics.QUEUE_CUTOFF.gauge().set(_bound(queue.max_size), tags=tags)
        self._totals.publish(metrics.ADMISSIONS, state.num_admissions)
        self._totals.publish(metrics.BYPASSES, state.num_bypasses)
        self._totals.publish(metrics.SQUASHES, state.num_squashes)
        self._totals.publish(metrics.REFRESHES, state.num_refreshes)
        self._totals.publish(metrics.HOLDS, state.num_holds)


def _publish_accuracy(accuracy: AccuracySnapshot) -> None:
    if accuracy.right_bucket_share is not None and accuracy.mean_absolute_error_tokens is not None:
        metrics.LENGTH_ACCURACY.gauge().set(accuracy.right_bucket_share, tags={})
        metrics.LENGTH_ERROR_TOKENS.gauge().set(accuracy.mean_absolute_error_tokens, tags={})


def _bound(value: float) -> float:
    return 0.0 if value >= UNLIMITED else value


def _queue(index: int) -> dict[str, str]:
    return {"queue": str(min(index, MAX_QUEUES - 1))}
