"""What an engine reports of itself: its load, in the terms the router ranks by, and its policy's state."""

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from chameleon_ray.engine.report import (
    MAX_EVICTIONS,
    RECENT_S,
    Activity,
    PolicyEvents,
    PolicyReport,
    RecentEviction,
    RecentTtfts,
    percentile,
)
from chameleon_ray.policy.adapter import Tier
from chameleon_ray.routing.replica_load import RecentRequests, ReplicaLoad


class LoadStats(StatLoggerBase):
    """A vLLM stat logger that keeps the current queue state and running means of recent requests."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0, clock: Callable[[], float] = time.monotonic):
        self.num_running = 0
        self.num_waiting = 0
        self.max_num_seqs = vllm_config.scheduler_config.max_num_seqs
        self.kv_used_share = 0.0
        self._kv_usage = 0.0
        self._ttfts = RecentTtfts()
        self._evicted: deque[tuple[float, str, str]] = deque(maxlen=MAX_EVICTIONS)
        self._recent = RecentRequests()
        # Of adapters in KV memory (engine/paged/stats.py), by digest.
        self.report: PolicyReport | None = None
        self.reported_at_s = 0.0
        self.adapter_tiers: dict[str, Tier] = {}
        self.eviction_cost_s = 0.0
        self._idle_share = 0.0
        self._events = PolicyEvents()
        self._clock = clock

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is not None:
            self.num_running = scheduler_stats.num_running_reqs
            self.num_waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            if scheduler_stats.kv_connector_stats:
                self._record_policy(scheduler_stats.kv_connector_stats)
            self._kv_usage = scheduler_stats.kv_cache_usage
            # vLLM counts the blocks of idle adapters as used.
            self.kv_used_share = max(0.0, scheduler_stats.kv_cache_usage - self._idle_share)
        for ttft_s in iteration_stats.time_to_first_tokens_iter if iteration_stats is not None else ():
            self._ttfts.record(ttft_s, self._clock())
        for request in iteration_stats.finished_requests if iteration_stats is not None else ():
            if request.num_generation_tokens == 0:
                continue  # it ended without a first token: vLLM's times for it mean nothing
            self._recent.record(request.prefill_time, request.inference_time)

    def _record_policy(self, data: Mapping[str, Any]) -> None:
        self.report = PolicyReport.of(data)
        self.reported_at_s = self._clock()
        self.eviction_cost_s = data["eviction_cost_s"]
        self._idle_share = self._kv_share(data["idle_blocks"])
        self.adapter_tiers |= {digest: Tier(tier) for digest, tier in data["tiers"].items()}
        for digest in [digest for digest, tier in data["tiers"].items() if tier == Tier.ABSENT]:
            self.adapter_tiers.pop(digest, None)
        self._events.record(data)
        self._evicted.extend((self.reported_at_s, name, reason) for name, reason in data["evicted"])

    def _kv_share(self, num_blocks: int) -> float:
        """What adapters with so many blocks take of the KV cache."""
        limits = self.report.limits if self.report is not None else None
        return num_blocks / limits.num_blocks if limits is not None and limits.shares_kv else 0.0

    def take_events(self) -> PolicyEvents:
        """What the policy has reported as happened since the last call."""
        events, self._events = self._events, PolicyEvents()
        return events

    @property
    def report_age_s(self) -> float:
        """Seconds since the last report. An engine without requests makes none: nothing changes."""
        return self._clock() - self.reported_at_s

    def activity(self) -> Activity:
        """What the engine does at present."""
        now_s = self._clock()
        adapters_share = 0.0 if self.report is None else self._kv_share(self.report.cache.blocks_held)
        ttfts_s = self._ttfts.values_s(now_s)
        return Activity(
            kv_requests_share=max(0.0, self._kv_usage - adapters_share),
            kv_adapters_share=adapters_share,
            requests_per_s=len(ttfts_s) / RECENT_S,
            ttft_p50_s=percentile(ttfts_s, 0.5),
            ttft_p95_s=percentile(ttfts_s, 0.95),
            evictions=tuple(
                RecentEviction(name, reason, now_s - at_s) for at_s, name, reason in reversed(self._evicted)
            ),
        )

    def log_engine_initialized(self) -> None:
        pass

    def load(self, eviction_cost_s: float) -> ReplicaLoad:
        """The load as of the last engine step."""
        return ReplicaLoad(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            max_num_seqs=self.max_num_seqs,
            service_s=self._recent.service_s,
            ttft_s=self._recent.ttft_s,
            eviction_cost_s=eviction_cost_s,
            kv_used_share=self.kv_used_share,
        )


class RequestRates:
    """How often each adapter was asked for within a sliding window; times in seconds of any one clock."""

    def __init__(self, window_s: float = 60.0):
        self._window_s = window_s
        self._arrivals: dict[str, deque[float]] = {}
        self._uses: Counter[str] = Counter()

    def record(self, digest: str, now_s: float) -> None:
        """One request for the adapter."""
        self._uses[digest] += 1
        arrivals = self._arrivals.setdefault(digest, deque(maxlen=1000))
        arrivals.append(now_s)

    def take_uses(self) -> Mapping[str, int]:
        """Requests by adapter digest since the last call."""
        uses, self._uses = self._uses, Counter()
        return uses

    def forget(self, digest: str) -> None:
        """Drop an adapter's requests."""
        self._uses.pop(digest, None)
        self._arrivals.pop(digest, None)

    def per_second(self, digest: str, now_s: float) -> float:
        """Requests per second over the window."""
        arrivals = self._arrivals.get(digest)
        if not arrivals:
            return 0.0
        while arrivals and arrivals[0] < now_s - self._window_s:
            arrivals.popleft()
        if not arrivals:
            del self._arrivals[digest]
            return 0.0
        return len(arrivals) / self._window_s
