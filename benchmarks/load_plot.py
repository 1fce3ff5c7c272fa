"""Latencies over load, drawn from what ``chameleon bench serve --json`` or ``benchmarks.capacity`` has measured."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from chameleon_ray.bench.load.errors import LoadError
from chameleon_ray.bench.load.workload import SIZE_CLASSES
from chameleon_ray.sim import plots

Figures = Mapping[str, Any]


def load_pyplot() -> Any:
    """Matplotlib, which is an optional extra. Raises LoadError without it."""
    try:
        return plots.load_pyplot()
    except plots.PlotError as error:
        raise LoadError(f"--plot: {error}") from error


def _class_of(name: str, load: Figures) -> Figures:
    return dict(load["by_class"][name])


def plot(path: Path, loads: Sequence[Figures], slo: Mapping[str, Any] | None) -> None:
    """P99 against load, one line per target: TTFT, TBT, end-to-end, then TTFT by size class. Hollow: client late."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8), sharex=True)
    panels: list[tuple[str, str, Callable[[Figures], Figures]]] = [
        ("TTFT", "ttft", lambda load: load),
        ("TBT", "tbt", lambda load: load),
        ("end-to-end", "e2e", lambda load: load),
        *((f"TTFT, {name} requests", "ttft", partial(_class_of, name)) for name in SIZE_CLASSES),
    ]
    for axis, (title, metric, group_of) in zip(axes.flat, panels, strict=True):
        for number, target in enumerate(dict.fromkeys(load["target"] for load in loads)):
            mine = sorted((load for load in loads if load["target"] == target), key=lambda load: load["rate_per_s"])
            values = [(load, group_of(load)[metric]["p99_ms"]) for load in mine]
            points = [(load["rate_per_s"], value, load["client_late"]) for load, value in values if value is not None]
            xs, ys = [point[0] for point in points], [point[1] for point in points]
            axis.plot(xs, ys, color=f"C{number}", label=target)
            for x, y, is_late in points:
                axis.plot(x, y, "o", color=f"C{number}", fillstyle="none" if is_late else "full")
        if slo and metric == slo["metric"]:
            axis.axhline(slo["limit_s"] * 1e3, color="grey", linestyle="--", label="SLO")
        axis.set(title=title, ylabel="p99 (ms)", yscale="log")
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("requests per second")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load_plot", description=__doc__)
    parser.add_argument("results", type=Path, help="JSON file")
    parser.add_argument("image", type=Path, help="file to draw (.png, .svg, .pdf)")
    given = parser.parse_args()
    results = json.loads(given.results.read_text())
    plot(given.image, results["loads"], results.get("slo"))
