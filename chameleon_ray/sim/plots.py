"""Plots of what the simulator's commands write as JSON."""

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
            draw_bars(axis, {label or "run": points[0][1][key] for label, points in lines.items()})
        for number, (label, points) in enumerate(lines.items() if swept is not None else ()):
            ordered = sorted((x, figures[key]) for x, figures in points)
            draw_line(axis, number, [x for x, _ in ordered], [y for _, y in ordered], label)
        if swept is not None:
            axis.set_xlabel(_axis_name(swept))
        if key.startswith("ttft"):
            log_scale(pyplot, axis)
        axis.set(ylabel=title)
        axis.grid(alpha=0.3)
    if swept is not None and any(lines):
        axes[0][0].legend(fontsize=8)
    save(pyplot, figure, path)


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
        draw_bars(axis, {name: figures[key] for name, figures in routing.items()})
        axis.set(title=title)
    save(pyplot, figure, path)


# What all draw with


def log_scale(pyplot: Any, axis: Any) -> None:
    """A logarithmic y axis with plain numbers."""
    axis.set_yscale("log")
    plain = pyplot.FuncFormatter(lambda value, _: f"{value:g}")  # 0.5 and 2 rather than powers of ten
    axis.yaxis.set_minor_locator(pyplot.LogLocator(subs=(1.5, 2, 3, 4, 5, 7)))
    axis.yaxis.set_major_formatter(plain)
    axis.yaxis.set_minor_formatter(plain)


def draw_line(axis: Any, number: int, xs: Sequence[float], ys: Sequence[float], label: str) -> None:
    """The ``number``-th line of a plot."""
    axis.plot(xs, ys, marker=_MARKERS[number % len(_MARKERS)], markersize=5, color=f"C{number}", label=label)


def draw_bars(axis: Any, values: Mapping[str, float]) -> None:
    """One bar each, with its value on top."""
    bars = axis.bar(range(len(values)), list(values.values()), 0.65, color=[f"C{n}" for n in range(len(values))])
    axis.bar_label(bars, fmt="{:.3g}", fontsize=8)
    is_long = max((len(name) for name in values), default=0) * len(values) > 45
    axis.set_xticks(
        range(len(values)), list(values), rotation=30 if is_long else 0, ha="right" if is_long else "center"
    )
    axis.grid(axis="y", alpha=0.3)
    axis.margins(y=0.12)


def save(pyplot: Any, figure: Any, path: Path) -> None:
    """Write the figure and forget it."""
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120)
    finally:
        pyplot.close(figure)
