"""``chameleon plan``: the smallest number of replicas that holds an SLO, and what binds.

One replica is simulated with its share of the traffic, spread evenly and at random (every replica sees all adapters):
a router that keeps adapters together does no worse. ``chameleon sim cluster`` shows by how much it does better.

The search begins at the fewest replicas whose arithmetic keeps up with the traffic: with fewer, queues grow for as long
as it lasts, whatever a short run shows. So no run is grossly overloaded, and a plan takes twenty runs or so.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from chameleon_ray.sim.costs import CostModel, load_cost_model
from chameleon_ray.sim.grid import load_grid
from chameleon_ray.sim.parallel import show_progress
from chameleon_ray.sim.scenario import Scenario, simulate
from chameleon_ray.sim.workload import generate, make_adapters

_MOST_REPLICAS = 100_000
_SAMPLED_REQUESTS = 2000
_RELIEF = 2.0
"""What binds is found by making one resource so much larger at a time."""


class PlanError(ValueError):
    """No number of replicas holds the SLO; the message says why."""


@dataclass(frozen=True, slots=True)
class Plan:
    """num_replicas: the smallest number that holds the SLO. ttft_p99_s: at that number.

    one_fewer_p99_s: P99 TTFT with one replica fewer (of a single one: with it).
    binds: of memory, link and compute, the one that, doubled, lowers that P99 most.
    relieved_p99_s: that P99 with each of them doubled.
    """

    num_replicas: int
    ttft_p99_s: float
    requests_per_s_each: float
    busy_share: float
    one_fewer_p99_s: float
    binds: str
    relieved_p99_s: dict[str, float]


def run(path: Path, slo_s: float, json_path: Path | None = None) -> int:
    """Plan for the scenario file's traffic (no grid), print the answer; the exit status. Raises PlanError."""
    points = load_grid(path)
    if len(points) != 1:
        raise PlanError(f"{path} holds a grid of {len(points)} scenarios: plan for one")
    scenario = points[0].scenario
    found = plan(scenario, load_cost_model(scenario.cost_model), slo_s)
    print(
        f"{found.num_replicas} replicas hold a P99 TTFT of {slo_s:g} s: {found.ttft_p99_s:.3g} s at "
        f"{found.requests_per_s_each:.3g} requests/s each. What binds: {found.binds} (one replica "
        f"fewer: {found.one_fewer_p99_s:.3g} s; with twice the "
        + ", ".join(f"{name}: {p99_s:.3g} s" for name, p99_s in found.relieved_p99_s.items())
        + ")."
    )
    if json_path is not None:
        json_path.write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
    return 0


def plan(scenario: Scenario, costs: CostModel, slo_s: float) -> Plan:
    """The smallest number of replicas whose P99 TTFT is at most ``slo_s`` seconds. Raises PlanError."""
    if slo_s <= 0:
        raise PlanError(f"an SLO of {slo_s} s cannot be held: give a positive number of seconds")
    known: dict[int, dict[str, float]] = {}

    def holds(count: int) -> bool:
        if count not in known:
            show_progress(f"trying {count} replicas", 0.5)
            known[count] = _share(scenario, costs, count)
        figures = known[count]
        return figures["ttft_p99_s"] <= slo_s and not figures["refused"]

    first = high = fewest_replicas(scenario, costs)
    while not holds(high):
        if known[high]["refused"]:
            raise PlanError("some requests never fit one replica's memory: more replicas do not help")
        high *= 2
        rate = scenario.workload.requests_per_s / high
        if high > max(_MOST_REPLICAS, 2 * first) or rate * scenario.workload.duration_s < 20:
            show_progress("", None)
            raise PlanError(
                f"{high // 2} replicas still miss the SLO ({known[high // 2]['ttft_p99_s']:.3g} s): an idle replica "
                f"needs longer than {slo_s:g} s, or the run is too short to tell (raise workload.duration_s)"
            )
    low = high // 2 if high > first else first - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    fewer = max(1, high - 1)
    if fewer not in known:
        known[fewer] = _share(scenario, costs, fewer)
    relieved = {}
    for name, larger in _relieved(costs).items():
        show_progress(f"twice the {name}", 0.9)
        relieved[name] = _share(scenario, larger, fewer)["ttft_p99_s"]
    show_progress("", None)
    return Plan(
        num_replicas=high,
        ttft_p99_s=known[high]["ttft_p99_s"],
        requests_per_s_each=scenario.workload.requests_per_s / high,
        busy_share=known[high]["busy_share"],
        one_fewer_p99_s=known[fewer]["ttft_p99_s"],
        binds=min(relieved, key=lambda name: relieved[name]),
        relieved_p99_s=relieved,
    )


def fewest_replicas(scenario: Scenario, costs: CostModel) -> int:
    """How many it takes for the arithmetic of prompts, outputs and LoRA alone, if every step were full."""
    workload = scenario.workload
    rate = min(workload.requests_per_s, _SAMPLED_REQUESTS / workload.duration_s)
    adapters = make_adapters(workload.adapters, costs.memory.adapter_bytes_per_rank)
    sampled = workload.model_copy(update={"requests_per_s": rate})
    requests = generate(sampled, adapters, costs.limits.max_model_len, scenario.seed)
    busy_s = sum(
        (request.num_prompt_tokens + request.num_output_tokens - 1)
        * (costs.step.token_s + costs.step.token_rank_s * (request.adapter.rank if request.adapter else 0))
        for request in requests
    )
    return max(1, math.ceil(workload.requests_per_s * busy_s / max(1, len(requests))))


def _share(scenario: Scenario, costs: CostModel, count: int) -> dict[str, float]:
    rate = scenario.workload.requests_per_s / count
    workload = scenario.workload.model_copy(update={"requests_per_s": rate})
    return simulate(scenario.model_copy(update={"workload": workload}), costs).summary()


def _relieved(costs: CostModel) -> dict[str, CostModel]:
    memory = costs.memory.model_copy(update={"pool_blocks": int(costs.memory.pool_blocks * _RELIEF)})
    links = {name: value * _RELIEF for name, value in costs.links.model_dump().items() if name.endswith("_bytes_s")}
    step = {name: value / _RELIEF for name, value in costs.step.model_dump().items()}
    return {
        "memory": costs.model_copy(update={"memory": memory}),
        "link": costs.model_copy(update={"links": costs.links.model_copy(update=links)}),
        "compute": costs.model_copy(update={"step": costs.step.model_copy(update=step)}),
    }
