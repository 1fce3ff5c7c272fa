"""Grids, plans and the paper's table, on small runs."""

import json

import pytest

from chameleon_ray.sim import grid
from chameleon_ray.sim.costs import load_cost_model
from chameleon_ray.sim.plan import PlanError, plan
from chameleon_ray.sim.scenario import Scenario, simulate
from experiments.paper import reproduce as paper

YAML = """
workload: {requests_per_s: 6.0, duration_s: 20.0, warmup_s: 2.0, length_scale: 0.34}
grid:
  policy.scheduler: [fifo, chameleon]
  workload.requests_per_s: [2.0, 4.0]
"""


@pytest.fixture
def scenario_file(tmp_path):
    def write(text):
        path = tmp_path / "scenario.yaml"
        path.write_text(text)
        return path

    return write


def test_a_grid_runs_every_combination(scenario_file, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert grid.run(scenario_file(YAML), out, num_workers=1) == 0
    runs = json.loads(out.read_text())["runs"]
    assert [list(run["settings"].values()) for run in runs] == [
        ["fifo", 2.0], ["fifo", 4.0], ["chameleon", 2.0], ["chameleon", 4.0]
    ]  # fmt: skip
    assert all(run["figures"]["finished"] == run["figures"]["requests"] > 0 for run in runs)
    assert "policy.scheduler=chameleon  workload.requests_per_s=4.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "not a mapping"),
        ("workload: {requests_per_s: 6.0}\ngrid: {policy.speed: [1]}", "policy.speed"),
        ("workload: {requests_per_s: 6.0}\ngrid: {seed: 5}", "lists of values"),
        ("workload: {requests_per_s: 6.0}\ngrid: {seed.deep: [5]}\nseed: 1", "seed is not a mapping"),
        ("workload: [", "scenario.yaml"),
    ],
)
def test_bad_scenario_files_are_refused_with_the_setting(scenario_file, text, message):
    with pytest.raises(grid.ScenarioError, match=message):
        grid.load_grid(scenario_file(text))


def test_a_plan_is_the_smallest_number_that_holds_and_names_what_binds():
    costs = load_cost_model("a40-llama-7b")
    scenario = Scenario.model_validate(
        {"workload": {"requests_per_s": 18.0, "duration_s": 30.0, "warmup_s": 5.0, "length_scale": 0.34}}
    )
    found = plan(scenario, costs, slo_s=1.5)
    assert 2 <= found.num_replicas <= 8
    assert found.ttft_p99_s <= 1.5
    assert found.binds in ("memory", "compute")
    workload = scenario.workload.model_copy(update={"requests_per_s": 18.0 / (found.num_replicas - 1)})
    fewer = simulate(scenario.model_copy(update={"workload": workload}), costs)
    assert fewer.summary()["ttft_p99_s"] > 1.5


def test_much_traffic_takes_proportionally_many_replicas_and_no_overloaded_runs(monkeypatch):
    costs = load_cost_model("a40-llama-7b")
    runs = []

    def recorded(scenario, costs):
        runs.append(scenario.workload.requests_per_s)
        return simulate(scenario, costs)

    monkeypatch.setattr("chameleon_ray.sim.plan.simulate", recorded)
    found = {}
    for rate in (30.0, 3000.0):
        workload = {"requests_per_s": rate, "duration_s": 20.0, "warmup_s": 4.0, "length_scale": 0.34}
        found[rate] = plan(Scenario.model_validate({"workload": workload}), costs, slo_s=2.0).num_replicas
    assert found[3000.0] == pytest.approx(100 * found[30.0], rel=0.35)
    assert len(runs) < 40
    assert max(runs) < 20.0


def test_an_slo_that_nothing_holds_is_an_error():
    costs = load_cost_model("a40-llama-7b")
    scenario = Scenario.model_validate({"workload": {"requests_per_s": 8.0, "duration_s": 30.0, "warmup_s": 1.0}})
    with pytest.raises(PlanError, match="still miss"):
        plan(scenario, costs, slo_s=0.01)


@pytest.mark.parametrize(
    ("paper_figure", "ours", "better", "holds"),
    [
        (-24.6, -19.7, "lower", True),
        (-24.6, -19.5, "lower", False),
        (-24.6, -60.0, "lower", True),
        (50.0, 45.1, "higher", True),
        (50.0, 44.9, "higher", False),
        (28.6, 35.0, "equal", False),
    ],
)
def test_a_row_holds_within_five_points_or_better(paper_figure, ours, better, holds):
    assert paper.Row("row", paper_figure, ours, better=better).holds is holds


def test_an_experiment_repeats_and_its_figures_make_sense():
    effort = paper.Effort(duration_s=200.0, num_seeds=1)  # In 40 s most requests are the first of their adapter.
    slora, chameleon = (paper.measure(paper.Experiment(name, 6.0), effort) for name in ("S-LoRA", "Chameleon"))
    assert paper.measure(paper.Experiment("S-LoRA", 6.0), effort) == slora
    assert chameleon.hit_rate > slora.hit_rate + 0.2
    assert chameleon.ttft_p50_s < slora.ttft_p50_s


def test_in_slora_s_own_setting_memory_binds_and_a_cache_outside_the_pool_pays():
    effort = paper.Effort(duration_s=100.0, num_seeds=1, setting="slora-defaults")
    slora, chameleon = (paper.measure(paper.Experiment(name, 8.0), effort) for name in ("S-LoRA", "Chameleon"))
    assert chameleon.ttft_p99_s < 0.7 * slora.ttft_p99_s
    with pytest.raises(ValueError, match="fitted, slora-defaults"):
        paper.run(effort=paper.Effort(setting="vllm-defaults"))
