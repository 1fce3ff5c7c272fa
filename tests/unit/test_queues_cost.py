"""What a step of the policy costs while requests queue: it does not look at each of them."""

import json
import random
from statistics import median

import pytest
from operations import Operations

from chameleon_ray.bench import policy as bench
from chameleon_ray.bench.policy import run


def cost_of_a_step(scenario: bench.Scenario, num_queued: int, monkeypatch: pytest.MonkeyPatch) -> float:
    """In bytecodes; the median over steps with a full batch."""
    monkeypatch.setattr(bench, "NUM_QUEUED", num_queued)
    replica, counts = bench._Replica(scenario, random.Random(0)), []
    for number in range(100):
        if number < 80:
            replica.step(number * bench.STEP_S)
            continue
        with Operations() as operations:
            replica.step(number * bench.STEP_S)
        assert replica.policy.num_running > 0 and replica.policy.num_waiting > num_queued - bench.MAX_RUNNING
        counts.append(operations.count)
    return median(counts)


@pytest.mark.parametrize("scenario", bench.SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_step_costs_the_same_with_four_times_as_many_queued_requests(
    scenario: bench.Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = [cost_of_a_step(scenario, num_queued, monkeypatch) for num_queued in (1000, 4000)]
    assert 0 < costs[1] < 1.5 * costs[0]


def test_the_command_measures_all_scenarios_and_prints_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "REPEATS", 1)
    path = tmp_path / "policy.json"
    assert run(path, num_steps=100) == 0
    results = json.loads(path.read_text())
    assert results["num_queued"] == 1000
    assert results["scheduler_step_us_p50"] > 0 and results["scheduler_step_us_p99"] > 0
    assert results["cache_plan_us_p50"] > 0 and results["router_rank_us_p50"] > 0
    assert all(scenario["admissions"] > 0 for scenario in results["scenarios"].values())
    assert "policy step, no room" in capsys.readouterr().out
