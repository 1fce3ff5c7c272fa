"""Every metric of ours, by name. vLLM's and Ray Serve's own pass through beside them.

``Metric.counter()`` and ``Metric.gauge()`` make the real thing through ``ray.serve.metrics``, which adds the tags
``application``, ``deployment`` and ``replica`` inside a Serve replica. Prometheus sees the names with the prefix
``ray_``, counters with the suffix ``_total``. Tags take few values each; adapter names are not among them.
"""

from dataclasses import dataclass
from functools import cache

from ray.serve.metrics import Counter, Gauge


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric's name, its meaning, and the tags its values carry."""

    name: str
    description: str
    tag_keys: tuple[str, ...] = ()

    def counter(self) -> Counter:
        """This process's counter of that name, made at the first call."""
        return _make(Counter, self)

    def gauge(self) -> Gauge:
        """This process's gauge of that name, made at the first call."""
        return _make(Gauge, self)


@cache
def _make(kind: type[Counter] | type[Gauge], metric: Metric) -> Counter | Gauge:
    return kind(metric.name, metric.description, metric.tag_keys)


REQUESTS = Metric(
    "chameleon_requests",
    "Requests by outcome: ok, client_error, server_error, overloaded, cancelled.",
    ("outcome",),
)

ROUTING_DECISIONS = Metric(
    "chameleon_routing_decisions",
    "Routing decisions by reason: resident, host, cold, overload, no_hint, base.",
    ("reason",),
)

ROUTING_LOOKUPS = Metric("chameleon_routing_lookups", "Adapter requests routed; the base of the hit rate.")

ROUTING_HITS = Metric(
    "chameleon_routing_hits", "Adapter requests routed to a replica that held the adapter in GPU memory, by its report."
)

ROUTING_FAILURES = Metric(
    "chameleon_routing_failures",
    "Requests that load balancing placed because our ranking raised an error (see the log).",
)

PLACEMENT_AGE_S = Metric(
    "chameleon_placement_age_s", "Seconds since the router's knowledge of the replicas was current; 0 while it follows."
)

LENGTH_PREDICTIONS = Metric(
    "chameleon_length_predictions",
    "Output lengths predicted in the replica: by the trained model, or by history where that was too slow.",
    ("source",),
)

RETRIES = Metric("chameleon_retries", "Requests sent to a second replica because the first died before it answered.")

BROKEN_STREAMS = Metric("chameleon_broken_streams", "Streams that ended with an error event after they had begun.")
