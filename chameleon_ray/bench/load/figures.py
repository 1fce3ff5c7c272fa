"""What a measurement amounts to: latencies, errors and the client's own lateness, over all requests and by group."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from chameleon_ray.bench.load.client import UNFINISHED, Outcome, Window
from chameleon_ray.bench.load.workload import SIZE_CLASSES

SloMetric = Literal["ttft", "e2e"]
Figures = dict[str, Any]

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Slo:
    """``percent`` of the requests have their first token (or whole answer) within limit_s; an error never does."""

    metric: SloMetric
    limit_s: float
    percent: float

    def is_met_by(self, outcome: Outcome) -> bool:
        """Whether one request kept to the limit. A first token in time counts although the answer was cut short by
        us; not when the server broke off."""
        value_s = outcome.ttft_s if self.metric == "ttft" else outcome.e2e_s
        return outcome.error in (None, UNFINISHED) and value_s is not None and value_s <= self.limit_s

    def share(self, outcomes: Sequence[Outcome]) -> float:
        """Share of the requests that kept to the limit; 1 of none."""
        return sum(map(self.is_met_by, outcomes)) / len(outcomes) if outcomes else 1.0

    def is_held(self, outcomes: Sequence[Outcome]) -> bool:
        """Whether enough requests kept to the limit."""
        return self.share(outcomes) >= self.percent / 100


def summarize(windows: Sequence[Window], slo: Slo | None, max_late_s: float) -> Figures:
    """Everything measured at one load. Times in milliseconds over complete answers; None where there were none.

    ``lateness`` says how late requests were sent; ``client_late`` that the 99th percentile is above ``max_late_s``:
    then the client, not the server, may have set the pace.
    """
    outcomes = [outcome for window in windows for outcome in window.outcomes]
    elapsed_s = sum(window.elapsed_s for window in windows)
    lateness = _statistics([outcome.late_s for outcome in outcomes])
    return {
        **_group(outcomes, slo),
        "errors": errors_by_kind(outcomes),
        "error_examples": {outcome.error: outcome.message for outcome in outcomes if outcome.error},
        "short_answers": sum(o.num_output_tokens < o.plan.num_output_tokens for o in outcomes if o.error is None),
        "prompt_tokens_off_percent": _prompt_deviation(outcomes),
        "requests_per_s": _rate(sum(outcome.error is None for outcome in outcomes), elapsed_s),
        "output_tokens_per_s": _rate(sum(outcome.num_output_tokens for outcome in outcomes), elapsed_s),
        "elapsed_s": elapsed_s,
        "lateness": lateness,
        "client_late": bool(outcomes) and lateness["p99_ms"] > max_late_s * 1e3,
        "client_cpu_share": _rate(sum(window.client_cpu_s for window in windows), elapsed_s),
        "by_class": {name: _group([o for o in outcomes if o.plan.size_class == name], slo) for name in SIZE_CLASSES},
        "by_rank": {str(rank): _group(group, slo) for rank, group in _by(outcomes, lambda o: o.plan.rank or 0)},
    }


def errors_by_kind(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """How many requests failed in which way."""
    return dict(sorted(Counter(outcome.error for outcome in outcomes if outcome.error).items()))


def mean_s(outcomes: Iterable[Outcome], metric: SloMetric) -> float | None:
    """Mean time to the first token or the end over complete answers; None without any."""
    complete = [outcome for outcome in outcomes if outcome.error is None]
    values_s = [outcome.ttft_s if metric == "ttft" else outcome.e2e_s for outcome in complete]
    return float(np.mean(np.array(values_s, np.float64))) if values_s else None


def _group(outcomes: Sequence[Outcome], slo: Slo | None) -> Figures:
    complete = [outcome for outcome in outcomes if outcome.error is None]
    gaps = _statistics([gap for outcome in complete for gap in outcome.gaps_s])
    num_gaps = sum(outcome.num_output_tokens - 1 for outcome in complete)
    if num_gaps > 0:  # an event may carry several tokens
        gaps["mean_ms"] = sum(sum(outcome.gaps_s) for outcome in complete) * 1e3 / num_gaps
    return {
        "requests": len(outcomes),
        "failed": len(outcomes) - len(complete),
        "slo_share": slo.share(outcomes) if slo and outcomes else None,
        "ttft": _statistics([outcome.ttft_s for outcome in complete if outcome.ttft_s is not None]),
        "tbt": gaps,
        "e2e": _statistics([outcome.e2e_s for outcome in complete if outcome.e2e_s is not None]),
        "queued": _statistics([outcome.queued_s for outcome in complete if outcome.queued_s is not None]),
    }


def _statistics(values_s: Sequence[float]) -> Figures:
    if not values_s:
        return dict.fromkeys(("mean_ms", *(f"p{p}_ms" for p in PERCENTILES), "max_ms"))
    values_ms = np.asarray(values_s) * 1e3
    percentiles = {
        f"p{p}_ms": float(value) for p, value in zip(PERCENTILES, np.percentile(values_ms, PERCENTILES), strict=True)
    }
    return {"mean_ms": float(values_ms.mean()), **percentiles, "max_ms": float(values_ms.max())}


def _by(outcomes: Sequence[Outcome], key: Callable[[Outcome], int]) -> list[tuple[int, list[Outcome]]]:
    return [(value, [o for o in outcomes if key(o) == value]) for value in sorted(set(map(key, outcomes)))]


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def _prompt_deviation(outcomes: Sequence[Outcome]) -> float | None:
    """By how much the prompts' true lengths differ from the wanted ones, in percent of all wanted tokens."""
    complete = [outcome for outcome in outcomes if outcome.error is None]
    wanted = sum(outcome.plan.num_prompt_tokens for outcome in complete)
    off = sum(abs(outcome.num_prompt_tokens - outcome.plan.num_prompt_tokens) for outcome in complete)
    return 100 * off / wanted if wanted else None
