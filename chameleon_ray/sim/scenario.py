"""One simulated run of one replica: what an operator may set, and what comes out."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from chameleon_ray.policy.adapter import Adapter, Tier
from chameleon_ray.policy.cache_types import CacheConfig, CacheStats
from chameleon_ray.policy.disciplines import DISCIPLINES, QueueOptions
from chameleon_ray.policy.eviction import POLICIES
from chameleon_ray.policy.replica import ReplicaConfig
from chameleon_ray.policy.sizing import SizingOptions
from chameleon_ray.predictor.lengths import HistoryPredictor, LengthPredictor
from chameleon_ray.sim.costs import CostModel, Count, Positive, load_cost_model
from chameleon_ray.sim.loop import Event, run
from chameleon_ray.sim.oracle import OraclePredictor
from chameleon_ray.sim.replica import EngineMode, Job, SimReplica
from chameleon_ray.sim.workload import SimRequest, WorkloadConfig, generate, make_adapters

Share = Field(1.0, gt=0, le=1)


class PolicySettings(BaseModel):
    """Options of the engine's ``PagedSettings`` by the same names, and two of the simulator's own.

    adapter_slots: adapters lie outside the pool, so many of them at a time; None: in it.
    predictor_accuracy: share of right length classes told by an oracle; None: the product's online predictor.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    scheduler: str = "chameleon"
    adapter_policy: str = "chameleon"
    prefetch: bool = True
    adapter_memory_share: float = Share
    adapter_slots: Count | None = None
    request_size: Literal["product", "sum"] = "product"
    k_rule: Literal["elbow", "min_wcss"] = "elbow"
    scheduler_max_queues: Count = 4
    scheduler_refresh_s: Positive = 300.0
    scheduler_slo_s: Positive | None = None
    predictor_accuracy: float | None = Field(None, ge=0, le=1)

    @field_validator("scheduler")
    @classmethod
    def _known_scheduler(cls, name: str) -> str:
        if name not in DISCIPLINES:
            raise ValueError(f"{name!r} is not one of {', '.join(DISCIPLINES)}")
        return name

    @field_validator("adapter_policy")
    @classmethod
    def _known_policy(cls, name: str) -> str:
        if name not in POLICIES:
            raise ValueError(f"{name!r} is not one of {', '.join(POLICIES)}")
        return name


class EngineSettings(BaseModel):
    """See ``EngineMode``. host_resident: all adapters that host memory holds lie there from the start."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    blocking_loads: bool = False
    reserve_outputs: bool = False
    separate_prefill: bool = False
    decodes_per_pass: int = Field(0, ge=0)
    host_resident: bool = True


class Scenario(BaseModel):
    """One run. cost_model: a shipped one's name, or a path. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    cost_model: str = "a40-llama-7b"
    workload: WorkloadConfig
    policy: PolicySettings = PolicySettings()
    engine: EngineSettings = EngineSettings()
    seed: int = Field(0, ge=0)
    check_every_steps: int = Field(0, ge=0)


def _known(time_s: float | None) -> float:
    """A time of a job that has ended."""
    assert time_s is not None
    return time_s


@dataclass(frozen=True, slots=True)
class RunResult:
    """Jobs that arrived after the warm-up, in order of their end, and the run's totals.

    stalls_s: how long the engine stood still for loads, each time.
    """

    jobs: list[Job]
    num_requests: int
    end_s: float
    busy_s: float
    host_link_busy_s: float
    num_events: int
    num_steps: int
    cache: CacheStats
    num_admissions: int
    num_bypasses: int
    num_squashes: int
    stalls_s: list[float]

    def ttfts_s(self) -> np.ndarray:
        """Times to first token of finished requests, in order of their end."""
        return np.array([j.first_token_s - j.request.arrival_s for j in self.jobs if j.first_token_s is not None])

    def finished(self) -> list[Job]:
        """Jobs that ran to their end."""
        return [job for job in self.jobs if job.outcome == "finished"]

    def size_thirds(self) -> np.ndarray:
        """0, 1 or 2 for each of ``finished``: its third of them by true WRS."""
        done = self.finished()
        prompts = np.array([job.request.num_prompt_tokens for job in done], float)
        outputs = np.array([job.request.num_output_tokens for job in done], float)
        sizes = (0.4 * prompts / prompts.max() + 0.6 * outputs / outputs.max()) * np.array([job.rank for job in done])
        classes: np.ndarray = np.digitize(sizes, np.quantile(sizes, (1 / 3, 2 / 3)))
        return classes

    def summary(self) -> dict[str, float]:
        """Figures of a run, all in seconds, shares or counts; NaN where there was nothing to measure."""
        done = self.finished()
        ttfts = self.ttfts_s()
        e2e = np.array([_known(job.end_s) - job.request.arrival_s for job in done])
        gaps = [
            (_known(job.end_s) - _known(job.first_token_s)) / (job.request.num_output_tokens - 1)
            for job in done
            if job.request.num_output_tokens > 1
        ]
        queued = np.array([_known(job.admitted_s) - job.request.arrival_s for job in done])
        with_adapter = [job.hit for job in done if job.request.adapter is not None]
        return {
            "requests": len(self.jobs),
            "finished": len(done),
            "refused": sum(job.outcome == "refused" for job in self.jobs),
            "ttft_p50_s": _quantile(ttfts, 0.5),
            "ttft_p99_s": _quantile(ttfts, 0.99),
            "ttft_mean_s": _mean(ttfts),
            "tbt_mean_s": _mean(gaps),
            "tbt_p99_s": _quantile(gaps, 0.99),
            "e2e_mean_s": _mean(e2e),
            "e2e_p99_s": _quantile(e2e, 0.99),
            "queue_mean_s": _mean(queued),
            "queue_share": float(queued.sum() / e2e.sum()) if len(done) else float("nan"),
            "hit_rate": _mean(with_adapter),
            "preemptions": sum(job.num_preemptions for job in self.jobs),
            "loads": self.cache.loads,
            "loads_per_request": self.cache.loads / max(1, self.num_requests),
            "bypasses": self.num_bypasses,
            "squash_share": self.num_squashes / max(1, self.num_admissions),
            "busy_share": self.busy_s / max(self.end_s, 1e-9),
            "host_link_share": self.host_link_busy_s / max(self.end_s, 1e-9),
            "end_s": self.end_s,
            "events": self.num_events,
            "steps": self.num_steps,
        }


def replica_config(costs: CostModel, policy: PolicySettings) -> ReplicaConfig:
    """The product's policy objects' configuration for a replica of that kind."""
    memory, shares_kv = costs.memory, policy.adapter_slots is None
    cache = CacheConfig(
        max_blocks=policy.adapter_slots or max(1, int(memory.pool_blocks * policy.adapter_memory_share)),
        adapter_host_bytes=memory.adapter_host_bytes,
        adapter_policy=policy.adapter_policy,
        prefetch=policy.prefetch,
    )
    queues = QueueOptions(
        total_tokens=costs.pool_tokens,
        sizing=SizingOptions(memory.kv_bytes_per_token if shares_kv else None, request_size=policy.request_size),
        max_num_seqs=costs.limits.max_num_seqs,
        scheduler_max_queues=policy.scheduler_max_queues,
        k_rule=policy.k_rule,
        scheduler_slo_s=policy.scheduler_slo_s,
        scheduler_refresh_s=policy.scheduler_refresh_s,
    )
    return ReplicaConfig(cache, queues, policy.scheduler, memory.block_tokens, shares_kv)


def make_predictor(policy: PolicySettings, max_model_len: int, seed: int) -> LengthPredictor:
    """The oracle of the set accuracy, or the product's online predictor."""
    if policy.predictor_accuracy is None:
        return HistoryPredictor(max_model_len)
    return OraclePredictor(policy.predictor_accuracy, Random(f"predictor-{seed}"), max_model_len)


def simulate(
    scenario: Scenario,
    costs: CostModel | None = None,
    requests: list[SimRequest] | None = None,
    progress: Callable[[float], None] | None = None,
) -> RunResult:
    """Run a scenario to the end of its last request. Raises CostModelError, TraceError.

    costs, requests: instead of the scenario's. progress: hears of simulated seconds, about a hundred times.
    """
    costs = costs or load_cost_model(scenario.cost_model)
    adapters = make_adapters(scenario.workload.adapters, costs.memory.adapter_bytes_per_rank)
    if requests is None:
        requests = generate(scenario.workload, adapters, costs.limits.max_model_len, scenario.seed)
    jobs: list[Job] = []
    engine = scenario.engine
    replica = SimReplica(
        costs,
        replica_config(costs, scenario.policy),
        EngineMode(
            engine.blocking_loads,
            engine.reserve_outputs,
            engine.separate_prefill,
            engine.decodes_per_pass,
            scenario.check_every_steps,
        ),
        make_predictor(scenario.policy, costs.limits.max_model_len, scenario.seed),
        lambda job, _: jobs.append(job),
    )
    for adapter in _asked_for(adapters, requests):
        replica.add_adapter(adapter, Tier.HOST if engine.host_resident else Tier.DISK)
    events: list[Event] = [(request.arrival_s, partial(replica.arrive, request)) for request in requests]
    if progress is not None:
        marks = np.linspace(0, scenario.workload.duration_s, 101)[1:]
        events += [(float(mark), partial(_report, progress)) for mark in marks]
    end_s, num_events = run(events)
    replica.check_end()
    assert len(jobs) == len(requests), f"{len(requests)} requests came, {len(jobs)} left"
    queues = replica.policy.queues.state()
    return RunResult(
        jobs=[job for job in jobs if job.request.arrival_s >= scenario.workload.warmup_s],
        num_requests=len(requests),
        end_s=max((job.end_s or 0.0 for job in jobs), default=end_s),
        busy_s=replica.busy_s,
        host_link_busy_s=replica.host_link.busy_s,
        num_events=num_events,
        num_steps=replica.num_steps,
        cache=replica.policy.cache.stats(),
        num_admissions=queues.num_admissions,
        num_bypasses=queues.num_bypasses,
        num_squashes=queues.num_squashes,
        stalls_s=replica.stalls_s,
    )


def _report(progress: Callable[[float], None], now_s: float) -> tuple[()]:
    progress(now_s)
    return ()


def _asked_for(adapters: list[Adapter], requests: list[SimRequest]) -> list[Adapter]:
    extra = {r.adapter.digest: r.adapter for r in requests if r.adapter is not None}
    return list({**{adapter.digest: adapter for adapter in adapters}, **extra}.values())


def _quantile(values: Any, share: float) -> float:
    return float(np.quantile(values, share)) if len(values) else float("nan")


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
