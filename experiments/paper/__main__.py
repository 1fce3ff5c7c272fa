"""``python -m experiments.paper``: prints paper, ours, difference."""

import argparse
import sys
from pathlib import Path

from experiments.paper.reproduce import SETTINGS, Effort, run


def main(argv: list[str] | None = None) -> int:
    """Simulate everything; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.paper", description="The published experiments: paper, ours, difference."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="also draw the paper's figures there")
    parser.add_argument("--setting", choices=SETTINGS, default="fitted", help="see docs/simulator.md (%(default)s)")
    given = parser.parse_args(argv)
    try:
        return run(given.json, effort=Effort(setting=given.setting), plot_folder=given.plots)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
