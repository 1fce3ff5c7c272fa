"""The ``chameleon`` command."""

import argparse
import sys
from pathlib import Path


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


if __name__ == "__main__":
    sys.exit(main())
