"""Plots like the paper's figures, of what the simulator's commands write as JSON."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Runs = Sequence[Mapping[str, Any]]

_SLANTED = {"rotation": 30, "ha": "right"}
_MARKERS = "osD^vPX"
_PANELS = {
    "ttft_p50_s": "TTFT P50 (s)",
    "ttft_p99_s": "TTFT P99 (s)",
    "tbt_mean_s": "time between tokens, mean (s)",
    "hit_rate": "adapter hit rate",
}
_CLUSTER_PANELS = {
    "ttft_p50_s": "TTFT P50 (s)",
    "ttft_p99_s": "TTFT P99 (s)",
    "hit_rate": "adapter hit rate",
    "loads_per_request": "loads per request",
    "copies": "copies per adapter",
    "imbalance": "busiest replica / mean",
}


class PlotError(ValueError):
    """Nothing can be plotted; the message says what to do."""


def load_pyplot() -> Any:
    """Matplotlib, which is an optional extra. Raises PlotError without it."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise PlotError("plots need matplotlib: pip install 'chameleon-ray[bench]'") from error
    return pyplot


def check_file(path: Path) -> Path:
    """The path, if a plot can be written there. Raises PlotError; before anything is simulated, that is."""
    pyplot = load_pyplot()
    figure = pyplot.figure()
    known = figure.canvas.get_supported_filetypes()
    pyplot.close(figure)
    if path.suffix.lstrip(".") not in known:
        raise PlotError(f"{path} does not say what kind of plot: end it in .png, .svg or .pdf")
    if not path.parent.is_dir():
        raise PlotError(f"there is no folder {path.parent} to write {path.name} in")
    return path


def check_folder(folder: Path) -> Path:
    """The folder, made if need be. Raises PlotError."""
    load_pyplot()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlotError(f"plots cannot go into {folder}: {error}") from None
    return folder


# `sim run`


def plot_grid(runs: Runs, path: Path) -> None:
    """runs: as in the JSON of ``sim run``. Lines over the numeric setting with the most values, one for each
    combination of the others; bars where no setting is numeric."""
    pyplot = load_pyplot()
    swept = _swept([run["settings"] for run in runs])
    lines: dict[str, list[tuple[Any, Mapping[str, float]]]] = {}
    for run in runs:
        others = {name: value for name, value in run["settings"].items() if name != swept}
        label = ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in others.items())
        lines.setdefault(label, []).append((run["settings"].get(swept), run["figures"]))
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5))
    for axis, (key, title) in zip(axes.flat, _PANELS.items(), strict=True):
        if swept is None:
            _bars(axis, {label or "run": points[0][1][key] for label, points in lines.items()})
        for number, (label, points) in enumerate(lines.items() if swept is not None else ()):
            ordered = sorted((x, figures[key]) for x, figures in points)
            _line(axis, number, [x for x, _ in ordered], [y for _, y in ordered], label)
        if swept is not None:
            axis.set_xlabel(_axis_name(swept))
        if key.startswith("ttft"):
            _log(pyplot, axis)
        axis.set(ylabel=title)
        axis.grid(alpha=0.3)
    if swept is not None and any(lines):
        axes[0][0].legend(fontsize=8)
    _save(pyplot, figure, path)


def _swept(settings: Sequence[Mapping[str, Any]]) -> str | None:
    values: dict[str, set[float]] = {}
    for one in settings:
        for name, value in one.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                values.setdefault(name, set()).add(value)
    found = max(values, key=lambda name: len(values[name]), default=None)
    return found if found is not None and len(values[found]) > 1 else None


def _axis_name(setting: str) -> str:
    name = setting.rpartition(".")[2]
    return "requests per second" if name == "requests_per_s" else name.replace("_", " ")


# `sim cluster`


def plot_cluster(routing: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """routing: figures by policy, as in the JSON of ``sim cluster``."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7.5))
    for axis, (key, title) in zip(axes.flat, _CLUSTER_PANELS.items(), strict=True):
        _bars(axis, {name: figures[key] for name, figures in routing.items()})
        axis.set(title=title)
    _save(pyplot, figure, path)


# `sim paper`


def plot_paper(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Figures of the paper from the JSON of ``sim paper``; returns the files. Raises PlotError for another JSON."""
    pyplot = load_pyplot()
    tables, slo_s = content["tables"], content["slo_s"]
    written = []
    for name, (beginning, draw) in _PAPER.items():
        title = next((title for title in tables if title.startswith(beginning)), None)
        if title is None:
            raise PlotError(f"there is no table {beginning!r}: the JSON is of another version")
        figure = draw(pyplot, title, tables[title], slo_s)
        written.append(folder / f"{name}.png")
        _save(pyplot, figure, written[-1])
    return written


def _ttft(pyplot: Any, _: str, table: Mapping[str, Mapping[str, Sequence[float]]], slo_s: float) -> Any:
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharex=True)
    for index, (axis, title) in enumerate(zip(axes, ("P50", "P99"), strict=True)):
        for number, (system, points) in enumerate(table.items()):
            xs = [float(rate) for rate in points]
            _line(axis, number, xs, [values[index] for values in points.values()], system)
        axis.set(xlabel="requests per second", ylabel=f"TTFT {title} (s)")
        _log(pyplot, axis)
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
        _bars(axis, {name.partition(", ")[0]: rate for name, rate in table.items() if name.endswith(model)})
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
        _line(axis, number, xs, values, name.replace("_", " "))
    axis.axhline(slo_s, color="grey", linestyle="--", label="SLO")
    axis.set(ylabel="TTFT P99 (s)", title=_without_ticks(title), xlabel=_without_ticks(title).rpartition(" by ")[2])
    axis.set_xticks(xs, _ticks(title))
    _log(pyplot, axis)
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


_PAPER = {
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


def _log(pyplot: Any, axis: Any) -> None:
    axis.set_yscale("log")
    plain = pyplot.FuncFormatter(lambda value, _: f"{value:g}")  # 0.5 and 2 rather than powers of ten
    axis.yaxis.set_minor_locator(pyplot.LogLocator(subs=(1.5, 2, 3, 4, 5, 7)))
    axis.yaxis.set_major_formatter(plain)
    axis.yaxis.set_minor_formatter(plain)


def _line(axis: Any, number: int, xs: Sequence[float], ys: Sequence[float], label: str) -> None:
    axis.plot(xs, ys, marker=_MARKERS[number % len(_MARKERS)], markersize=5, color=f"C{number}", label=label)


def _bars(axis: Any, values: Mapping[str, float]) -> None:
    """One bar each, with its value on top."""
    bars = axis.bar(range(len(values)), list(values.values()), 0.65, color=[f"C{n}" for n in range(len(values))])
    axis.bar_label(bars, fmt="{:.3g}", fontsize=8)
    is_long = max((len(name) for name in values), default=0) * len(values) > 45
    axis.set_xticks(
        range(len(values)), list(values), rotation=30 if is_long else 0, ha="right" if is_long else "center"
    )
    axis.grid(axis="y", alpha=0.3)
    axis.margins(y=0.12)


def _save(pyplot: Any, figure: Any, path: Path) -> None:
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120)
    finally:
        pyplot.close(figure)
