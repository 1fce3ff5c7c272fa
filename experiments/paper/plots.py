"""Plots like the paper's figures, of what ``python -m experiments.paper --json`` writes."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chameleon_ray.sim.plots import PlotError, draw_bars, draw_line, load_pyplot, log_scale, save


def plot_paper(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Figures of the paper from the command's JSON; returns the files. Raises PlotError for another JSON."""
    pyplot = load_pyplot()
    tables, slo_s = content["tables"], content["slo_s"]
    written = []
    for name, (beginning, draw) in _PAPER.items():
        title = next((title for title in tables if title.startswith(beginning)), None)
        if title is None:
            raise PlotError(f"there is no table {beginning!r}: the JSON is of another version")
        figure = draw(pyplot, title, tables[title], slo_s)
        written.append(folder / f"{name}.png")
        save(pyplot, figure, written[-1])
    return written


def _ttft(pyplot: Any, _: str, table: Mapping[str, Mapping[str, Sequence[float]]], slo_s: float) -> Any:
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharex=True)
    for index, (axis, title) in enumerate(zip(axes, ("P50", "P99"), strict=True)):
        for number, (system, points) in enumerate(table.items()):
            xs = [float(rate) for rate in points]
            draw_line(axis, number, xs, [values[index] for values in points.values()], system)
        axis.set(xlabel="requests per second", ylabel=f"TTFT {title} (s)")
        log_scale(pyplot, axis)
        axis.grid(alpha=0.3)
    axes[1].axhline(slo_s, color="grey", linestyle="--", label="SLO")
    axes[1].legend(fontsize=9)
    return figure


def _throughput(pyplot: Any, _: str, table: Mapping[str, float], slo_s: float) -> Any:
    models = list(dict.fromkeys(name.partition(", ")[2] for name in table))
    widths = [sum(name.endswith(model) for name in table) for model in models]
    figure, axes = pyplot.subplots(
        1, len(models), figsize=(11, 4.5), squeeze=False, gridspec_kw={"width_ratios": [width + 1 for width in widths]}
    )
    for axis, model in zip(axes[0], models, strict=True):
        draw_bars(axis, {name.partition(", ")[0]: rate for name, rate in table.items() if name.endswith(model)})
        axis.set(title=model, ylabel=f"requests per second with P99 TTFT within {slo_s:g} s")
    return figure


def _grouped(pyplot: Any, title: str, table: Mapping[str, Sequence[float]], slo_s: float) -> Any:
    """Groups of bars: one group for each of the title's ticks, one bar for each entry."""
    ticks = _ticks(title)
    figure, axis = pyplot.subplots(figsize=(9, 4.5))
    width = 0.8 / len(table)
    for number, (name, values) in enumerate(table.items()):
        xs = [group + (number - (len(table) - 1) / 2) * width for group in range(len(values))]
        axis.bar(xs, values, width, label=name)
    axis.set_xticks(range(len(ticks)), ticks)
    axis.set(ylabel="TTFT P99 (s)", title=_without_ticks(title))
    axis.grid(axis="y", alpha=0.3)
    axis.margins(y=0.18)
    axis.legend(fontsize=9, loc="upper left", ncols=len(table))
    return figure


def _over_ticks(pyplot: Any, title: str, table: Mapping[str, Sequence[float]], slo_s: float) -> Any:
    """Lines over the title's numbers."""
    xs = [float(tick.rstrip("%")) for tick in _ticks(title)]
    figure, axis = pyplot.subplots(figsize=(7.5, 4.5))
    for number, (name, values) in enumerate(table.items()):
        draw_line(axis, number, xs, values, name.replace("_", " "))
    axis.axhline(slo_s, color="grey", linestyle="--", label="SLO")
    axis.set(ylabel="TTFT P99 (s)", title=_without_ticks(title), xlabel=_without_ticks(title).rpartition(" by ")[2])
    axis.set_xticks(xs, _ticks(title))
    log_scale(pyplot, axis)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    return figure


def _popularity(pyplot: Any, title: str, table: Mapping[str, float], slo_s: float) -> Any:
    """The entries' names are "system, popularity of ranks / within a rank": a group of bars for each popularity."""
    by_system: dict[str, list[float]] = {}
    for name, value in table.items():
        by_system.setdefault(name.partition(", ")[0], []).append(value)
    mixes = list(dict.fromkeys(name.partition(", ")[2].replace("_", " ") for name in table))
    figure = _grouped(pyplot, f"{title.replace('/', 'and')} {'/'.join('_' * len(mixes))}", by_system, slo_s)
    figure.axes[0].set_xticks(range(len(mixes)), mixes)
    return figure


_PAPER: dict[str, tuple[str, Callable[..., Any]]] = {
    "ttft_by_load": ("TTFT P50, P99", _ttft),
    "throughput": ("highest requests/s", _throughput),
    "eviction_by_rank": ("P99 TTFT in s by rank", _grouped),
    "number_of_adapters": ("P99 TTFT in s at", _over_ticks),
    "predictor_accuracy": ("P99 TTFT in s by predictor accuracy", _over_ticks),
    "queues": ("P99 TTFT in s by queues", _grouped),
    "popularity": ("P99 TTFT in s, medium load, by popularity", _popularity),
}
"""File -> (how its table's title begins, how it is drawn)."""


def _ticks(title: str) -> list[str]:
    """The values of a title such as "... by rank 8/16/32": what the table's columns are."""
    found = re.search(r"(\S+(?:/\S+)+?)(?=,|$| load)", title)
    if found is None:
        raise PlotError(f"the table {title!r} does not say what its columns are")
    values = found[1].split("/")
    unit = "%" if values[-1].endswith("%") else ""
    return [value.rstrip("%") + unit for value in values]


def _without_ticks(title: str) -> str:
    return re.sub(r"\s*\S+(?:/\S+)+?(?=,|$| load)", "", title).replace(" in s", "")
