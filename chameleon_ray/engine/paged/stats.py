"""The adapter cache's state on its way to the front end, in vLLM's connector statistics (``SchedulerStats``)."""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

from chameleon_ray.engine.paged.memory import AdapterMemory
from chameleon_ray.policy.adapter import Tier

REPORT_INTERVAL_S = 0.1
"""Statistics travel with a step's output at most so often while requests are live."""


class AdapterStats(KVConnectorStats):
    """``data``: ``cache`` (``policy.cache_types.CacheStats``: totals and gauges), ``tiers`` (digest -> tier number of
    those that changed since the last report, 0 of those forgotten), ``seconds``
    (``fetch`` and ``load`` durations since then), ``eviction_cost_s`` (what one more adapter would cost later ones),
    ``idle_blocks`` (``AdapterCache.idle_blocks``), ``queues`` (``policy.admission.QueuesState``), ``waited`` ((queue,
    queueing delay in s) of requests admitted since the last report), ``evicted`` ((name, reason) of adapters that left
    KV memory since then), ``predictions`` (``predictor.lengths.AccuracySnapshot``), ``waiting``
    (``AdapterMemory.waiting``), ``oldest_waiting_s``, ``limits`` (``engine.report.MemoryLimits``),
    ``num_inspection_failures``. ``engine/report.py`` makes objects of it."""

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> "AdapterStats":
        data = {**self.data, **other.data}
        data["tiers"] = {**self.data.get("tiers", {}), **other.data.get("tiers", {})}
        mine, theirs = self.data.get("seconds", {}), other.data.get("seconds", {})
        for name in ("waited", "evicted"):
            data[name] = [*self.data.get(name, []), *other.data.get(name, [])]
        data["seconds"] = {what: mine.get(what, []) + theirs.get(what, []) for what in {*mine, *theirs}}
        return AdapterStats(data=data)

    def reduce(self) -> dict[str, int | float]:
        cache = self.data.get("cache", {})
        names = ("adapters_resident", "blocks_held", "hits", "misses", "loads", "requests_waiting")
        return {name: cache[name] for name in names if name in cache}

    def is_empty(self) -> bool:
        return not self.data


class StatsReporter:
    """Makes reports of what has changed."""

    def __init__(self, memory: AdapterMemory, clock: Callable[[], float] = time.monotonic) -> None:
        self._memory = memory
        self._clock = clock
        self._tiers: dict[str, int] = {}
        self._reported_at_s = float("-inf")
        self._num_changes = -1

    def take(self) -> AdapterStats | None:
        """A report, or None if it is not yet time for one or nothing has changed."""
        now_s = self._clock()
        if self._memory.num_changes == self._num_changes:
            return None
        if self._memory.num_requests and now_s < self._reported_at_s + REPORT_INTERVAL_S:
            return None  # There will be more steps; without requests this one may be the last for long.
        self._reported_at_s, self._num_changes = now_s, self._memory.num_changes
        cache = asdict(self._memory.cache.stats())
        cache["evictions"] = {str(reason): count for reason, count in cache["evictions"].items()}
        report: dict[str, Any] = {"cache": cache}
        report["eviction_cost_s"] = self._memory.eviction_cost_s()
        report["idle_blocks"] = self._memory.cache.idle_blocks
        tiers = {digest: int(tier) for digest, tier in self._memory.cache.tiers().items()}
        report["tiers"] = {digest: tier for digest, tier in tiers.items() if self._tiers.get(digest) != tier}
        report["tiers"] |= dict.fromkeys(self._tiers.keys() - tiers.keys(), int(Tier.ABSENT))
        self._tiers = tiers
        seconds, self._memory.seconds = self._memory.seconds, []
        report["seconds"] = {what: [s for kind, s in seconds if kind == what] for what in ("fetch", "load")}
        report["waited"], self._memory.waited = self._memory.waited, []
        report["evicted"], self._memory.evicted = self._memory.evicted, []
        report["queues"] = asdict(self._memory.policy.queues.state())
        report["predictions"] = asdict(self._memory.accuracy.snapshot())
        report["waiting"] = self._memory.waiting()
        report["oldest_waiting_s"] = self._memory.oldest_waiting_s
        report["limits"] = asdict(self._memory.limits)
        report["num_inspection_failures"] = self._memory.num_inspection_failures
        return AdapterStats(data=report)
