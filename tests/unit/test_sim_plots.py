"""Plots: which files there are, what lies in them, and which requests for plots are refused."""

import builtins
from pathlib import Path

import pytest

from chameleon_ray.sim import grid, plots
from experiments.paper import plots as paper_plots
from experiments.paper import reproduce as paper
from experiments.paper.plots import plot_paper


@pytest.fixture
def paper_content():
    """What it writes, of made-up figures: latency grows with load, and with the place of a variant."""

    def figures(experiment):
        p99_s = 0.5 + experiment.requests_per_s / 4 + len(experiment.variant) + experiment.num_adapters / 100
        by_rank = tuple(p99_s + rank / 100 for rank in paper.RANKS)
        p50_s = p99_s / 5
        return paper.Figures(p50_s, p99_s, 0.8, 0.0, 0.0, by_rank, (5.0, 5.0, 5.0), (p50_s,), (p99_s,))

    found = {experiment: figures(experiment) for experiment in paper._experiments()}
    highest = {search: 8.0 + place for place, search in enumerate(paper._searches())}
    return {"rows": [], "tables": paper._tables(found, highest), "slo_s": paper.SLO_S}


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_papers_figures_are_drawn_one_file_each(paper_content, tmp_path):
    folder = plots.check_folder(tmp_path / "deep" / "folder")
    written = plot_paper(paper_content, folder)
    names = "ttft_by_load throughput eviction_by_rank number_of_adapters predictor_accuracy queues popularity"
    assert [path.stem for path in written] == names.split()
    assert all(is_png(path) for path in written)


def test_lines_are_where_the_tables_values_are(paper_content, monkeypatch, tmp_path):
    drawn = {}
    monkeypatch.setattr(paper_plots, "save", lambda pyplot, figure, path: drawn.__setitem__(path.stem, figure))
    plot_paper(paper_content, tmp_path)
    curves = next(table for title, table in paper_content["tables"].items() if title.startswith("TTFT P50, P99"))
    p99 = {line.get_label(): list(line.get_ydata()) for line in drawn["ttft_by_load"].axes[1].lines}
    assert p99["Chameleon"] == [values[1] for values in curves["Chameleon"].values()]
    assert p99["SLO"] == [paper.SLO_S] * 2
    over_adapters = drawn["number_of_adapters"].axes[0].lines[0]
    assert list(over_adapters.get_xdata()) == list(paper._ADAPTER_COUNTS)
    assert [label.get_text() for label in drawn["eviction_by_rank"].axes[0].get_xticklabels()] == [
        str(rank) for rank in paper.RANKS
    ]
    assert [label.get_text() for label in drawn["predictor_accuracy"].axes[0].get_xticklabels()] == [
        "60%",
        "80%",
        "100%",
    ]


YAML = """
workload: {requests_per_s: 6.0, duration_s: 8.0, warmup_s: 1.0, length_scale: 0.2}
grid:
  policy.scheduler: [fifo, chameleon]
"""


@pytest.mark.parametrize("sweep", ["", "  workload.requests_per_s: [2.0, 4.0]\n"])
def test_a_grid_is_drawn_with_and_without_a_numeric_setting(tmp_path, sweep):
    scenario, out = tmp_path / "scenario.yaml", tmp_path / "out.png"
    scenario.write_text(YAML + sweep)
    assert grid.run(scenario, num_workers=1, plot_path=out) == 0
    assert is_png(out)


def test_a_clusters_policies_are_drawn(tmp_path):
    figures = dict.fromkeys(plots._CLUSTER_PANELS, 1.5)
    plots.plot_cluster({"affinity": figures, "random": figures}, tmp_path / "out.svg")
    assert "<svg" in (tmp_path / "out.svg").read_text()


@pytest.mark.parametrize(("name", "message"), [("out.xyz", r"\.png"), ("out", r"\.png"), ("no/out.png", "no folder")])
def test_a_file_that_cannot_be_drawn_is_refused_before_anything_runs(tmp_path, name, message, monkeypatch):
    scenario = tmp_path / "scenario.yaml"
    scenario.write_text(YAML)
    monkeypatch.setattr(grid, "map_tasks", None)
    with pytest.raises(plots.PlotError, match=message):
        grid.run(scenario, plot_path=tmp_path / name)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(plots.PlotError, match=r"chameleon-ray\[bench\]"):
        plots.check_folder(Path("anywhere"))
