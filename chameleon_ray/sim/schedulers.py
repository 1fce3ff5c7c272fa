"""``chameleon sim schedulers``: the scheduling policies side by side, and by how much each is above or below ``fifo``.

A cell is a model in a regime at a load. Every scheduler serves the same requests of each seed with the same cache and
the same predictor (80% right, as the paper's). Loads are shares of FIFO's limit in the cell: the highest rate
at which FIFO's P99 TTFT, as a mean over two seeds, holds the SLO of five mean unloaded latencies.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chameleon_ray.sim.costs import CostModel, load_cost_model
from chameleon_ray.sim.parallel import map_tasks
from chameleon_ray.sim.scenario import EngineSettings, PolicySettings, RunResult, Scenario, simulate
from chameleon_ray.sim.workload import WorkloadConfig

SCHEDULERS = ("fifo", "chameleon", "paper", "sjf")
LOADS = (0.7, 0.9, 1.0, 1.1)
SEEDS = (0, 1, 2, 3)
_ACCURACY = 0.8
_SLO_LATENCIES = 5.0
_UNLOADED_RATE = 0.2
"""Requests/s at which hardly any request meets another: the unloaded latency is measured there."""
_PRECISION = 0.02
_LIMIT_SEEDS = (0, 1)
_BUSY_LOAD = 0.9
_VLLM = EngineSettings()
_SLORA = EngineSettings(reserve_outputs=True, separate_prefill=True)


class SchedulersError(ValueError):
    """The comparison cannot be made as asked; the message says what to give instead."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a model is asked: the trace's lengths times ``length_scale``, for ``duration_s`` after ``warmup_s``.

    light_per_s: requests/s that it serves in every regime, about.
    """

    cost_model: str
    length_scale: float
    duration_s: float
    warmup_s: float
    light_per_s: float


@dataclass(frozen=True, slots=True)
class Regime:
    """What binds. pool_blocks, max_num_seqs: instead of the cost model's; None: its own."""

    engine: EngineSettings = _VLLM
    pool_blocks: int | None = None
    max_num_seqs: int | None = None


@dataclass(frozen=True, slots=True)
class Limit:
    """Of FIFO, measured by ``--measure-limits``: its objective in seconds, and the requests/s at which it holds it."""

    slo_s: float
    requests_per_s: float


TRAFFIC = {
    "a40": Traffic("a40-llama-7b", 0.30, 500.0, 60.0, 4.0),
    "cpu-demo": Traffic("cpu-demo", 0.10, 200.0, 20.0, 14.0),
}
REGIMES = {
    "a40": {
        "vllm": Regime(),
        "vllm-tight": Regime(pool_blocks=375),
        "slora": Regime(_SLORA),
        "slora-tight": Regime(_SLORA, pool_blocks=375),
        "seats": Regime(max_num_seqs=16),
    },
    "cpu-demo": {
        "vllm": Regime(),
        "vllm-tight": Regime(pool_blocks=64),
        "slora": Regime(_SLORA),
        "slora-tight": Regime(_SLORA, pool_blocks=64),
        "seats": Regime(max_num_seqs=16),
    },
}
"""Tight: S-LoRA's default of 6,000 tokens on the A40, 32 MiB of the demo's; adapters lie in the pool, too."""
LIMITS = {
    "a40/vllm": Limit(9.4, 11.4),
    "a40/vllm-tight": Limit(9.4, 3.19),
    "a40/slora": Limit(9.5, 9.16),
    "a40/slora-tight": Limit(9.5, 2.62),
    "a40/seats": Limit(9.4, 5.23),
    "cpu-demo/vllm": Limit(0.6, 30.3),
    "cpu-demo/vllm-tight": Limit(0.6, 16.4),
    "cpu-demo/slora": Limit(0.6, 26.3),
    "cpu-demo/slora-tight": Limit(0.6, 14.2),
    "cpu-demo/seats": Limit(0.6, 22.9),
}
CELLS = tuple(f"{model}/{regime}" for model, regimes in REGIMES.items() for regime in regimes)


@dataclass(frozen=True, slots=True)
class Row:
    """One run. longest_wait_s: from arrival to the first admission. small: the smallest third by true WRS."""

    model: str
    regime: str
    load: float
    requests_per_s: float
    seed: int
    scheduler: str
    p50_s: float
    p99_s: float
    small_p99_s: float
    longest_wait_s: float


@dataclass(frozen=True, slots=True)
class Ratios:
    """One scheduler over ``fifo`` in one cell: of the means over seeds, and the worst seed."""

    p99: float
    worst_p99: float
    small_p99: float
    worst_small_p99: float
    longest_wait: float


def run(
    cells: Sequence[str] = (),
    loads: Sequence[float] = LOADS,
    seeds: Sequence[int] = SEEDS,
    json_path: Path | None = None,
    num_workers: int | None = None,
) -> int:
    """Run every scheduler in every cell, print tables and goals, write ``json_path``. Raises SchedulersError."""
    chosen = _chosen(cells)
    if not loads or not seeds:
        raise SchedulersError("give at least one load and one seed")
    tasks = [
        _Task(cell, load, load * LIMITS[cell].requests_per_s, seed, scheduler)
        for cell in chosen
        for load in loads
        for seed in seeds
        for scheduler in SCHEDULERS
    ]
    rows = map_tasks(measure, tasks, "simulating", num_workers)
    _print_tables(rows)
    if json_path is not None:
        content = [{name: getattr(row, name) for name in Row.__slots__} for row in rows]
        json_path.write_text(json.dumps({"rows": content}, indent=1) + "\n", encoding="utf-8")
    return 0


def measure_limits(cells: Sequence[str] = (), num_workers: int | None = None) -> int:
    """Print ``LIMITS`` anew. Raises SchedulersError."""
    chosen = _chosen(cells)
    for cell, limit in zip(chosen, map_tasks(limit_of, chosen, "searching", num_workers), strict=True):
        print(f'    "{cell}": Limit({limit.slo_s}, {limit.requests_per_s}),')
    return 0


@dataclass(frozen=True, slots=True)
class _Task:
    cell: str
    load: float
    requests_per_s: float
    seed: int
    scheduler: str


def measure(task: _Task) -> Row:
    """Run one scheduler for one seed of one cell."""
    result = _simulated(task.cell, task.requests_per_s, task.seed, task.scheduler)
    done = result.finished()
    arrivals_s = np.array([job.request.arrival_s for job in done])
    ttfts_s = np.array([job.first_token_s for job in done]) - arrivals_s
    waits_s = np.array([job.admitted_s for job in done]) - arrivals_s
    model, _, regime = task.cell.partition("/")
    return Row(
        model,
        regime,
        task.load,
        task.requests_per_s,
        task.seed,
        task.scheduler,
        p50_s=float(np.quantile(ttfts_s, 0.5)),
        p99_s=float(np.quantile(ttfts_s, 0.99)),
        small_p99_s=float(np.quantile(ttfts_s[result.size_thirds() == 0], 0.99)),
        longest_wait_s=float(waits_s.max()),
    )


def limit_of(cell: str) -> Limit:
    """FIFO's limit, by bisection between a light load and the first one that it does not hold."""
    slo_s = _SLO_LATENCIES * _simulated(cell, _UNLOADED_RATE, 0, "fifo").summary()["e2e_mean_s"]

    def holds(requests_per_s: float) -> bool:
        left_s = slo_s * len(_LIMIT_SEEDS)
        for seed in _LIMIT_SEEDS:
            left_s -= _simulated(cell, requests_per_s, seed, "fifo").summary()["ttft_p99_s"]
            if left_s < 0:
                return False
        return True

    low, high = 0.0, TRAFFIC[cell.partition("/")[0]].light_per_s
    while holds(high):  # In small steps: the deeper the overload, the longer a run takes.
        low, high = high, 1.25 * high
    while high - low > _PRECISION * high:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return Limit(float(f"{slo_s:.2g}"), float(f"{low:.3g}"))


def ratios(rows: Sequence[Row]) -> dict[tuple[str, float, str], Ratios]:
    """(cell, load, scheduler) -> ``Ratios``; ``fifo`` itself is left out."""
    by_run = {(_cell(row), row.load, row.scheduler, row.seed): row for row in rows}
    found = {}
    for cell, load, scheduler in dict.fromkeys((_cell(row), row.load, row.scheduler) for row in rows):
        if scheduler == "fifo":
            continue
        seeds = [seed for *key, seed in by_run if key == [cell, load, scheduler]]
        pairs = [(by_run[cell, load, scheduler, seed], by_run[cell, load, "fifo", seed]) for seed in seeds]
        found[cell, load, scheduler] = Ratios(
            *_mean_and_worst([(mine.p99_s, other.p99_s) for mine, other in pairs]),
            *_mean_and_worst([(mine.small_p99_s, other.small_p99_s) for mine, other in pairs]),
            _mean_and_worst([(mine.longest_wait_s, other.longest_wait_s) for mine, other in pairs])[0],
        )
    return found


def _cell(row: Row) -> str:
    return f"{row.model}/{row.regime}"


def _mean_and_worst(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    mine, others = zip(*pairs, strict=True)
    return sum(mine) / sum(others), max(one / other for one, other in pairs)


def _chosen(cells: Sequence[str]) -> list[str]:
    if unknown := [cell for cell in cells if cell not in CELLS]:
        raise SchedulersError(f"no cell {unknown[0]!r}: choose of {', '.join(CELLS)}")
    return list(cells) or list(CELLS)


def _simulated(cell: str, requests_per_s: float, seed: int, scheduler: str) -> RunResult:
    model, _, regime_name = cell.partition("/")
    traffic, regime = TRAFFIC[model], REGIMES[model][regime_name]
    costs = load_cost_model(traffic.cost_model)
    content = costs.model_dump()
    content["memory"]["pool_blocks"] = regime.pool_blocks or costs.memory.pool_blocks
    content["limits"]["max_num_seqs"] = regime.max_num_seqs or costs.limits.max_num_seqs
    scenario = Scenario(
        cost_model=traffic.cost_model,
        workload=WorkloadConfig(
            requests_per_s=requests_per_s,
            duration_s=traffic.warmup_s + traffic.duration_s,
            warmup_s=traffic.warmup_s,
            length_scale=traffic.length_scale,
        ),
        policy=PolicySettings(scheduler=scheduler, predictor_accuracy=_ACCURACY),
        engine=regime.engine,
        seed=seed,
    )
    return simulate(scenario, CostModel.model_validate(content))


def _print_tables(rows: Sequence[Row]) -> None:
    found = ratios(rows)
    schedulers = [name for name in SCHEDULERS if name != "fifo"]
    print("P99 TTFT in s of fifo; of the others over fifo's: P99 (worst seed), small requests' P99, longest wait")
    print(f"{'cell':24} {'load':>5} {'fifo':>8}" + "".join(f"{name:>26}" for name in schedulers))
    for cell, load in dict.fromkeys((_cell(row), row.load) for row in rows):
        fifo = [row.p99_s for row in rows if (_cell(row), row.load, row.scheduler) == (cell, load, "fifo")]
        cells = [found[cell, load, name] for name in schedulers]
        text = "".join(
            f"{one.p99:9.2f} ({one.worst_p99:4.2f}){one.small_p99:5.2f}{one.longest_wait:5.2f}" for one in cells
        )
        print(f"{cell:24} {load:5g} {sum(fifo) / len(fifo):8.3f}{text}")
    print()
    for goal in goals(found):
        print(goal)


def goals(found: Mapping[tuple[str, float, str], Ratios]) -> list[str]:
    """What ``chameleon`` is to hold against ``fifo``, and whether it does."""
    mine = {(cell, load): one for (cell, load, scheduler), one in found.items() if scheduler == "chameleon"}
    steady = {key: one.p99 for key, one in mine.items() if key[1] <= 1.0}
    overload = {key: one.p99 for key, one in mine.items() if key[1] > 1.0}
    small = {key: one.small_p99 for key, one in mine.items() if key[1] >= _BUSY_LOAD}
    waits = {key: one.longest_wait for key, one in mine.items()}
    judged = (
        ("P99 in each cell up to load 1.0", 1.03, steady),
        ("P99 in each cell above load 1.0", 1.05, overload),
        (f"small requests' P99 in each cell from load {_BUSY_LOAD:g}", 0.95, small),
        ("longest wait in each cell", 1.25, waits),
    )
    lines = [
        _judgement(what, most, max(values, key=lambda key: values[key]), values)
        for what, most, values in judged
        if values
    ]
    if small:
        mean = sum(small.values()) / len(small)
        lines.append(f"small requests' P99, mean of these cells: {mean:.3f} (at most 0.85: {_yes(mean <= 0.85)})")
    return lines


def _judgement(what: str, most: float, worst: tuple[str, float], values: Mapping[tuple[str, float], float]) -> str:
    mean, cell = sum(values.values()) / len(values), f"{worst[0]} at {worst[1]:g}"
    kept = sum(value <= most for value in values.values())
    return f"{what}: at most {most} in {kept} of {len(values)}; mean {mean:.3f}, worst {values[worst]:.3f} ({cell})"


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"
