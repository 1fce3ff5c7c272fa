"""``chameleon bench capacity``: the highest load under the objective, of vLLM as it comes, of ours, and of Chameleon.

``stock``: vLLM's adapter slots, first come first served. ``fifo+lru``: adapters in KV memory, kept by last use,
requests first come first served. ``chameleon``: the defaults. All on this machine in one run, loaded in turn; the
objective is the paper's, 5 x the mean unloaded latency (the fastest engine's: being slow must not earn a lenient one).

A stock engine on a CPU serves about one request a second, so that its search begins low and each of its loads is judged
by fewer requests (``--min-requests``) than the others'.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chameleon_ray.bench.compare.options import CHAMELEON, PLAIN, STOCK
from chameleon_ray.bench.compare.servers import Engine
from chameleon_ray.bench.compare.session import Results, Running, run_comparison
from chameleon_ray.bench.compare.setting import Setting
from chameleon_ray.bench.compare.state import read_state
from chameleon_ray.bench.load.comparison import Comparison, Objective, Windows
from chameleon_ray.bench.load.measure import Load
from chameleon_ray.bench.load.search import SearchOptions
from chameleon_ray.bench.load.show import plot
from chameleon_ray.engine.paged.options import PagedSettings

BURST_REQUESTS, STOCK_BURST_REQUESTS, BURST_LIMIT_S = 150, 12, 60.0
START_SHARE = 0.7
"""Of the rate of a burst: where the search begins."""
MAX_PER_S = 1000.0


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; the exit status."""
    return run_comparison(arguments, lambda setting: engines(setting, arguments.engines), _measure, _draw)


def engines(setting: Setting, names: Sequence[str]) -> list[Engine]:
    """The named engines."""
    share = setting.adapter_share
    settings = {
        STOCK: None,
        PLAIN: PagedSettings(memory_share=share, scheduler="fifo", policy="lru"),
        CHAMELEON: PagedSettings(memory_share=share),
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
    rates = {}
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
