"""The ``chameleon`` command."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chameleon_ray import __version__
from chameleon_ray.bench.load.errors import LoadError


def main(argv: list[str] | None = None) -> int:
    """Run a command; its exit status."""
    arguments = _parser().parse_args(argv)
    return int(arguments.run(arguments))


class _Parser(argparse.ArgumentParser):
    """A parser whose options are added by ``configure`` when the command is chosen: ``--help`` imports no command."""

    def __init__(self, *args: Any, configure: Callable[[argparse.ArgumentParser], None] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._configure = configure

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._configure is not None:
            configure, self._configure = self._configure, None
            configure(self)
        return super().parse_known_args(args, namespace)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="chameleon", description="Serve many LoRA adapters over one base model.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="start Ray and the application on this machine, in the foreground")
    serve.add_argument(
        "config", type=Path, nargs="?", help="Serve config file (default: the demo, made in ./demo if it is not there)"
    )
    serve.set_defaults(run=_serve)
    demo = commands.add_parser("demo", help="make the demo model and its adapters")
    demo.add_argument("folder", type=Path, nargs="?", default=Path("demo"))
    demo.add_argument("--force", action="store_true", help="make it again although it is there")
    demo.set_defaults(run=_demo)
    queues = commands.add_parser("queues", help="the live queues and adapter caches of a running application")
    queues.add_argument("--url", default="http://127.0.0.1:8000", help="of the application (default: %(default)s)")
    queues.add_argument("--api-key", metavar="KEY", help="if it asks for one (default: $OPENAI_API_KEY)")
    queues.add_argument("--watch", type=float, metavar="S", help="show them again every S seconds")
    queues.set_defaults(run=_queues)
    words = commands.add_parser("vllm-args", help="arguments for `vllm serve`: adapters in KV memory without Ray")
    words.add_argument(
        "settings",
        nargs="*",
        metavar="NAME=VALUE",
        help="such as adapter_memory_share=0.8 scheduler=fifo; an unknown one lists all",
    )
    words.set_defaults(run=_vllm_args)
    commands.add_parser(
        "fit",
        help="can a model's adapters lie in KV memory, and how many, from its config.json alone",
        configure=_configure_fit,
    )
    benches = commands.add_parser("bench", help="measure").add_subparsers(required=True, metavar="WHAT")
    local = benches.add_parser("local", help="start-up, memory, overhead and streaming of the local application")
    local.add_argument("config", type=Path, nargs="?", help="Serve config file (default: as for `chameleon serve`)")
    local.set_defaults(run=_bench_local)
    policy = benches.add_parser("policy", help="time per decision of scheduler, cache and router policies")
    policy.set_defaults(run=_bench_policy)
    benches.add_parser(
        "serve", help="open-loop load on OpenAI-compatible servers, side by side", configure=_configure_bench_serve
    )
    cold = benches.add_parser("cold", help="from a request to the first token of an adapter that nobody has seen")
    cold.add_argument(
        "--source",
        required=True,
        metavar="s3://BUCKET/PATH",
        help="where adapters are put and read, by AWS's own chain",
    )
    cold.add_argument(
        "--mib", type=int, nargs="+", default=[1, 10, 100], help="sizes of the adapters (default: 1 10 100)"
    )
    cold.add_argument("--repeats", type=int, default=5, help="of each measurement (default: %(default)s)")
    cold.set_defaults(run=_bench_cold)
    commands.add_parser(
        "calibrate", help="measure an engine and write a cost model for the simulator", configure=_configure_calibrate
    )
    _add_simulations(commands)
    _add_training(commands)
    for bench in (local, policy, cold):
        bench.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    return parser


def _add_simulations(commands: Any) -> None:
    kinds = commands.add_parser("sim", help="simulate the product's own policy").add_subparsers(
        required=True, metavar="WHAT"
    )
    grid = kinds.add_parser("run", help="one scenario, or a grid of them, from a YAML file")
    grid.add_argument("scenario", type=Path, help="YAML file")
    grid.add_argument("--plot", type=Path, metavar="FILE", help="also draw the figures there (.png, .svg, .pdf)")
    grid.set_defaults(run=_sim_run)
    schedulers = kinds.add_parser("schedulers", help="the scheduling policies in many cells, against fifo")
    schedulers.add_argument("--cells", type=_list_of(str), default=[], metavar="A,B", help="default: all")
    schedulers.add_argument("--loads", type=_list_of(float), metavar="A,B", help="default: 0.7,0.9,1,1.1")
    schedulers.add_argument("--seeds", type=_list_of(int), metavar="A,B", help="default: 0,1,2,3")
    schedulers.add_argument("--measure-limits", action="store_true", help="only measure FIFO's limits, and print them")
    schedulers.set_defaults(run=_sim_schedulers)
    cluster = kinds.add_parser("cluster", help="routing policies on many replicas, side by side")
    _add_cluster_options(cluster)
    cluster.add_argument("--plot", type=Path, metavar="FILE", help="also draw the figures there (.png, .svg, .pdf)")
    cluster.set_defaults(run=_sim_cluster)
    plan = commands.add_parser("plan", help="the fewest replicas that hold an SLO for a scenario's traffic")
    plan.add_argument("scenario", type=Path, help="YAML file, as for `sim run`")
    plan.add_argument("--slo-s", type=float, required=True, metavar="SECONDS", help="P99 time to first token")
    plan.set_defaults(run=_plan)
    for command in (grid, schedulers, cluster, plan):
        command.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")


def _add_cluster_options(cluster: argparse.ArgumentParser) -> None:
    cluster.add_argument("--replicas", type=int, default=8, help="default: %(default)s")
    cluster.add_argument("--adapters", type=int, default=1000, help="default: %(default)s")
    cluster.add_argument("--requests", type=int, default=20_000, help="about so many in all (default: %(default)s)")
    rates = cluster.add_mutually_exclusive_group()
    rates.add_argument(
        "--rate", type=_numbers, default=[1.5], metavar="R,...", help="requests/s and replica (default: 1.5)"
    )
    rates.add_argument(
        "--load", type=_numbers, default=[], metavar="SHARE,...", help="of a replica's measured capacity"
    )
    cluster.add_argument("--length-scale", type=float, default=1.0, help="factor on all lengths (default: %(default)s)")
    cluster.add_argument(
        "--exponent", type=float, default=1.0, help="popularity: 1 / place ** EXPONENT (default: %(default)s)"
    )
    cluster.add_argument(
        "--drift-s", type=float, default=0.0, metavar="SECONDS", help="popularity moves on so often (default: never)"
    )
    cluster.add_argument(
        "--base-share", type=float, default=0.0, help="requests without adapter (default: %(default)s)"
    )
    cluster.add_argument(
        "--routing",
        default="",
        metavar="NAME,...",
        help="policies to compare, in parallel over the cores (default: all)",
    )
    cluster.add_argument("--hint-delay-s", type=float, default=0.1, metavar="SECONDS", help="age of what routers hear")
    cluster.add_argument("--cost-model", default="a40-llama-7b", help="shipped name, or path (default: %(default)s)")
    cluster.add_argument(
        "--seeds", type=_integers, default=[0], metavar="N,...", help="figures are means over them (default: 0)"
    )


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def _integers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _add_training(commands: Any) -> None:
    train = commands.add_parser("train-predictor", help="train an output-length predictor on logged requests")
    train.add_argument(
        "--requests", type=Path, nargs="+", required=True, metavar="PATH", help="logs, or folders of them"
    )
    train.add_argument(
        "--encoder", type=Path, required=True, metavar="FOLDER", help="Hugging Face encoder (BERT-style)"
    )
    train.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for `engine.length_predictor`")
    train.add_argument("--buckets", type=int, default=5, help="length classes to tell apart (default: 5)")
    train.add_argument("--epochs", type=int, default=40, help="passes over the requests (default: 40)")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument(
        "--window",
        type=int,
        default=128,
        help="tokens read of a prompt, its two ends (default: 128); cost grows with it",
    )
    train.add_argument("--pooling", choices=("mean", "cls"), default="mean", help="as the encoder was made for")
    train.add_argument("--held-out", type=float, default=0.2, metavar="SHARE", help="kept to judge by (default: 0.2)")
    train.set_defaults(run=_train_predictor)


# Commands import what they need when they are chosen: `chameleon --help` should not wait for torch.


def _configure_bench_serve(parser: argparse.ArgumentParser) -> None:
    from chameleon_ray.bench.serve import add_arguments, run

    add_arguments(parser)
    parser.set_defaults(run=run)


def _configure_fit(parser: argparse.ArgumentParser) -> None:
    from chameleon_ray.fit import configure, run

    configure(parser)
    parser.set_defaults(run=lambda arguments: _status(lambda: run(arguments)))


def _configure_calibrate(parser: argparse.ArgumentParser) -> None:
    from chameleon_ray.calibrate.run import add_arguments, run

    add_arguments(parser)
    parser.set_defaults(run=lambda arguments: _status(lambda: run(arguments)))


def _serve(arguments: argparse.Namespace) -> int:
    from chameleon_ray.launcher import Launcher

    return _launch(arguments.config, lambda config: Launcher(config, lambda text: print(text, flush=True)).run())


def _launch(config: Path | None, run: Callable[[Path], int]) -> int:
    """``run`` with a Serve configuration file, by default that of the demo, which is made where it is missing."""
    from chameleon_ray.launcher import CONFIGS, LaunchError

    if config is None and not Path("demo/model").is_dir() and (status := _make_demo(Path("demo"), False)):
        return status
    try:
        return run(config or CONFIGS / "local.yaml")
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _demo(arguments: argparse.Namespace) -> int:
    return _make_demo(arguments.folder, arguments.force)


def _make_demo(folder: Path, force: bool) -> int:
    from chameleon_ray.demo import DemoError, make_demo

    try:
        make_demo(folder, force=force, progress=lambda text: print(text, flush=True))
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _queues(arguments: argparse.Namespace) -> int:
    from chameleon_ray.queues_view import run

    return run(arguments.url, arguments.api_key or os.environ.get("OPENAI_API_KEY"), arguments.watch)


def _vllm_args(arguments: argparse.Namespace) -> int:
    from chameleon_ray.engine.paged.options import paged_words, parse_settings

    try:
        print(" ".join(paged_words(parse_settings(arguments.settings))))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _bench_local(arguments: argparse.Namespace) -> int:
    from chameleon_ray.bench.local import run

    return _launch(arguments.config, lambda config: run(config, arguments.json))


def _bench_policy(arguments: argparse.Namespace) -> int:
    from chameleon_ray.bench.policy import run

    return run(arguments.json)


def _bench_cold(arguments: argparse.Namespace) -> int:
    from chameleon_ray.adapters.errors import AdapterError
    from chameleon_ray.bench.cold import run

    try:
        return run(arguments.source, arguments.json, sizes_mib=arguments.mib, repeats=arguments.repeats)
    except (AdapterError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _sim_run(arguments: argparse.Namespace) -> int:
    from chameleon_ray.sim.grid import run

    return _status(lambda: run(arguments.scenario, arguments.json, plot_path=arguments.plot))


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def values(text: str) -> list[Any]:
        return [kind(value) for value in text.split(",")]

    values.__name__ = f"list of {kind.__name__}"
    return values


def _sim_schedulers(arguments: argparse.Namespace) -> int:
    from chameleon_ray.sim.schedulers import LOADS, SEEDS, measure_limits, run

    if arguments.measure_limits:
        return _status(lambda: measure_limits(arguments.cells))
    loads, seeds = arguments.loads or LOADS, arguments.seeds or SEEDS
    return _status(lambda: run(arguments.cells, loads, seeds, arguments.json))


def _sim_cluster(arguments: argparse.Namespace) -> int:
    from chameleon_ray.sim.cluster import ClusterScenario, capacity, run, scenario_of

    def scenario(rate: float, seed: int) -> ClusterScenario:
        return scenario_of(
            num_replicas=arguments.replicas,
            num_requests=arguments.requests,
            requests_per_s_each=rate,
            num_adapters=arguments.adapters,
            length_scale=arguments.length_scale,
            exponent=arguments.exponent,
            drift_s=arguments.drift_s,
            base_share=arguments.base_share,
            hint_delay_s=arguments.hint_delay_s,
            cost_model=arguments.cost_model,
            seed=seed,
        )

    def simulate() -> int:
        rates = arguments.rate
        if arguments.load:
            most = capacity(scenario(1.0, 0))
            print(f"capacity: {most:.4g} requests/s and replica")
            rates = [share * most for share in arguments.load]
        routings = [name for name in arguments.routing.split(",") if name]
        scenarios = [scenario(rate, seed) for rate in rates for seed in arguments.seeds]
        return run(scenarios, routings, json_path=arguments.json, plot_path=arguments.plot)

    return _status(simulate)


def _plan(arguments: argparse.Namespace) -> int:
    from chameleon_ray.sim.plan import run

    return _status(lambda: run(arguments.scenario, arguments.slo_s, arguments.json))


def _train_predictor(arguments: argparse.Namespace) -> int:
    from chameleon_ray.predictor.train import TrainOptions, report, train

    def run() -> int:
        options = TrainOptions(
            buckets=arguments.buckets,
            epochs=arguments.epochs,
            seed=arguments.seed,
            window=arguments.window,
            pooling=arguments.pooling,
            held_out_share=arguments.held_out,
        )
        description = train(arguments.requests, arguments.encoder, arguments.out, options)
        print("\n".join(report(description)))
        print(f"saved; use it with engine.length_predictor={arguments.out.resolve()}")
        return 0

    return _status(run)


def _status(command: Callable[[], int]) -> int:
    """The command's exit status; 1 with the message on stderr when it raises an error that the user can mend."""
    try:
        return command()
    except (ValueError, OSError, LoadError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
