"""Every metric of ours, by name. vLLM's and Ray Serve's own pass through beside them.

``Metric.counter()``, ``gauge()`` and ``histogram()`` make the real thing through ``ray.serve.metrics``, which adds the
tags ``application``, ``deployment`` and ``replica`` inside a Serve replica. Prometheus sees the names with the prefix
``ray_``, counters with the suffix ``_total``. Tags take few values each; adapter names are not among them.

Metrics of the adapter cache and the scheduler come from the replica's policy: with ``engine.adapter_memory: slots``
there is none, and of them only ``chameleon_adapters`` is published.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import cache

from ray.serve.metrics import Counter, Gauge, Histogram


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric's name, its meaning, the tags its values carry, and a histogram's upper bucket bounds."""

    name: str
    description: str
    tag_keys: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()

    def counter(self) -> Counter:
        """This process's counter of that name, made at the first call."""
        return _make(Counter, self)

    def gauge(self) -> Gauge:
        """This process's gauge of that name, made at the first call."""
        return _make(Gauge, self)

    def histogram(self) -> Histogram:
        """This process's histogram of that name, made at the first call."""
        return _make(Histogram, self)


@cache
def _make(kind: type[Counter | Gauge | Histogram], metric: Metric) -> Counter | Gauge | Histogram:
    if kind is Histogram:
        return Histogram(metric.name, metric.description, list(metric.boundaries), metric.tag_keys)
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

# The adapter cache.

ADAPTERS = Metric("chameleon_adapters", "Adapters by the nearest tier that the replica holds them in.", ("tier",))

ADAPTER_HITS = Metric("chameleon_adapter_hits", "Requests whose adapter was resident when they came to the engine.")

ADAPTER_MISSES = Metric("chameleon_adapter_misses", "Requests whose adapter was not resident when they came.")

ADAPTER_EVICTIONS = Metric(
    "chameleon_adapter_evictions",
    "Adapters that left KV memory: kv_pressure, load (room for another), share_bound, discard, retired.",
    ("reason",),
)

ADAPTER_BLOCKS = Metric("chameleon_adapter_blocks", "KV-cache blocks that adapters hold, those being loaded included.")

ADAPTER_BLOCKS_LIMIT = Metric("chameleon_adapter_blocks_limit", "KV-cache blocks that adapters may hold.")

ADAPTER_BYTES = Metric("chameleon_adapter_bytes", "GPU memory of the blocks that adapters hold, over all ranks.")

ADAPTER_HOST_BYTES = Metric(
    "chameleon_adapter_host_bytes", "Host memory of adapters per rank, those being read included."
)

ADAPTER_LOADS = Metric(
    "chameleon_adapter_loads", "Started: fetch (disk to host memory), load (host memory to KV blocks).", ("stage",)
)

ADAPTER_PREFETCHES = Metric("chameleon_adapter_prefetches", "Loads into KV blocks that no request needed yet.")

ADAPTER_LOADS_IN_FLIGHT = Metric("chameleon_adapter_loads_in_flight", "Under way: fetch, load.", ("stage",))

ADAPTER_LOAD_S = Metric("chameleon_adapter_load_s", "Seconds of a fetch or load, per rank.", ("stage",), SECONDS)

ADAPTER_LOAD_FAILURES = Metric(
    "chameleon_adapter_load_failures", "Adapters that could not be loaded: inspection, fetch, load.", ("stage",)
)

WAITING_REQUESTS = Metric(
    "chameleon_waiting_requests",
    "Requests in the engine that do not run, by what they wait for: their turn, or their adapter (inspection of its "
    "files, fetch, room, load).",
    ("reason",),
)

OLDEST_WAITING_S = Metric(
    "chameleon_oldest_waiting_s", "Seconds since the oldest request that does not run came to the engine."
)

# The scheduler.

QUEUES = Metric("chameleon_queues", "Queues that requests are split into at present.")

QUEUE_WAITING = Metric("chameleon_queue_waiting", "Requests that wait, by queue.", ("queue",))

QUEUE_RUNNING = Metric("chameleon_queue_running", "Requests that run, by queue.", ("queue",))

QUEUE_CUTOFF = Metric(
    "chameleon_queue_cutoff", "Largest weighted request size of the queue; 0: the last one, without bound.", ("queue",)
)

QUEUE_QUOTA_TOKENS = Metric(
    "chameleon_queue_quota_tokens", "Tokens that running requests may borrow; 0: no bound.", ("queue",)
)

QUEUE_USED_TOKENS = Metric("chameleon_queue_used_tokens", "Tokens of the quota that are lent.", ("queue",))

QUEUE_WAIT_S = Metric("chameleon_queue_wait_s", "Seconds that admitted requests waited.", ("queue",), SECONDS)

ADMISSIONS = Metric("chameleon_admissions", "Requests that began to run; after a preemption once more.")

BYPASSES = Metric("chameleon_bypasses", "Requests that ran before an older one whose adapter had no room.")

SQUASHES = Metric("chameleon_squashes", "Requests that had bypassed and were stopped again: the room came earlier.")

REFRESHES = Metric("chameleon_queue_refreshes", "Times that cut-offs and quotas were measured anew.")

HOLDS = Metric("chameleon_holds", "Times that the replica was kept free for one request overtaken too often.")

MINIMA_SCALE = Metric(
    "chameleon_quota_minima_scale", "Below 1: the quotas cannot hold the SLO, and were scaled down by this."
)

LENGTH_ACCURACY = Metric(
    "chameleon_length_accuracy", "Share of the latest output lengths that were predicted in the right length class."
)

LENGTH_ERROR_TOKENS = Metric("chameleon_length_error_tokens", "Mean absolute error of these predictions.")
