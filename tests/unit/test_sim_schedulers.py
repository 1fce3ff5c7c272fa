"""Schedulers side by side: the same requests for all, ratios to FIFO, and what is to hold."""

import json
from dataclasses import replace

import pytest

from chameleon_ray.cli import main
from chameleon_ray.sim import schedulers
from chameleon_ray.sim.schedulers import CELLS, LIMITS, Ratios, Row, goals, ratios


def row(scheduler, seed=0, p99_s=1.0, small_p99_s=1.0, longest_wait_s=1.0, load=0.9):
    return Row("a40", "vllm", load, 9.0, seed, scheduler, 0.1, p99_s, small_p99_s, longest_wait_s)


def test_every_cell_has_a_limit():
    assert len(CELLS) == 10 and list(LIMITS) == list(CELLS)


def test_ratios_are_of_means_over_seeds_and_of_the_worst_seed():
    rows = [row("fifo"), row("fifo", 1, 3.0), row("chameleon", 0, 1.5, 0.5), row("chameleon", 1, 2.5, 0.7, 2.0)]
    assert ratios(rows) == {("a40/vllm", 0.9, "chameleon"): Ratios(1.0, 1.5, 0.6, 0.7, 1.5)}


def test_goals_name_the_worst_cell():
    found = {
        ("a40/vllm", 0.7, "chameleon"): Ratios(1.01, 1.1, 0.99, 1.0, 1.0),
        ("a40/slora", 0.9, "chameleon"): Ratios(1.04, 1.1, 0.90, 1.0, 1.3),
        ("a40/slora", 0.9, "sjf"): Ratios(9.0, 9.0, 0.1, 0.1, 9.0),
        ("a40/vllm", 1.1, "chameleon"): Ratios(1.04, 1.1, 0.78, 1.0, 1.0),
    }
    small = "small requests' P99 in each cell from load 0.9: at most 0.95 in 2 of 2; mean 0.840, worst 0.900"
    assert goals(found) == [
        "P99 in each cell up to load 1.0: at most 1.03 in 1 of 2; mean 1.025, worst 1.040 (a40/slora at 0.9)",
        "P99 in each cell above load 1.0: at most 1.05 in 1 of 1; mean 1.040, worst 1.040 (a40/vllm at 1.1)",
        f"{small} (a40/slora at 0.9)",
        "longest wait in each cell: at most 1.25 in 2 of 3; mean 1.100, worst 1.300 (a40/slora at 0.9)",
        "small requests' P99, mean of these cells: 0.840 (at most 0.85: yes)",
    ]


def test_the_command_writes_a_row_for_every_run(tmp_path, monkeypatch, capsys):
    short = {name: replace(traffic, duration_s=10.0, warmup_s=1.0) for name, traffic in schedulers.TRAFFIC.items()}
    monkeypatch.setattr(schedulers, "TRAFFIC", short)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    out = tmp_path / "rows.json"
    assert (
        main(["sim", "schedulers", "--cells", "a40/slora", "--loads", "0.9,1", "--seeds", "5", "--json", str(out)]) == 0
    )
    rows = json.loads(out.read_text())["rows"]
    assert [(one["load"], one["scheduler"]) for one in rows] == [
        (load, name) for load in (0.9, 1.0) for name in schedulers.SCHEDULERS
    ]
    assert all(0 < one["p50_s"] <= one["p99_s"] for one in rows)
    assert "a40/slora" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["a100/vllm", "a40"])
def test_an_unknown_cell_is_an_error_that_names_the_cells(wrong, capsys):
    assert main(["sim", "schedulers", "--cells", wrong]) == 1
    assert "cpu-demo/slora-tight" in capsys.readouterr().err
