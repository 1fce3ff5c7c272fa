"""Measurements of several targets at given loads and the search for their highest, printed and kept as they come."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from chameleon_ray.bench.load.client import Window
from chameleon_ray.bench.load.errors import LoadError
from chameleon_ray.bench.load.figures import Slo, SloMetric, mean_s, summarize
from chameleon_ray.bench.load.measure import Bench, Load
from chameleon_ray.bench.load.search import RateSearch, SearchOptions, Verdict, find_highest
from chameleon_ray.bench.load.show import Bar, highest_line, table

WINDOW_SLOS = 10
"""A window of the search lasts so many times the objective: a queue that only grows must have the time to break it."""
MIN_LATE_S, LATE_SHARE = 0.05, 0.05
"""How late the client may be by default: seconds, and share of the objective."""


@dataclass(frozen=True, slots=True)
class Objective:
    """limit_s: None takes ``factor`` x the lowest unloaded mean among the targets. See ``figures.Slo``."""

    metric: SloMetric = "ttft"
    percent: float = 99.0
    factor: float = 5.0
    limit_s: float | None = None
    max_late_s: float | None = None


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows per load and target, their length, and how long answers may take after each.

    min_requests: the search adds windows until it has so many per load.
    """

    count: int
    window_s: float
    drain_s: float
    min_requests: int = 100


class Comparison:
    """``results`` is what ``--json`` writes; it grows while measuring."""

    def __init__(self, bench: Bench, bar: Bar, objective: Objective, windows: Windows, results: dict[str, Any]):
        self.slo: Slo | None = None
        self.max_late_s = MIN_LATE_S
        self._bench = bench
        self._bar = bar
        self._objective = objective
        self._windows = windows
        self._unloaded_ttft_ms: dict[str, dict[str, float | None]] = {}
        self._results = results

    async def measure_unloaded(self, num_requests: int) -> None:
        """Latencies of idle targets, and the objective from them."""
        wanted = self._objective
        outcomes = await self._bench.unloaded(num_requests)
        means_s = {name: mean_s(results, "e2e") for name, results in outcomes.items()}
        limit_s = wanted.limit_s
        if limit_s is None and num_requests:
            # one limit for all: a slow target must not earn a lenient one
            limit_s = wanted.factor * min(mean for mean in means_s.values() if mean is not None)
        if limit_s is not None:
            self.slo = Slo(wanted.metric, limit_s, wanted.percent)
            self.max_late_s = max(MIN_LATE_S, LATE_SHARE * limit_s)
            self._results["slo"] = asdict(self.slo)
            print(f"SLO: {self.slo.percent:g}% of the requests with {self.slo.metric} within {limit_s:.3f} s")
        if wanted.max_late_s is not None:
            self.max_late_s = wanted.max_late_s
        for name, results in outcomes.items():
            figures = summarize([Window(results, 0.0, 0.0)], self.slo, math.inf)
            self._results["unloaded"][name] = figures
            self._unloaded_ttft_ms[name] = {c: group["ttft"]["mean_ms"] for c, group in figures["by_class"].items()}
            if results:
                print(f"{name} unloaded: mean TTFT {figures['ttft']['mean_ms']:.1f} ms", end=", ")
                print(f"end-to-end {figures['e2e']['mean_ms']:.1f} ms")

    async def measure(self, names: Sequence[str], rate_per_s: float) -> dict[str, dict[str, Any]]:
        """The figures of each target under one load."""
        load = Load(rate_per_s, self._windows.count, self._windows.window_s, self._windows.drain_s)
        return self._add(await self._bench.loaded(dict.fromkeys(names, load)), rate_per_s)

    async def search(self, options: Mapping[str, SearchOptions]) -> None:
        """The highest load of each named target under the objective. Raises LoadError without one."""
        slo, windows = self.slo, self._windows
        if slo is None:
            raise LoadError("the search needs an objective: give --slo-s or --unloaded-requests above 0")
        window_s = max(windows.window_s, WINDOW_SLOS * slo.limit_s)
        print(f"searching for the highest load under the SLO, in windows of {window_s:.0f} s")

        async def probe(rates: Mapping[str, float]) -> dict[str, Verdict]:
            loads = {}
            for name, rate in rates.items():
                enough = math.ceil(windows.min_requests / (rate * window_s))
                loads[name] = Load(rate, max(windows.count, enough), window_s, 2 * slo.limit_s)
            verdicts = {}
            for name, measured in (await self._bench.loaded(loads, stop_below=slo)).items():
                figures = self._add({name: measured}, rates[name])[name]
                outcomes = [outcome for window in measured for outcome in window.outcomes]
                verdicts[name] = Verdict.HELD if slo.is_held(outcomes) else Verdict.FAILED
                if figures["client_late"]:
                    verdicts[name] = Verdict.CLIENT_LATE
                print(f"  -> {verdicts[name].value}", flush=True)
            return verdicts

        searches = {name: RateSearch(one) for name, one in options.items()}
        for name, search in (await find_highest(searches, probe)).items():
            self._results["highest_load"][name] = {
                "held_per_s": search.held_per_s,
                "failed_per_s": search.failed_per_s,
                "client_limited": search.is_client_limited,
            }
            print(highest_line(name, search))

    def _add(self, windows: Mapping[str, Sequence[Window]], rate_per_s: float) -> dict[str, dict[str, Any]]:
        """Record and print what each target did at a load."""
        by_target: dict[str, dict[str, Any]] = {}
        for name, measured in windows.items():
            figures = by_target[name] = summarize(measured, self.slo, self.max_late_s)
            unloaded_ms = self._unloaded_ttft_ms.get(name, {})
            for size_class, group in figures["by_class"].items():
                before_ms, loaded_ms = unloaded_ms.get(size_class), group["ttft"]["mean_ms"]
                both = before_ms is not None and loaded_ms is not None
                group["mean_wait_ms"] = loaded_ms - before_ms if both else None
            self._bar.close()
            print("\n" + table(f"{name} at {rate_per_s:.3g} requests/s", figures, self.max_late_s), flush=True)
            self._results["loads"].append({"target": name, "rate_per_s": rate_per_s, **figures})
        return by_target
