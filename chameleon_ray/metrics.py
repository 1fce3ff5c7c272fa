"""Every metric of ours, by name. vLLM's and Ray Serve's own pass through beside them.

``Metric.counter()``, ``gauge()`` and ``histogram()`` make the real thing through ``ray.serve.metrics``, which adds the
tags ``application``, ``deployment`` and ``replica`` inside a Serve replica. Prometheus sees the names with the prefix
``ray_``, counters with the suffix ``_total``. Tags take few values each; adapter names are not among them.

What the policy reports of adapter cache and scheduler is declared where it is counted (``policy/figures.py``), and
found in ``REPORTED``: with ``engine.adapter_memory: stock`` there is none of it.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from ray.serve.metrics import Counter, Gauge, Histogram

from chameleon_ray.engine.report import PolicyReport
from chameleon_ray.policy import figures


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric's name, its kind and meaning, the tags its values carry, and a histogram's upper bucket bounds."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    tag_keys: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()

    def counter(self) -> Counter:
        """This process's counter of that name, made at the first call."""
        made: Counter = _make(Counter, self)
        return made

    def gauge(self) -> Gauge:
        """This process's gauge of that name, made at the first call."""
        made: Gauge = _make(Gauge, self)
        return made

    def histogram(self) -> Histogram:
        """This process's histogram of that name, made at the first call."""
        made: Histogram = _make(Histogram, self)
        return made


@cache
def _make(kind: Any, metric: Metric) -> Any:
    if kind is Histogram:
        return Histogram(metric.name, metric.description, list(metric.boundaries), metric.tag_keys)  # type: ignore[arg-type]
    return kind(metric.name, metric.description, metric.tag_keys)


class RunningTotals:
    """Counters fed with totals since the start: each gets what its total has grown by."""

    def __init__(self) -> None:
        self._published: dict[tuple[str, frozenset[tuple[str, str]]], float] = defaultdict(float)

    def publish(self, metric: Metric, total: float, **tags: str) -> None:
        """``total``: of the counter with these tags. One that has not grown is left alone: Ray refuses 0."""
        key = metric.name, frozenset(tags.items())
        if total > self._published[key]:
            metric.counter().inc(total - self._published[key], tags=tags)
            self._published[key] = total


SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Buckets of durations."""
MAX_QUEUES = 4
"""Values of the tag ``queue``: 0 (smallest requests) to 3; queues that do not exist at present are 0 everywhere."""


REQUESTS = Metric(
    "chameleon_requests",
    "counter",
    "Requests by outcome: ok, client_error, server_error, overloaded, cancelled; without those that only watch "
    "(`/chameleon/`, `/v1/chameleon/...`).",
    ("outcome",),
)

ROUTING_DECISIONS = Metric(
    "chameleon_routing_decisions",
    "counter",
    "Routing decisions by reason: resident, host, cold, overload, no_hint, base.",
    ("reason",),
)

ROUTING_LOOKUPS = Metric("chameleon_routing_lookups", "counter", "Adapter requests routed; the base of the hit rate.")

ROUTING_HITS = Metric(
    "chameleon_routing_hits",
    "counter",
    "Adapter requests routed to a replica that held the adapter in GPU memory, by its report.",
)

ROUTING_FAILURES = Metric(
    "chameleon_routing_failures",
    "counter",
    "Requests that load balancing placed because our ranking raised an error (see the log).",
)

PLACEMENT_AGE_S = Metric(
    "chameleon_placement_age_s",
    "gauge",
    "Seconds since the router's knowledge of the replicas was current; 0 while it follows.",
)

LENGTH_PREDICTIONS = Metric(
    "chameleon_length_predictions",
    "counter",
    "Output lengths predicted in the replica: by the trained model, or by history where that was too slow.",
    ("source",),
)

RETRIES = Metric(
    "chameleon_retries", "counter", "Requests sent to a second replica because the first died before it answered."
)

MIGRATIONS = Metric(
    "chameleon_migrations",
    "counter",
    "Answers that were under way when their replica died, by outcome: resumed (another replica goes on), restarted (it "
    "begins anew: nothing was sent), unsupported (the kind of request cannot), limit, failed (the other replica's "
    "answer is not the same).",
    ("outcome",),
)

BROKEN_STREAMS = Metric(
    "chameleon_broken_streams", "counter", "Streams that ended with an error event after they had begun."
)

ADAPTERS = Metric(
    "chameleon_adapters", "gauge", "Adapters by the nearest tier that the replica holds them in.", ("tier",)
)

ADAPTER_LOAD_S = Metric(
    "chameleon_adapter_load_s", "histogram", "Seconds of a fetch or load, per rank.", ("stage",), SECONDS
)

QUEUE_WAIT_S = Metric(
    "chameleon_queue_wait_s", "histogram", "Seconds that admitted requests waited.", ("queue",), SECONDS
)

REPORTED = {
    series.name: Metric(series.name, "counter" if series.is_total else "gauge", series.description, series.tag_keys)
    for series in figures.declared(PolicyReport).values()
}
"""What a replica's policy reports, by name."""


def all_metrics() -> list[Metric]:
    """Every metric: those declared here, then those of the policy."""
    return [*(metric for metric in globals().values() if isinstance(metric, Metric)), *REPORTED.values()]
