"""The highest load under the objective: of vLLM as it comes, of fifo + lru, and of Chameleon.

``stock``: vLLM's adapter slots, first come first served. ``fifo+lru``: adapters in KV memory, kept by last use,
requests first come first served. ``chameleon``: the defaults. All on this machine in one run, loaded in turn; the
objective is the paper's, 5 x the mean unloaded latency (the fastest engine's: being slow must not earn a lenient one).

A stock engine on a CPU serves about one request a second, so that its search begins low and each of its loads is judged
by fewer requests (``--min-requests``) than the others'.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.load_plot import plot
from benchmarks.servers import Engine
from benchmarks.session import Results, Running, add_common, names_of, run_comparison
from benchmarks.setting import Setting
from benchmarks.state import read_state
from chameleon_ray.bench.load.comparison import Comparison, Objective, Windows
from chameleon_ray.bench.load.measure import Load
from chameleon_ray.bench.load.search import SearchOptions
from chameleon_ray.engine.paged.options import PagedSettings

STOCK, PLAIN, CHAMELEON = ENGINES = ("stock", "fifo+lru", "chameleon")
BURST_REQUESTS, STOCK_BURST_REQUESTS, BURST_LIMIT_S = 150, 12, 60.0
START_SHARE = 0.7
"""Of the rate of a burst: where the search begins."""
MAX_PER_S = 1000.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument_group("what to measure").add_argument
    add("--slo-factor", type=float, default=5.0, help="objective: times the lowest unloaded mean latency (5)")
    add("--slo-s", type=float, help="objective in seconds instead")
    add("--slo-metric", choices=("ttft", "e2e"), default="ttft", help="what must stay below it (ttft)")
    add("--slo-percent", type=float, default=99.0, help="percent of the requests that must (99)")
    add("--num-windows", type=int, default=2, help="windows per load and engine, in turn (2)")
    add("--window-s", type=float, default=20.0, help="length of one; at least 10 objectives (20)")
    add("--min-requests", type=int, default=50, help="windows are added until a load has so many requests (50)")
    add("--precision", type=float, default=0.08, help="relative width at which the search ends (0.08)")
    add("--learn-s", type=float, default=30.0, help="requests that are not reported before (30)")
    add("--unloaded-requests", type=int, default=20, help="sent one by one to learn unloaded latencies (20)")
    add("--engines", type=names_of(ENGINES), default=ENGINES, metavar="E,E", help="which (all three)")
    add_common(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; the exit status."""
    return run_comparison(arguments, lambda setting: engines(setting, arguments.engines), _measure, _draw)


def engines(setting: Setting, names: Sequence[str]) -> list[Engine]:
    """The named engines."""
    share = setting.adapter_memory_share
    settings = {
        STOCK: None,
        PLAIN: PagedSettings(adapter_memory_share=share, scheduler="fifo", adapter_policy="lru"),
        CHAMELEON: PagedSettings(adapter_memory_share=share),
    }
    return [Engine(name, settings[name]) for name in names]


def summary(highest: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The highest loads and their ratios, a line each."""
    held = {name: found["held_per_s"] for name, found in highest.items()}
    lines = [f"{'highest load under the SLO':28}{'requests/s':>12}"]
    lines += [f"  {name:26}{'none' if rate is None else f'{rate:.2f}':>12}" for name, rate in held.items()]
    ours = held.get(CHAMELEON)
    for name, rate in held.items():
        if name != CHAMELEON and ours and rate:
            lines.append(f"{CHAMELEON} holds {ours / rate:.2f} times the load of {name}")
    return lines


async def _measure(running: Running) -> None:
    arguments, bench, results = running.arguments, running.bench, running.results
    names = [target.name for target in running.targets]
    results |= {"unloaded": {}, "highest_load": {}}
    rates: dict[str, float] = {}
    for name in names:
        # all at once make a stock engine so slow that none ends for long
        num_requests = STOCK_BURST_REQUESTS if name == STOCK else BURST_REQUESTS
        rates |= await bench.burst([name], num_requests, BURST_LIMIT_S)
    results["burst_per_s"] = rates
    print("a burst is served at " + ", ".join(f"{rate:.1f}/s ({name})" for name, rate in rates.items()), flush=True)
    learning = {name: Load(START_SHARE * rates[name], 1, arguments.learn_s, 60.0) for name in names if name != STOCK}
    await bench.loaded(learning)
    for target in running.targets:
        if target.name != STOCK:
            print(f"{target.name} has learned: {read_state(target).describe()}", flush=True)
    objective = Objective(arguments.slo_metric, arguments.slo_percent, arguments.slo_factor, arguments.slo_s)
    windows = Windows(arguments.num_windows, arguments.window_s, 60.0, arguments.min_requests)
    comparison = Comparison(bench, running.bar, objective, windows, results)
    await comparison.measure_unloaded(arguments.unloaded_requests)
    await comparison.search(
        {name: SearchOptions(START_SHARE * rates[name], MAX_PER_S, arguments.precision) for name in names}
    )
    print("\n" + "\n".join(summary(results["highest_load"])))
    print(f"load average of this machine {os.getloadavg()[0]:.1f}", flush=True)


def _draw(path: Path, results: Results) -> None:
    plot(path, results["loads"], results.get("slo"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.capacity", description=__doc__)
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
