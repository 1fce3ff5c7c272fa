"""``chameleon sim cluster``: many replicas behind a router with stale hints; replicas die and join."""

import gc
import json
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from chameleon_ray.policy.adapter import Tier
from chameleon_ray.routing.ranking import LoadCosts
from chameleon_ray.sim import plots
from chameleon_ray.sim.costs import CostModel, Count, NotNegative, Positive, load_cost_model
from chameleon_ray.sim.loop import Event
from chameleon_ray.sim.loop import run as run_events
from chameleon_ray.sim.parallel import map_tasks, show_progress
from chameleon_ray.sim.replica import EngineMode, Job, SimReplica
from chameleon_ray.sim.routers import ROUTERS, Hints, make_router
from chameleon_ray.sim.scenario import (
    EngineSettings,
    PolicySettings,
    Scenario,
    make_predictor,
    replica_config,
    simulate,
)
from chameleon_ray.sim.workload import AdapterMix, SimRequest, WorkloadConfig, generate, make_adapters

REFERENCE = "power_of_two"
"""The routing policy that others are compared with: Ray Serve's default."""

_BACKLOG = 1000


class ClusterScenario(BaseModel):
    """One run of a cluster; ``workload.requests_per_s`` is the whole cluster's rate.

    hint_delay_s: how old tiers, loads and deaths are when routers hear of them. report_s: between load reports, by
    default as in the product.
    failures_s, joins_s: when a replica dies (the oldest that lives) and when one more joins.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    cost_model: str = "a40-llama-7b"
    workload: WorkloadConfig
    policy: PolicySettings = PolicySettings()
    routing: str = "affinity"
    num_replicas: Count = 4
    hint_delay_s: NotNegative = 0.1
    report_s: Positive = 0.5
    hysteresis: NotNegative = 0.2
    failures_s: list[NotNegative] = []
    joins_s: list[NotNegative] = []
    seed: int = Field(0, ge=0)

    @field_validator("routing")
    @classmethod
    def _known(cls, routing: str) -> str:
        if routing not in ROUTERS:
            raise ValueError(f"{routing!r} is not one of {', '.join(ROUTERS)}")
        return routing

    @model_validator(mode="after")
    def _some_survive(self) -> "ClusterScenario":
        if len(self.failures_s) >= self.num_replicas + len(self.joins_s):
            raise ValueError("failures_s leaves no replica alive: requests would wait for ever")
        return self


@dataclass(frozen=True, slots=True)
class ClusterResult:
    """Of requests after the warm-up. hit_rate: the adapter was resident. copies: replicas that hold an adapter in GPU
    memory at the end, mean over those that somebody holds. imbalance: the busiest replica's requests over the mean."""

    requests: int
    ttft_p50_s: float
    ttft_p99_s: float
    hit_rate: float
    loads_per_request: float
    copies: float
    imbalance: float
    retries: int
    refused: int
    events: int


class ClusterError(ValueError):
    """The cluster cannot be simulated as asked for; the message names each setting and what is wrong with it."""


def scenario_of(
    *,
    num_replicas: int,
    num_requests: int,
    requests_per_s_each: float,
    num_adapters: int,
    length_scale: float = 1.0,
    exponent: float = 1.0,
    drift_s: float = 0.0,
    base_share: float = 0.0,
    hint_delay_s: float = 0.1,
    cost_model: str = "a40-llama-7b",
    seed: int = 0,
) -> ClusterScenario:
    """About ``num_requests`` Poisson arrivals, the first tenth of the time not reported. Raises ClusterError.

    requests_per_s_each: per replica. The rest: see ``ClusterScenario``, ``WorkloadConfig`` and ``AdapterMix``.
    """
    if min(num_replicas, num_requests, requests_per_s_each) <= 0:
        raise ClusterError("replicas, requests and their rate must be more than 0")
    rate = requests_per_s_each * num_replicas
    duration_s = num_requests / rate
    try:
        adapters = AdapterMix(count=num_adapters, exponent=exponent, drift_s=drift_s, base_share=base_share)
        workload = WorkloadConfig(
            requests_per_s=rate,
            duration_s=duration_s,
            warmup_s=duration_s / 10,
            length_scale=length_scale,
            adapters=adapters,
        )
        return ClusterScenario(
            workload=workload, num_replicas=num_replicas, hint_delay_s=hint_delay_s, cost_model=cost_model, seed=seed
        )
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ClusterError(problems) from None


def run(
    scenarios: Sequence[ClusterScenario],
    routings: Iterable[str] = (),
    json_path: Path | None = None,
    num_workers: int | None = None,
    plot_path: Path | None = None,
) -> int:
    """Simulate each scenario with each routing policy (none named: all), print a table for each rate; the exit status.

    scenarios: any rates and seeds of otherwise the same cluster. json_path, plot_path: files that are written as well;
    the plot is of the first rate. Raises ClusterError, CostModelError, PlotError.
    """
    names = list(routings) or list(ROUTERS)
    for name in names:
        if name not in ROUTERS:
            raise ClusterError(f"no routing policy {name!r}: choose from {', '.join(ROUTERS)}")
    if plot_path is not None:
        plots.check_file(plot_path)
    load_cost_model(scenarios[0].cost_model)
    tasks = [_with(scenario, name) for scenario in scenarios for name in names]
    runs = list(zip(tasks, map_tasks(simulate_cluster, tasks, "simulating", num_workers), strict=True))
    means = {
        rate: {
            name: _mean([result for task, result in runs if (_rate(task), task.routing) == (rate, name)])
            for name in names
        }
        for rate in dict.fromkeys(map(_rate, tasks))
    }
    for rate, figures in means.items():
        _print_table(rate, figures)
    first = next(iter(means.values()))
    if plot_path is not None:
        plots.plot_cluster(first, plot_path)
    if json_path is not None:
        content = {
            "scenario": scenarios[0].model_dump(mode="json"),
            "routing": first,
            "rates": [{"requests_per_s_each": rate, "routing": figures} for rate, figures in means.items()],
            "runs": [
                {"requests_per_s_each": _rate(task), "seed": task.seed, "routing": task.routing} | asdict(result)
                for task, result in runs
            ],
        }
        json_path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


def capacity(scenario: ClusterScenario) -> float:
    """Requests per second that one replica of the cluster serves of this traffic while it has a backlog.

    Of ``_BACKLOG`` requests that all come at once, the middle four fifths of the ends; mean of seeds 0 to 2, so that
    runs with any seeds compare. Above it no routing keeps up.
    """
    backlog = {"requests_per_s": float(_BACKLOG), "duration_s": 1.0, "warmup_s": 0.0}
    rates = []
    for seed in range(3):
        one = Scenario(
            cost_model=scenario.cost_model,
            workload=scenario.workload.model_copy(update=backlog),
            policy=scenario.policy,
            engine=EngineSettings(host_resident=False),
            seed=seed,
        )
        ends_s = sorted(job.end_s for job in simulate(one).jobs if job.end_s is not None)
        tenth = len(ends_s) // 10
        rates.append((len(ends_s) - 2 * tenth) / (ends_s[-tenth - 1] - ends_s[tenth]))
    return sum(rates) / len(rates)


def _rate(scenario: ClusterScenario) -> float:
    return scenario.workload.requests_per_s / scenario.num_replicas


def _mean(results: Sequence[ClusterResult]) -> dict[str, float]:
    """Means of each figure; of one run the figures themselves."""
    rows = [asdict(result) for result in results]
    return {key: sum(row[key] for row in rows) / len(rows) if len(rows) > 1 else rows[0][key] for key in rows[0]}


def _print_table(rate: float, figures: Mapping[str, Mapping[str, float]]) -> None:
    titles = ["TTFT P50", "P99", "hits", "loads/req", "copies", "imbalance", "retries"]
    keys = ("ttft_p50_s", "ttft_p99_s", "hit_rate", "loads_per_request", "copies", "imbalance", "retries")
    reference = figures.get(REFERENCE)
    if reference is not None:
        titles += ["P99 ratio", "loads ratio"]
    print(f"{f'{rate:.4g}/s each':20}" + "".join(f"{title:>12}" for title in titles))
    for name, row in figures.items():
        cells = [row[key] for key in keys]
        if reference is not None:
            cells += [
                row[key] / reference[key] if reference[key] else math.nan for key in ("ttft_p99_s", "loads_per_request")
            ]
        print(f"{name:20}" + "".join(f"{cell:12.4g}" for cell in cells))


def simulate_cluster(scenario: ClusterScenario) -> ClusterResult:
    """One run to the end of its last request, with conservation checks at the end."""
    return _Cluster(scenario, load_cost_model(scenario.cost_model)).run()


def _with(scenario: ClusterScenario, routing: str) -> ClusterScenario:
    return scenario.model_copy(update={"routing": routing})


class _Cluster:
    def __init__(self, scenario: ClusterScenario, costs: CostModel) -> None:
        self._scenario = scenario
        self._costs = costs
        self._config = replica_config(costs, scenario.policy)
        self._replicas: list[SimReplica] = []
        self._hints = Hints()
        links = costs.links
        load_costs = LoadCosts(
            links.host_bytes_s, links.disk_bytes_s, links.source_bytes_s, links.overhead_s, scenario.hysteresis
        )
        self._router = make_router(scenario.routing, self._hints, Random(f"router-{scenario.seed}"), load_costs)
        self._ttfts = array("d")
        self._num_arrived = self._num_left = self._num_hits = self._num_with_adapter = 0
        self._num_retries = self._num_refused = 0
        self._served: Counter[int] = Counter()
        self._at: dict[str, int] = {}
        for _ in range(scenario.num_replicas):
            self._hints.join(self._add_replica())

    def run(self) -> ClusterResult:
        workload = self._scenario.workload
        adapters = make_adapters(workload.adapters, self._costs.memory.adapter_bytes_per_rank)
        requests = generate(workload, adapters, self._costs.limits.max_model_len, self._scenario.seed)
        rest = iter(requests)
        events: list[Event] = list(self._next_arrival(rest))
        events += [(at_s, self._fail) for at_s in self._scenario.failures_s]
        events += [(at_s, self._join) for at_s in self._scenario.joins_s]
        for index in range(self._scenario.num_replicas):
            # Spread over the interval, as independent replicas' reports are.
            first_s = self._scenario.report_s * (index + 1) / self._scenario.num_replicas
            events.append((first_s, partial(self._report, index)))
        self._total = len(requests)
        # What a run lets go of is in no cycle, but for a few objects; to look for cycles among the rest, which grows,
        # would take a sixth of the time.
        collects = gc.isenabled()
        gc.disable()
        try:
            _, num_events = run_events(events)
        finally:
            if collects:
                gc.enable()
            show_progress("", None)
        return self._result(num_events)

    def _result(self, num_events: int) -> ClusterResult:
        assert self._num_left == self._num_arrived == self._total, (
            f"{self._total} requests, {self._num_arrived} arrived, {self._num_left} left"
        )
        live = [replica for replica in self._replicas if replica.alive]
        for index, replica in enumerate(self._replicas):
            if replica.alive:
                replica.check_end()
                held = {d: tier for d, tier in replica.policy.cache.tiers().items() if tier > Tier.DISK}
                assert self._hints.held_by(index) == held, f"routers are wrong about replica {index}"
        holders: Counter[str] = Counter()
        for replica in live:
            holders.update(d for d, tier in replica.policy.cache.tiers().items() if tier is Tier.GPU)
        loads = sum(replica.policy.cache.stats().loads for replica in self._replicas)
        counts = [self._served[index] for index, replica in enumerate(self._replicas) if replica.alive]
        return ClusterResult(
            requests=len(self._ttfts),
            ttft_p50_s=float(np.quantile(self._ttfts, 0.5)) if self._ttfts else math.nan,
            ttft_p99_s=float(np.quantile(self._ttfts, 0.99)) if self._ttfts else math.nan,
            hit_rate=self._num_hits / max(1, self._num_with_adapter),
            loads_per_request=loads / max(1, self._total),
            copies=sum(holders.values()) / max(1, len(holders)),
            imbalance=max(counts) / max(1e-9, sum(counts) / len(counts)),
            retries=self._num_retries,
            refused=self._num_refused,
            events=num_events,
        )

    # Requests

    def _next_arrival(self, rest: Iterator[SimRequest]) -> Iterable[Event]:
        request = next(rest, None)
        return () if request is None else [(request.arrival_s, partial(self._arrive, request, rest))]

    def _arrive(self, request: SimRequest, rest: Iterator[SimRequest], now_s: float) -> Iterable[Event]:
        self._num_arrived += 1
        if self._num_arrived % 5000 == 0:
            show_progress(self._scenario.routing, self._num_arrived / self._total)
        return [*self._route(request, now_s), *self._next_arrival(rest)]

    def _route(self, request: SimRequest, now_s: float) -> Iterable[Event]:
        if not self._hints.members:
            return [(now_s + 1.0, partial(self._route, request))]
        index = self._router.choose(request)
        replica = self._replicas[index]
        if not replica.alive:
            # The router has not heard of the death yet: the send fails and is tried again.
            self._num_retries += 1
            return [(now_s + max(self._scenario.hint_delay_s, 1e-3), partial(self._route, request))]
        self._at[request.request_id] = index
        self._hints.count(index, 1)
        if request.adapter is not None and not replica.policy.cache.knows(request.adapter.digest):
            replica.add_adapter(request.adapter, Tier.DISK, now_s)
        return replica.arrive(request, now_s)

    def _ended(self, job: Job, now_s: float) -> None:
        index = self._at.pop(job.request.request_id)
        self._hints.count(index, -1)
        if job.outcome == "lost":
            return
        self._num_left += 1
        self._num_refused += job.outcome == "refused"
        self._served[index] += 1
        if job.first_token_s is not None and job.request.arrival_s >= self._scenario.workload.warmup_s:
            self._ttfts.append(job.first_token_s - job.request.arrival_s)
            self._num_with_adapter += job.request.adapter is not None
            self._num_hits += job.hit and job.request.adapter is not None

    # Replicas and what routers hear of them

    def _add_replica(self) -> int:
        index = len(self._replicas)
        predictor = make_predictor(self._scenario.policy, self._costs.limits.max_model_len, index)
        moved = partial(self._moved, index)
        self._replicas.append(SimReplica(self._costs, self._config, EngineMode(), predictor, self._ended, moved))
        return index

    def _moved(self, index: int, digest: str, now_s: float) -> Iterable[Event]:
        tier = self._replicas[index].policy.cache.tier(digest)
        return [(now_s + self._scenario.hint_delay_s, partial(self._heard_tier, index, digest, tier))]

    def _heard_tier(self, index: int, digest: str, tier: Tier, now_s: float) -> Iterable[Event]:
        self._hints.set_tier(digest, index, tier)
        return ()

    def _report(self, index: int, now_s: float) -> Iterable[Event]:
        if not self._replicas[index].alive or self._num_left == self._total:
            return ()
        load = self._replicas[index].load(now_s)

        def heard(now_s: float) -> Iterable[Event]:
            self._hints.report(index, load)
            return ()

        return [
            (now_s + self._scenario.hint_delay_s, heard),
            (now_s + self._scenario.report_s, partial(self._report, index)),
        ]

    def _fail(self, now_s: float) -> Iterable[Event]:
        victim = next((index for index, replica in enumerate(self._replicas) if replica.alive), None)
        if victim is None:
            return ()
        lost = self._replicas[victim].fail(now_s)
        self._num_retries += len(lost)

        def heard(now_s: float) -> Iterable[Event]:
            self._hints.leave(victim)
            return [event for job in lost for event in self._route(job.request, now_s)]

        return [(now_s + self._scenario.hint_delay_s, heard)]

    def _join(self, now_s: float) -> Iterable[Event]:
        index = self._add_replica()

        def heard(now_s: float) -> Iterable[Event]:
            self._hints.join(index)
            return ()

        return [
            (now_s + self._scenario.hint_delay_s, heard),
            (now_s + self._scenario.report_s, partial(self._report, index)),
        ]
