"""The four scheduling policies on real engines, under the same requests.

Demo model, many adapters, one machine, one run. Every engine is vLLM's own server with adapters in KV memory and the
same cache (``policy: chameleon``); only ``scheduler`` differs. The engines are loaded in turn, in windows of the same
requests; those that wait for their turn are idle and cost next to nothing.

1. A burst tells how much the engines serve at most (the median of them): the loads are shares of that.
2. Then all learn: requests at the medium load, not reported, teach predictor, sizes and quotas.
3. Low, medium and overload. An overload's queue grows for as long as its window lasts, under any policy: what
   counts is who waits.

Small, medium and large are thirds of the requests by size (the paper's WRS with the true output length). The queueing
delay is the engine's own: from its receipt of the request until it first runs it, waiting for the adapter included.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.load_plot import load_pyplot
from benchmarks.servers import Engine
from benchmarks.session import Results, Running, add_common, names_of, run_comparison
from benchmarks.setting import Setting
from benchmarks.state import PolicyState, read_state
from chameleon_ray.bench.load.client import Window
from chameleon_ray.bench.load.figures import summarize
from chameleon_ray.bench.load.measure import Load
from chameleon_ray.bench.load.targets import Target
from chameleon_ray.bench.load.workload import SIZE_CLASSES
from chameleon_ray.engine.paged.options import PagedSettings
from chameleon_ray.policy.disciplines import DISCIPLINES

BURST_REQUESTS, BURST_LIMIT_S = 200, 60.0
MAX_LATE_S = 0.05
LEVELS = ("low", "medium", "overload")
CELLS = (("p50", "ttft", "p50_ms"), ("p99", "ttft", "p99_ms"), ("queued", "queued", "mean_ms"))
"""Columns of a size class: title, and where it is in the figures."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument_group("what to measure").add_argument
    add(
        "--loads",
        type=_loads,
        default=(0.4, 0.8, 1.2),
        metavar="L,M,O",
        help="shares of the burst's rate (0.4,0.8,1.2)",
    )
    add("--rates", type=_loads, metavar="L,M,O", help="requests per second instead")
    add("--num-windows", type=int, default=2, help="windows per load and scheduler, in turn (2)")
    add("--window-s", type=float, default=25.0, help="length of one (25)")
    add("--learn-s", type=float, default=30.0, help="requests that are not reported before (30)")
    add("--drain-s", type=float, default=120.0, help="wait so long for answers after a window (120)")
    add("--schedulers", type=names_of(DISCIPLINES), default=tuple(DISCIPLINES), metavar="S,S", help="which (all four)")
    add_common(parser)


def _loads(text: str) -> tuple[float, ...]:
    loads = tuple(float(load) for load in text.split(","))
    if min(loads) <= 0:
        raise argparse.ArgumentTypeError("loads are above 0")
    return loads


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; the exit status."""
    return run_comparison(arguments, lambda setting: engines(setting, arguments.schedulers), _measure, draw)


def engines(setting: Setting, schedulers: Sequence[str]) -> list[Engine]:
    """One engine for each scheduler, alike in everything else."""
    return [
        Engine(
            name,
            PagedSettings(
                adapter_memory_share=setting.adapter_memory_share, scheduler=name, adapter_policy="chameleon"
            ),
        )
        for name in schedulers
    ]


def table(level: str, rate_per_s: float, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """One load: a row for each scheduler. rows: figures of ``summarize`` with ``squash_share``."""
    width = 9 * len(CELLS)
    head = "".join(f"{name:>{width}}" for name in (*SIZE_CLASSES, "all"))
    titles = "".join(f"{title:>9}" for title, _, _ in CELLS) * (len(SIZE_CLASSES) + 1)
    lines = [
        f"{level}: {rate_per_s:.3g} requests/s. Time to first token and mean queueing delay (the engine's own), in ms",
        f"  {'':12}{head}",
        f"  {'':12}{titles}  squashed  failed",
    ]
    for name, figures in rows.items():
        groups = [*(figures["by_class"][size] for size in SIZE_CLASSES), figures]
        cells = "".join(f"{_ms(group[metric][value]):>9}" for group in groups for _, metric, value in CELLS)
        lines.append(f"  {name:12}{cells}{figures['squash_share']:>10.1%}{figures['failed']:>8}")
        if figures["client_late"]:
            late_ms = figures["lateness"]["p99_ms"]
            lines.append(f"  {'':12}CLIENT LATE by {late_ms:.0f} ms (p99): something else uses this machine")
    return "\n".join(lines)


def draw(path: Path, results: Results) -> None:
    """P99 TTFT and mean queueing delay of each size class, a group of bars for each load."""
    pyplot = load_pyplot()
    names = list(dict.fromkeys(load["target"] for load in results["loads"]))
    levels = list(dict.fromkeys(load["level"] for load in results["loads"]))
    figure, axes = pyplot.subplots(2, len(SIZE_CLASSES), figsize=(14, 7))
    panels = (("p99 TTFT (ms)", "ttft", "p99_ms"), ("mean queueing delay (ms)", "queued", "mean_ms"))
    for row, (title, metric, value) in zip(axes, panels, strict=True):
        for axis, size in zip(row, SIZE_CLASSES, strict=True):
            for number, name in enumerate(names):
                mine = {
                    load["level"]: load["by_class"][size][metric][value]
                    for load in results["loads"]
                    if load["target"] == name
                }
                places = [place + (number - (len(names) - 1) / 2) * 0.8 / len(names) for place in range(len(levels))]
                axis.bar(places, [mine.get(level) or 0.0 for level in levels], 0.8 / len(names), label=name)
            axis.set(title=f"{size} requests", ylabel=title, yscale="symlog")
            axis.set_xticks(range(len(levels)), levels)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


async def _measure(running: Running) -> None:
    arguments, bench, results = running.arguments, running.bench, running.results
    names = [target.name for target in running.targets]
    loads = arguments.rates
    if loads is None:
        rates = await bench.burst(names, BURST_REQUESTS, BURST_LIMIT_S)
        results["burst_per_s"] = rates
        print("a burst is served at " + ", ".join(f"{rate:.1f}/s ({name})" for name, rate in rates.items()), flush=True)
        loads = tuple(share * median(rates.values()) for share in arguments.loads)
    learning = Load(sorted(loads)[len(loads) // 2], 1, arguments.learn_s, arguments.drain_s)
    await bench.loaded(dict.fromkeys(names, learning))
    before = _states(running.targets)
    for name, state in before.items():
        print(f"{name} has learned: {state.describe()}", flush=True)
    for level, rate in zip(_levels(loads), loads, strict=True):
        load = Load(rate, arguments.num_windows, arguments.window_s, arguments.drain_s)
        measured = await bench.loaded(dict.fromkeys(names, load))
        after = _states(running.targets)
        rows = {name: _row(measured[name], before[name], after[name]) for name in names}
        results["loads"] += [{"target": name, "level": level, "rate_per_s": rate, **row} for name, row in rows.items()]
        running.bar.close()
        print("\n" + table(level, rate, rows))
        for name, row in rows.items():
            print(f"  {name}: {row['hit_share']:.0%} found their adapter resident; {row['queues']}", flush=True)
        before = after
    print(f"\nload average of this machine {os.getloadavg()[0]:.1f}", flush=True)


def _row(windows: Sequence[Window], before: PolicyState, after: PolicyState) -> dict[str, Any]:
    totals = after.since(before)
    lookups = totals["adapter_hits"] + totals["adapter_misses"]
    return {
        **summarize(windows, None, MAX_LATE_S),
        "squash_share": totals["squashes"] / max(1, totals["admissions"]),
        "hit_share": totals["adapter_hits"] / max(1, lookups),
        "policy_totals": dict(totals),
        "queues": after.describe(),
    }


def _states(targets: Sequence[Target]) -> dict[str, PolicyState]:
    return {target.name: read_state(target) for target in targets}


def _levels(loads: Sequence[float]) -> list[str]:
    return list(LEVELS) if len(loads) == len(LEVELS) else [f"load {number + 1}" for number in range(len(loads))]


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schedulers", description=__doc__)
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
