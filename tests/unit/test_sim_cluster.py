"""Simulated clusters: nobody is lost through deaths and joins, and routing policies differ as they should."""

import json

import pytest
from pydantic import ValidationError

from chameleon_ray import cli
from chameleon_ray.policy.adapter import Tier
from chameleon_ray.routing.replica_load import ReplicaLoad
from chameleon_ray.sim.cluster import ClusterScenario, capacity, scenario_of, simulate_cluster
from chameleon_ray.sim.routers import ROUTERS, Hints
from chameleon_ray.sim.scenario import PolicySettings
from chameleon_ray.sim.workload import AdapterMix, WorkloadConfig


def cluster(routing="affinity", num_replicas=4, rate=16.0, duration_s=20.0, count=200, **settings):
    return ClusterScenario(
        workload=WorkloadConfig(
            requests_per_s=rate,
            duration_s=duration_s,
            warmup_s=5.0,
            length_scale=0.34,
            adapters=AdapterMix(count=count, base_share=0.05),
        ),
        policy=PolicySettings(predictor_accuracy=0.8),
        routing=routing,
        num_replicas=num_replicas,
        **settings,
    )


@pytest.mark.parametrize("routing", ROUTERS)
def test_every_request_is_answered_through_deaths_and_joins(routing):
    result = simulate_cluster(cluster(routing, failures_s=[8.0, 12.0], joins_s=[9.0, 13.0], hint_delay_s=0.2))
    assert result.requests > 200
    assert result.retries > 0
    assert result.refused == 0


def test_all_replicas_dead_is_waited_out_until_one_joins():
    result = simulate_cluster(cluster(num_replicas=1, rate=4.0, duration_s=10.0, failures_s=[6.0], joins_s=[8.0]))
    assert result.requests > 15
    assert result.ttft_p99_s > 1.0


def test_affinity_keeps_adapters_together_and_random_routing_copies_them():
    affinity, random = (simulate_cluster(cluster(routing)) for routing in ("affinity", "random"))
    assert affinity.hit_rate > random.hit_rate + 0.1
    assert affinity.copies < random.copies
    assert affinity.loads_per_request < random.loads_per_request


def test_the_same_seed_gives_the_same_result():
    first = simulate_cluster(cluster(duration_s=8.0, seed=3))
    assert simulate_cluster(cluster(duration_s=8.0, seed=3)) == first
    assert simulate_cluster(cluster(duration_s=8.0, seed=4)) != first


def test_a_replica_is_not_known_to_have_an_adapter_on_disk_before_it_reports():
    hints = Hints()
    hints.join(0)
    assert hints.table.views["replica-0"].tier is Tier.ABSENT
    hints.report(0, ReplicaLoad())
    assert hints.table.views["replica-0"].tier is Tier.DISK
    hints.set_tier("a", 0, Tier.HOST)
    assert hints.held_by(0) == {"a": Tier.HOST}
    hints.set_tier("a", 0, Tier.DISK)
    assert hints.held_by(0) == {}


def test_unknown_routing_is_refused_with_the_choices():
    with pytest.raises(ValidationError, match="affinity, power_of_two"):
        cluster("best")


def test_deaths_that_leave_nobody_are_refused():
    with pytest.raises(ValidationError, match="leaves no replica alive"):
        cluster(num_replicas=2, failures_s=[1.0, 2.0])


def test_the_command_line_runs_the_policies_named_and_writes_their_figures(tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = ["--replicas", "3", "--adapters", "30", "--requests", "60", "--exponent", "0.5", "--drift-s", "2"]
    command = ["sim", "cluster", *arguments, "--routing", "random,affinity", "--json", str(out)]
    assert cli.main(command) == 0
    figures = json.loads(out.read_text())
    assert list(figures["routing"]) == ["random", "affinity"]
    assert figures["scenario"]["workload"]["adapters"]["exponent"] == 0.5
    assert figures["scenario"]["workload"]["adapters"]["drift_s"] == 2.0
    assert all(figures["routing"][name]["requests"] > 30 for name in ("random", "affinity"))
    assert "affinity" in capsys.readouterr().out


def test_rates_and_seeds_give_a_row_each_and_means_beside_power_of_two(tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = ["--replicas", "2", "--adapters", "20", "--requests", "60", "--rate", "0.5,1", "--seeds", "0,1"]
    assert cli.main(["sim", "cluster", *arguments, "--routing", "affinity,power_of_two", "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    runs = {(run["requests_per_s_each"], run["seed"], run["routing"]): run for run in figures["runs"]}
    assert runs.keys() == {(r, s, n) for r in (0.5, 1.0) for s in (0, 1) for n in ("affinity", "power_of_two")}
    assert [cell["requests_per_s_each"] for cell in figures["rates"]] == [0.5, 1.0]
    for cell in figures["rates"]:
        for name, means in cell["routing"].items():
            for key in ("ttft_p99_s", "loads_per_request"):
                of_seeds = [runs[cell["requests_per_s_each"], seed, name][key] for seed in (0, 1)]
                assert means[key] == pytest.approx(sum(of_seeds) / 2)
    assert figures["routing"] == figures["rates"][0]["routing"]
    printed = capsys.readouterr().out
    assert printed.count("P99 ratio") == 2 and "0.5/s each" in printed


def test_loads_are_shares_of_what_a_replica_serves_with_a_backlog(tmp_path):
    out = tmp_path / "out.json"
    traffic = ["--replicas", "2", "--adapters", "20", "--length-scale", "0.1"]
    assert cli.main(["sim", "cluster", *traffic, "--requests", "40", "--load", "0.5", "--json", str(out)]) == 0
    half = json.loads(out.read_text())["rates"][0]["requests_per_s_each"]
    most = capacity(
        scenario_of(num_replicas=1, num_requests=9, requests_per_s_each=1, num_adapters=20, length_scale=0.1)
    )
    assert half == pytest.approx(most / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--routing", "best"], "no routing policy 'best': choose from affinity"),
        (["--replicas", "0"], "must be more than 0"),
        (["--rate", "1.5,-1"], "must be more than 0"),
        (["--load", "0"], "must be more than 0"),
        (["--exponent", "-1"], "exponent: Input should be greater than or equal to 0"),
        (["--base-share", "1.5"], "base_share: Input should be less than or equal to 1"),
        (["--cost-model", "b200"], "no cost model 'b200'"),
    ],
)
def test_impossible_clusters_are_refused_with_the_setting(arguments, message, capsys):
    assert cli.main(["sim", "cluster", *arguments]) == 1
    assert message in capsys.readouterr().err
