"""Progress while measuring, and tables afterwards."""

from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from chameleon_ray.bench.load.client import Outcome
from chameleon_ray.bench.load.measure import Progress
from chameleon_ray.bench.load.search import RateSearch

Figures = Mapping[str, Any]

HEADER = (
    f"{'':24}{'requests':>9}{'failed':>7}{'TTFT p50':>11}{'p99':>9}{'TBT p50':>10}{'p99':>9}{'end p50':>11}{'p99':>9}"
)
HEADER += f"{'SLO':>8}"


class Bar(Progress):
    """A progress bar per window; nothing where there is no terminal."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._failed = 0

    def begin(self, target: str, what: str, num_requests: int) -> None:
        self.close()
        self._failed = 0
        self._bar = tqdm(total=num_requests, desc=f"{target} {what}", unit="req", leave=False, disable=None)

    def done(self, outcome: Outcome) -> None:
        if self._bar is None:
            return
        if outcome.error:
            self._failed += 1
            self._bar.set_postfix_str(f"{self._failed} failed", refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


def table(title: str, figures: Figures, max_late_s: float) -> str:
    """One measurement in milliseconds: all requests, by size class, by rank; then errors and what casts doubt."""
    ranks = {f"rank {rank}" if rank != "0" else "rank unknown": group for rank, group in figures["by_rank"].items()}
    rows = {"all": figures, **figures["by_class"], **ranks}
    lines = [
        f"{title}: {figures['requests_per_s']:.2f} answers/s, {figures['output_tokens_per_s']:.0f} tokens/s, "
        f"client late p99 {_ms(figures['lateness']['p99_ms'])} ms, its CPU {figures['client_cpu_share']:.0%}",
        HEADER,
        *(_row(name, group) for name, group in rows.items() if group["requests"]),
    ]
    for kind, count in figures["errors"].items():
        lines.append(f"  FAILED {count} x {kind}: {figures['error_examples'][kind]}")
    if figures["short_answers"]:
        lines.append(
            f"  SHORT: {figures['short_answers']} answers had fewer tokens than asked for (ignore_eos ignored?)"
        )
    if (off_percent := figures["prompt_tokens_off_percent"] or 0.0) > 5:
        lines.append(f"  PROMPTS are {off_percent:.0f}% off their wanted lengths; give --tokenizer")
    if figures["client_late"]:
        lines.append(f"  CLIENT LATE: p99 above {max_late_s * 1e3:.0f} ms. No measurement of the server: do not use.")
    return "\n".join(lines)


def highest_line(name: str, search: RateSearch) -> str:
    """The search's result in words."""
    if search.held_per_s is None:
        return f"{name}: holds the SLO at no load measured, down to {search.failed_per_s:.3g} requests/s"
    if search.failed_per_s is None:
        return f"{name}: holds the SLO at {search.held_per_s:.3g} requests/s, the highest load tried"
    why = "the CLIENT falls behind" if search.is_client_limited else "it does not"
    return f"{name}: holds the SLO at {search.held_per_s:.3g} requests/s; at {search.failed_per_s:.3g} {why}"


def _row(name: str, group: Figures) -> str:
    cells = [(group["ttft"], 11), (group["tbt"], 10), (group["e2e"], 11)]
    times = "".join(f"{_ms(values['p50_ms']):>{width}}{_ms(values['p99_ms']):>9}" for values, width in cells)
    share = "" if group["slo_share"] is None else f"{group['slo_share']:.1%}"
    return f"  {name:22}{group['requests']:>9}{group['failed']:>7}{times}{share:>8}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value < 1000 else f"{value:.0f}"
