"""What both comparisons do around their measuring: start and end engines, send requests, write results down."""

import argparse
import asyncio
import json
import secrets
import signal
import sys
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.load_plot import load_pyplot
from benchmarks.servers import Engine, running
from benchmarks.setting import Setting, add_setting, make_setting
from chameleon_ray.bench.load.client import session
from chameleon_ray.bench.load.errors import LoadError
from chameleon_ray.bench.load.measure import Bench
from chameleon_ray.bench.load.prompts import prompts_by_tokenizer
from chameleon_ray.bench.load.show import Bar
from chameleon_ray.bench.load.targets import Target
from chameleon_ray.demo import DemoError

REQUEST_LIMIT_S = 600.0

Results = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Running:
    """Engines that serve, and what to measure them with. results: what ``--json`` writes; it grows."""

    arguments: argparse.Namespace
    targets: Sequence[Target]
    bench: Bench
    bar: Bar
    results: Results


def add_common(parser: argparse.ArgumentParser) -> None:
    """The options of every comparison: engines, requests and output."""
    add_setting(parser)
    add = parser.add_argument_group("output").add_argument
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add("--plot", type=Path, metavar="FILE", help="draw them there (.png, .svg, .pdf)")


def names_of(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """The type of an option that names some of the known."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: choose from {', '.join(known)}")
        return names

    return parse


def run_comparison(
    arguments: argparse.Namespace,
    engines_for: Callable[[Setting], Sequence[Engine]],
    measure: Callable[[Running], Awaitable[None]],
    draw: Callable[[Path, Results], None],
) -> int:
    """Start the engines, measure, end them; the exit status. What was measured before an interruption is written."""
    results: Results = {"complete": False, "options": _plain(vars(arguments)), "loads": []}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: with the engines
    try:
        _check_outputs(arguments)
        with ExitStack() as stack:
            setting = make_setting(arguments, stack)
            print("\n".join(setting.describe()), flush=True)
            targets = stack.enter_context(running(engines_for(setting), setting.machine, _say))
            stack.callback(_write, arguments, results, draw)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(_measure(arguments, setting, targets, results, measure))
            results["complete"] = True
    except (LoadError, DemoError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was measured is above", file=sys.stderr)
        return 130
    return 0


async def _measure(
    arguments: argparse.Namespace,
    setting: Setting,
    targets: Sequence[Target],
    results: Results,
    measure: Callable[[Running], Awaitable[None]],
) -> None:
    prompts = prompts_by_tokenizer(setting.machine.model, secrets.randbits(64))
    bar = Bar()
    try:
        async with session({}, REQUEST_LIMIT_S) as opened:
            bench = Bench(targets, setting.workload, prompts, opened, bar)
            await measure(Running(arguments, targets, bench, bar, results))
    finally:
        bar.close()


def _check_outputs(arguments: argparse.Namespace) -> None:
    if arguments.plot:
        load_pyplot()
    for path in (arguments.json, arguments.plot):
        if path and not path.absolute().parent.is_dir():
            raise LoadError(f"cannot write {path}: there is no folder {path.absolute().parent}")


def _write(arguments: argparse.Namespace, results: Results, draw: Callable[[Path, Results], None]) -> None:
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    if arguments.plot and results["loads"]:
        draw(arguments.plot, results)


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    kinds = (bool, int, float, str, tuple, type(None))
    return {name: value if isinstance(value, kinds) else str(value) for name, value in options.items() if name != "run"}


def _say(text: str) -> None:
    print(text, flush=True)
