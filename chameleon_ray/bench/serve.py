"""``chameleon bench serve``: an open-loop load generator for OpenAI-compatible servers with many adapters.

Several targets are measured side by side, in alternating windows of the same requests. Latencies at given loads, and
the highest load that holds a service level objective (the paper's: 5 x the mean latency of an unloaded system).
"""

import argparse
import asyncio
import json
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import uvloop

from chameleon_ray.bench.load.client import session
from chameleon_ray.bench.load.comparison import WINDOW_SLOS, Comparison, Objective, Windows
from chameleon_ray.bench.load.errors import LoadError
from chameleon_ray.bench.load.lengths import Lengths, scaled, synthetic_lengths, trace_lengths
from chameleon_ray.bench.load.measure import Bench
from chameleon_ray.bench.load.prompts import Prompts, prompts_by_count, prompts_by_tokenizer
from chameleon_ray.bench.load.search import SearchOptions
from chameleon_ray.bench.load.show import Bar
from chameleon_ray.bench.load.targets import (
    Offer,
    Target,
    common_models,
    discover,
    few_adapters,
    parse_target,
    ranks_by_pattern,
    ranks_from_file,
    server_count,
)
from chameleon_ray.bench.load.workload import Ranks, Workload, adapter_shares
from chameleon_ray.sim.workload import Popularity

POPULARITIES = get_args(Popularity)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument_group("what to measure").add_argument
    add(
        "--target", action="append", metavar="[NAME=]URL", help="a server; several are compared (http://127.0.0.1:8000)"
    )
    add("--rates", type=_rates, default=(), metavar="R,R,...", help="loads to measure, requests per second")
    add(
        "--find-max", action="store_true", help="find the highest load that holds the SLO (the default without --rates)"
    )
    add("--num-windows", type=int, default=3, help="windows per load and target, alternating between targets (3)")
    add(
        "--window-s",
        type=float,
        default=20.0,
        help=f"length of one; at least {WINDOW_SLOS} x the SLO in the search (20)",
    )
    add("--drain-s", type=float, default=120.0, help="wait so long for answers after a window (120)")
    add("--request-limit-s", type=float, default=600.0, help="a request that takes longer fails (600)")
    add("--unloaded-requests", type=int, default=30, help="sent one by one to learn unloaded latencies (30)")
    add(
        "--max-late-ms",
        type=float,
        help="p99 lateness of the client that voids a measurement (5%% of the SLO, at least 50)",
    )

    add = parser.add_argument_group("the objective").add_argument
    add("--slo-s", type=float, help="limit in seconds (default: --slo-factor x the mean unloaded end-to-end latency)")
    add("--slo-factor", type=float, default=5.0, help="times the lowest unloaded mean among the targets (5)")
    add("--slo-metric", choices=("ttft", "e2e"), default="ttft", help="what must stay below the limit (ttft)")
    add("--slo-percent", type=float, default=99.0, help="percent of the requests that must; failed ones never do (99)")
    add("--start-rate", type=float, default=1.0, help="first load of the search (1)")
    add("--max-rate", type=float, default=1000.0, help="highest load of the search (1000)")
    add("--precision", type=float, default=0.05, help="the search ends with a bracket this narrow (0.05)")
    add("--min-requests", type=int, default=100, help="the search adds windows until it has so many per load (100)")

    add = parser.add_argument_group("the requests").add_argument
    add("--trace", type=Path, metavar="CSV", help="lengths from a trace in Azure's format (default: synthetic, alike)")
    add("--context-window", type=int, help="scale lengths to fit so many tokens (default: what the servers say)")
    add("--length-scale", type=float, help="this factor instead; what does not fit the context window is cut")
    add(
        "--tokenizer",
        type=Path,
        help="tokenizer.json or its folder, for exact prompt lengths (default: ask the server)",
    )
    add(
        "--shared-prefix",
        type=int,
        default=0,
        metavar="TOKENS",
        help="so many first tokens are alike in all prompts (0)",
    )
    add("--seed", type=int, default=0, help="of arrivals, lengths and adapters; prompts always differ between runs (0)")
    add("--base-only", action="store_true", help="send everything to the base model")
    add("--num-adapters", type=int, help="use so many of the adapters, of each rank alike (all)")
    add("--rank-pattern", default=r"-r(\d+)-", metavar="REGEX", help=r"finds the rank in an adapter's name (-r(\d+)-)")
    add("--adapter-ranks", type=Path, metavar="JSON", help="ranks by adapter name instead")
    add("--rank-popularity", choices=POPULARITIES, default="uniform", help="of ranks, smallest first (uniform)")
    add("--popularity", choices=POPULARITIES, default="power_law", help="of adapters within a rank (power_law)")
    add("--exponent", type=float, default=1.0, help="of the power laws (1)")

    add = parser.add_argument_group("output").add_argument
    add("--json", type=Path, metavar="FILE", help="write all figures there")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; the exit status. What was measured before an interruption is written as well."""
    command = _Command(arguments)
    try:
        _check_output(arguments.json)
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(command.measure())
        finally:
            command.write()
    except (LoadError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was measured is above", file=sys.stderr)
        return 130
    return 0


def _rates(text: str) -> tuple[float, ...]:
    rates = tuple(float(rate) for rate in text.split(","))
    if min(rates) <= 0:
        raise argparse.ArgumentTypeError("rates are requests per second, above 0")
    return rates


class _Command:
    """One run of the command. ``results`` is what ``--json`` writes; it grows while measuring."""

    def __init__(self, arguments: argparse.Namespace):
        self._arguments = arguments
        self._bar = Bar()
        self.results: dict[str, Any] = {"complete": False, "unloaded": {}, "loads": [], "highest_load": {}}

    async def measure(self) -> None:
        """Everything that was asked for. Raises LoadError."""
        arguments = self._arguments
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        targets = _targets(arguments)
        offers = {target.name: discover(target, headers) for target in targets}
        ranks = _ranks(arguments, offers)
        lengths = _lengths(arguments, offers)
        shares = adapter_shares(ranks, arguments.rank_popularity, arguments.popularity, arguments.exponent)
        workload = Workload(lengths, ranks, shares, arguments.seed)
        prompts = _prompts(arguments, partial(server_count, targets[0], next(iter(ranks)), headers))
        self._describe(targets, ranks, lengths)
        late_s = None if arguments.max_late_ms is None else arguments.max_late_ms / 1e3
        objective = Objective(
            arguments.slo_metric, arguments.slo_percent, arguments.slo_factor, arguments.slo_s, late_s
        )
        windows = Windows(arguments.num_windows, arguments.window_s, arguments.drain_s, arguments.min_requests)
        names = [target.name for target in targets]
        try:
            async with session(headers, arguments.request_limit_s) as opened:
                bench = Bench(targets, workload, prompts, opened, self._bar)
                comparison = Comparison(bench, self._bar, objective, windows, self.results)
                await bench.warm_up(list(ranks))
                await comparison.measure_unloaded(arguments.unloaded_requests)
                for rate in arguments.rates:
                    await comparison.measure(names, rate)
                if arguments.find_max or not arguments.rates:
                    options = SearchOptions(arguments.start_rate, arguments.max_rate, arguments.precision)
                    await comparison.search(dict.fromkeys(names, options))
        finally:
            self._bar.close()
        self.results["complete"] = True

    def write(self) -> None:
        """The file that was asked for, once anything was measured."""
        if self._arguments.json and self.results["unloaded"]:
            self._arguments.json.write_text(json.dumps(self.results, indent=2) + "\n")

    def _describe(self, targets: Sequence[Target], ranks: Ranks, lengths: Lengths) -> None:
        known = sorted({rank for rank in ranks.values() if rank})
        prompt_tokens, output_tokens = lengths.num_prompt_tokens, lengths.num_output_tokens
        self.results["options"] = {name: _plain(value) for name, value in vars(self._arguments).items()}
        self.results["targets"] = [{"name": target.name, "url": target.url} for target in targets]
        self.results["workload"] = {
            "ranks": dict(ranks),
            "mean_prompt_tokens": float(prompt_tokens.mean()),
            "mean_output_tokens": float(output_tokens.mean()),
            "max_prompt_tokens": int(prompt_tokens.max()),
            "max_output_tokens": int(output_tokens.max()),
        }
        print(f"{len(ranks)} models of ranks {', '.join(map(str, known)) or 'unknown'} on {len(targets)} targets")
        print(
            f"prompts of {prompt_tokens.mean():.0f} tokens (at most {prompt_tokens.max()}), "
            f"answers of {output_tokens.mean():.0f} (at most {output_tokens.max()})"
        )


def _check_output(path: Path | None) -> None:
    """Before an hour of measuring, not after. Raises LoadError."""
    if path and not path.absolute().parent.is_dir():
        raise LoadError(f"cannot write {path}: there is no folder {path.absolute().parent}")


def _targets(arguments: argparse.Namespace) -> list[Target]:
    targets = [parse_target(text) for text in arguments.target or ["http://127.0.0.1:8000"]]
    if len({target.name for target in targets}) < len(targets):
        raise LoadError("two targets have the same name: give --target NAME=URL")
    return targets


def _ranks(arguments: argparse.Namespace, offers: Mapping[str, Offer]) -> Ranks:
    models = common_models(offers, arguments.base_only)
    if arguments.adapter_ranks:
        ranks = ranks_from_file(models, arguments.adapter_ranks)
    else:
        ranks = ranks_by_pattern(models, arguments.rank_pattern)
    return few_adapters(ranks, arguments.num_adapters) if arguments.num_adapters is not None else ranks


def _lengths(arguments: argparse.Namespace, offers: Mapping[str, Offer]) -> Lengths:
    windows = [offer.context_window for offer in offers.values() if offer.context_window]
    window = arguments.context_window or min(windows, default=None)
    if window is None:
        raise LoadError("the servers do not tell their context window; give --context-window TOKENS")
    lengths = trace_lengths(arguments.trace) if arguments.trace else synthetic_lengths(arguments.seed)
    return scaled(lengths, window, arguments.length_scale)


def _prompts(arguments: argparse.Namespace, count: Callable[[str], int]) -> Prompts:
    nonce = secrets.randbits(64)
    if arguments.tokenizer:
        return prompts_by_tokenizer(arguments.tokenizer, nonce, arguments.shared_prefix)
    return prompts_by_count(count, nonce, arguments.shared_prefix)


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | list | tuple | None) else str(value)
