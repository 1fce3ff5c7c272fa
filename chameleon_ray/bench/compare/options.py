"""Options of ``bench schedulers`` and ``bench capacity``; imports nothing heavy, for ``chameleon --help``."""

import argparse
from collections.abc import Callable, Collection
from pathlib import Path

from chameleon_ray.policy.disciplines import DISCIPLINES

STOCK, PLAIN, CHAMELEON = ENGINES = ("stock", "fifo+lru", "chameleon")


def add_schedulers(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench schedulers``."""
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
    add("--schedulers", type=_names_of(DISCIPLINES), default=tuple(DISCIPLINES), metavar="S,S", help="which (all four)")
    _add_setting(parser)
    _add_output(parser)


def add_capacity(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench capacity``."""
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
    add("--engines", type=_names_of(ENGINES), default=ENGINES, metavar="E,E", help="which (all three)")
    _add_setting(parser)
    _add_output(parser)


def _add_setting(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("engines and requests").add_argument
    add("--demo", type=Path, default=Path("demo"), metavar="FOLDER", help="the demo, made if it is not there (demo)")
    add("--adapters", type=int, default=100, metavar="N", help="adapters, in equal numbers of each rank (100)")
    add("--kv-mib", type=int, default=128, help="KV pool of each engine, adapters in it included (128)")
    add("--adapter-share", type=float, default=1.0, help="most of the pool that adapters may hold (1)")
    add("--max-running", type=int, default=32, help="requests that an engine runs at once (32)")
    add("--context-window", type=int, default=2048, help="tokens; lengths are scaled to fit (2048)")
    add("--length-scale", type=float, help="this factor on all lengths instead; what does not fit is cut")
    add("--trace", type=Path, metavar="CSV", help="lengths from a trace in Azure's format (default: synthetic, alike)")
    add("--threads", type=int, help="compute threads of an engine (one core less than there are)")
    add("--dtype", default="float32", help="weights, activations and KV cache (float32)")
    add("--seed", type=int, default=0, help="of arrivals, lengths and adapters (0)")


def _add_output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add("--plot", type=Path, metavar="FILE", help="draw them there (.png, .svg, .pdf)")


def _loads(text: str) -> tuple[float, ...]:
    loads = tuple(float(load) for load in text.split(","))
    if min(loads) <= 0:
        raise argparse.ArgumentTypeError("loads are above 0")
    return loads


def _names_of(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: choose from {', '.join(known)}")
        return names

    return parse
