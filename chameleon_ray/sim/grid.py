"""``chameleon sim``: one scenario, or a grid of them, from a YAML file.

The file is a ``Scenario`` in YAML; a ``grid`` key beside it maps dotted names of settings to lists of values, and every
combination is run:

    workload: {requests_per_s: 8.0, length_scale: 0.34}
    grid:
      policy.scheduler: [fifo, chameleon]
      workload.requests_per_s: [6.0, 8.0, 9.0]
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from chameleon_ray.sim import plots
from chameleon_ray.sim.costs import load_cost_model
from chameleon_ray.sim.parallel import map_tasks
from chameleon_ray.sim.scenario import Scenario, simulate

_COLUMNS = {
    "ttft_p50_s": "TTFT P50",
    "ttft_p99_s": "P99",
    "tbt_mean_s": "TBT",
    "e2e_mean_s": "E2E",
    "queue_mean_s": "queued",
    "hit_rate": "hits",
    "loads_per_request": "loads/req",
    "preemptions": "preempted",
    "busy_share": "busy",
    "finished": "finished",
}


class ScenarioError(ValueError):
    """The scenario file cannot be used; the message names the file, the setting and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class GridPoint:
    """One combination. settings: the values that the grid gave it, by dotted name."""

    settings: dict[str, Any]
    scenario: Scenario


def run(
    path: Path, json_path: Path | None = None, num_workers: int | None = None, plot_path: Path | None = None
) -> int:
    """Simulate every combination, print a table, write ``json_path`` and ``plot_path`` when given; the exit status.

    Raises ScenarioError, CostModelError, TraceError, PlotError before or while anything runs.
    """
    points = load_grid(path)
    if plot_path is not None:
        plots.check_file(plot_path)
    for name in {point.scenario.cost_model for point in points}:
        load_cost_model(name)
    summaries = map_tasks(_summary, [point.scenario for point in points], "simulating", num_workers)
    _print_table(points, summaries)
    runs = [
        {"settings": point.settings, "scenario": point.scenario.model_dump(mode="json"), "figures": summary}
        for point, summary in zip(points, summaries, strict=True)
    ]
    if plot_path is not None:
        plots.plot_grid(runs, plot_path)
    if json_path is not None:
        json_path.write_text(json.dumps({"runs": runs}, indent=2) + "\n", encoding="utf-8")
    return 0


def load_grid(path: Path) -> list[GridPoint]:
    """Every combination of the file. Raises ScenarioError."""
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ScenarioError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ScenarioError(f"{path} is not a mapping of settings: see chameleon_ray/sim/grid.py for an example")
    grid = content.pop("grid", None) or {}
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        raise ScenarioError(f"{path}: grid maps dotted names of settings to lists of values")
    points = []
    for values in product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        merged = json.loads(json.dumps(content))
        for name, value in settings.items():
            _put(merged, str(name).split("."), value, path)
        try:
            points.append(GridPoint(settings, Scenario.model_validate(merged)))
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ScenarioError(f"{path}: {problems}") from None
    return points


def _put(content: dict[str, Any], keys: Sequence[str], value: Any, path: Path) -> None:
    for key in keys[:-1]:
        content = content.setdefault(key, {})
        if not isinstance(content, dict):
            raise ScenarioError(f"{path}: grid names {'.'.join(keys)}, but {key} is not a mapping")
    content[keys[-1]] = value


def _summary(scenario: Scenario) -> dict[str, float]:
    return simulate(scenario).summary()


def _print_table(points: Sequence[GridPoint], summaries: Sequence[Mapping[str, float]]) -> None:
    labels = ["  ".join(f"{name}={value}" for name, value in point.settings.items()) or "run" for point in points]
    width = max(10, *(len(label) for label in labels))
    print(f"{'times in s':{width}}" + "".join(f"{title:>11}" for title in _COLUMNS.values()))
    for label, summary in zip(labels, summaries, strict=True):
        print(f"{label:{width}}" + "".join(f"{summary[key]:11.4g}" for key in _COLUMNS))
