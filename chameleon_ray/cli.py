"""The ``chameleon`` command."""

import argparse
import sys
from pathlib import Path

from chameleon_ray.bench import serve as bench_serve


def main(argv: list[str] | None = None) -> int:
    """Run a command; its exit status."""
    arguments = _parser().parse_args(argv)
    return int(arguments.run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chameleon", description="Serve many LoRA adapters over one base model.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="start Ray and the application on this machine, in the foreground")
    serve.add_argument(
        "config", type=Path, nargs="?", default=Path("cluster_configs/local.yaml"), help="Serve config file"
    )
    serve.set_defaults(run=_serve)
    demo = commands.add_parser("demo", help="make the demo model and its adapters")
    demo.add_argument("folder", type=Path, nargs="?", default=Path("demo"))
    demo.add_argument("--force", action="store_true", help="make it again although it is there")
    demo.set_defaults(run=_demo)
    benches = commands.add_parser("bench", help="measure").add_subparsers(required=True, metavar="WHAT")
    local = benches.add_parser("local", help="start-up, memory, overhead and streaming of the local application")
    local.add_argument(
        "config", type=Path, nargs="?", default=Path("cluster_configs/local.yaml"), help="Serve config file"
    )
    local.set_defaults(run=_bench_local)
    policy = benches.add_parser("policy", help="time per decision of scheduler, cache and router policies")
    policy.set_defaults(run=_bench_policy)
    load = benches.add_parser("serve", help="open-loop load on OpenAI-compatible servers, side by side")
    bench_serve.add_arguments(load)
    load.set_defaults(run=bench_serve.run)
    for bench in (local, policy):
        bench.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    return parser


# Commands import what they need when they run: `chameleon --help` should not wait for torch.


def _serve(arguments: argparse.Namespace) -> int:
    from chameleon_ray.launcher import Launcher, LaunchError

    try:
        return Launcher(arguments.config, lambda text: print(text, flush=True)).run()
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _demo(arguments: argparse.Namespace) -> int:
    from chameleon_ray.demo import make_demo

    make_demo(arguments.folder, force=arguments.force, progress=print)
    return 0


def _bench_local(arguments: argparse.Namespace) -> int:
    from chameleon_ray.bench.local import run

    return run(arguments.config, arguments.json)


def _bench_policy(arguments: argparse.Namespace) -> int:
    from chameleon_ray.bench.policy import run

    return run(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
