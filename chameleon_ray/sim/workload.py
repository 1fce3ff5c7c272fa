"""Workloads: who asks for which adapter, when, and how much. Everything random comes from one seed.

The simulator, calibration and the load generator (``bench.load.workload``) take arrivals, lengths and popularity from
here.

Lengths are drawn from a quantile function fitted to the Azure LLM inference trace, conversation service, 2023 (19,366
requests; Azure Public Dataset, CC BY 4.0): its quantiles at ``_LEVELS``, joined by straight lines in the logarithm of
the length. Prompt and output are drawn independently (their logarithms correlate by 0.09 in the trace). The fit's error
is stated in docs/simulator.md.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from chameleon_ray.policy.adapter import Adapter
from chameleon_ray.sim.costs import Count, NotNegative, Positive

_LEVELS = (0.0, 0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 1.0)
_PROMPT_TOKENS = (
    2,
    29,
    181,
    207,
    372,
    387,
    396,
    403,
    703,
    1020,
    1071,
    1130,
    1189,
    1315,
    1876,
    2734,
    4083,
    4098,
    4142,
    14050,
)
_OUTPUT_TOKENS = (7, 16, 41, 54, 67, 77, 85, 91, 103, 129, 177, 384, 395, 400, 411, 424, 451, 540, 601, 1000)


Popularity = Literal["uniform", "power_law"]


class TraceError(ValueError):
    """The trace cannot be used; the message says which line of which file and why."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Bursts(_Part):
    """For ``length_s`` out of every ``every_s`` seconds, requests arrive ``factor`` times as fast."""

    every_s: Positive
    length_s: Positive
    factor: Positive

    @model_validator(mode="after")
    def _fit(self) -> "Bursts":
        if self.length_s > self.every_s:
            raise ValueError("length_s of a burst exceeds every_s")
        return self


class AdapterMix(_Part):
    """count adapters, ranks in equal numbers; each rank is asked for alike (``rank_popularity: uniform``) or by a power
    law, the smallest rank most; within a rank uniform or ``1 / place ** exponent``. base_share: base-model requests.
    drift_s: every so often the popularity order within each rank moves on by one place; 0: never."""

    count: int = Field(100, ge=0)
    ranks: list[Count] = [8, 16, 32, 64, 128]
    rank_popularity: Popularity = "uniform"
    popularity: Popularity = "power_law"
    exponent: NotNegative = 1.0
    base_share: float = Field(0.0, ge=0, le=1)
    drift_s: NotNegative = 0.0

    @model_validator(mode="after")
    def _possible(self) -> "AdapterMix":
        if self.count and not self.ranks:
            raise ValueError("adapters need ranks: give at least one")
        return self


class WorkloadConfig(_Part):
    """requests_per_s: Poisson arrivals at this rate for ``duration_s`` seconds.

    trace: a CSV in Azure's format, whose lengths are used in order (and, with ``trace_arrivals``, whose gaps, scaled to
    the mean rate ``requests_per_s``) instead of the fitted distributions; repeated where it is too short.
    length_scale: factor on all lengths. warmup_s: requests of the first seconds are served but not reported.
    """

    requests_per_s: Positive
    duration_s: Positive = 600.0
    warmup_s: NotNegative = 60.0
    length_scale: Positive = 1.0
    trace: str | None = None
    trace_arrivals: bool = False
    bursts: Bursts | None = None
    adapters: AdapterMix = AdapterMix()

    @model_validator(mode="after")
    def _possible(self) -> "WorkloadConfig":
        if self.warmup_s >= self.duration_s:
            raise ValueError("warmup_s must be less than duration_s: nothing would be reported")
        if self.trace_arrivals and (self.trace is None or self.bursts is not None):
            raise ValueError("trace_arrivals needs a trace, and excludes bursts")
        return self


@dataclass(frozen=True, slots=True)
class SimRequest:
    """One request. num_output_tokens: the truth, which only the simulator knows. max_tokens: the client's limit."""

    request_id: str
    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    adapter: Adapter | None
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One line of a trace. time_s: since its first line."""

    time_s: float
    num_prompt_tokens: int
    num_output_tokens: int


def load_trace(path: Path) -> list[TraceRow]:
    """Requests of a CSV with columns TIMESTAMP, ContextTokens, GeneratedTokens (Azure's format). Raises TraceError."""
    if not path.is_file():
        raise TraceError(f"no trace at {path}")
    rows: list[TraceRow] = []
    start: datetime | None = None
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} - set(reader.fieldnames or ())
        if missing:
            raise TraceError(f"{path}: columns missing: {', '.join(sorted(missing))}")
        for row in reader:
            try:
                whole, _, fraction = row["TIMESTAMP"].partition(".")
                moment = datetime.fromisoformat(whole)
                start = start or moment
                seconds = (moment - start).total_seconds() + (float(f"0.{fraction}") if fraction else 0.0)
                rows.append(TraceRow(seconds, int(row["ContextTokens"]), int(row["GeneratedTokens"])))
            except (TypeError, ValueError) as error:
                raise TraceError(f"{path}, line {reader.line_num}: {error}") from None
            if min(rows[-1].num_prompt_tokens, rows[-1].num_output_tokens) < 1:
                raise TraceError(f"{path}, line {reader.line_num}: a request has at least one token each way")
    if not rows:
        raise TraceError(f"{path} holds no requests")
    first_s = min(row.time_s for row in rows)
    return sorted((TraceRow(r.time_s - first_s, r.num_prompt_tokens, r.num_output_tokens) for r in rows), key=_time)


def make_adapters(mix: AdapterMix, bytes_per_rank: int) -> list[Adapter]:
    """``mix.count`` adapters, ranks in turn."""
    ranks = [mix.ranks[number % len(mix.ranks)] for number in range(mix.count)]
    return [Adapter(f"{number:064x}", rank, rank * bytes_per_rank) for number, rank in enumerate(ranks)]


def generate(config: WorkloadConfig, adapters: Sequence[Adapter], max_model_len: int, seed: int) -> list[SimRequest]:
    """All requests of a run, by arrival; prompts are cut to leave room for a token, outputs at ``max_model_len``.

    Every client sets the same limit on outputs, the longest output of the run: so far a prediction can go wrong.
    """
    streams = np.random.SeedSequence(seed).spawn(3)
    when, how_long, which = (np.random.Generator(np.random.PCG64(stream)) for stream in streams)
    trace = load_trace(Path(config.trace)) if config.trace is not None else None
    times = _arrivals(config, trace, when)
    prompts, outputs = _lengths(len(times), trace, how_long)
    chosen = _choose(config.adapters, adapters, times, which)
    requests = []
    # Python's own numbers: arithmetic on numpy's, one by one, takes several times as long.
    columns = [np.asarray(column).tolist() for column in (times, prompts, outputs, chosen)]
    max_tokens = max(1, round(max(columns[2], default=1) * config.length_scale))
    for number, (time_s, prompt, output, index) in enumerate(zip(*columns, strict=True)):
        num_prompt = min(max(1, round(prompt * config.length_scale)), max_model_len - 1)
        num_output = min(max(1, round(output * config.length_scale)), max_model_len - num_prompt)
        adapter = adapters[index] if index >= 0 else None
        requests.append(SimRequest(f"r{number}", time_s, num_prompt, num_output, adapter, max_tokens))
    return requests


def sample_lengths(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(prompt, output) tokens of ``count`` requests from the fitted distributions."""
    prompts = np.exp(np.interp(rng.random(count), _LEVELS, np.log(_PROMPT_TOKENS)))
    outputs = np.exp(np.interp(rng.random(count), _LEVELS, np.log(_OUTPUT_TOKENS)))
    return np.rint(prompts).astype(int), np.rint(outputs).astype(int)


def poisson_arrivals(
    requests_per_s: float, duration_s: float, rng: np.random.Generator, bursts: Bursts | None = None
) -> np.ndarray:
    """Seconds at which requests come, in order, all before ``duration_s``.

    Without bursts, another rate gives the same times, scaled.
    """
    # Unit-rate arrivals in operational time, mapped back through the cumulative rate: exact for any bursts.
    period_s = bursts.every_s if bursts else duration_s
    gain = 1.0 + (bursts.length_s * (bursts.factor - 1) / period_s if bursts else 0.0)
    total = requests_per_s * duration_s * max(1.0, gain, bursts.factor if bursts else 1.0)
    marks = np.cumsum(rng.exponential(size=int(total + 10 * total**0.5 + 100))) / requests_per_s
    if bursts:
        periods, rest = np.divmod(marks, period_s * gain)
        in_burst = np.minimum(rest, bursts.length_s * bursts.factor)
        marks = periods * period_s + in_burst / bursts.factor + (rest - in_burst)
    return marks[marks < duration_s]


def popularity_shares(count: int, popularity: Popularity, exponent: float) -> np.ndarray:
    """Share of the requests for each of ``count`` in order of popularity: equal, or as ``1 / place ** exponent``."""
    weights = np.ones(count) if popularity == "uniform" else 1.0 / np.arange(1, count + 1) ** exponent
    shares: np.ndarray = weights / weights.sum()
    return shares


def _time(row: TraceRow) -> float:
    return row.time_s


def _arrivals(config: WorkloadConfig, trace: list[TraceRow] | None, rng: np.random.Generator) -> np.ndarray:
    if config.trace_arrivals and trace is not None:
        span_s = trace[-1].time_s * len(trace) / max(1, len(trace) - 1)
        pace = len(trace) / max(span_s, 1e-9) / config.requests_per_s
        rounds = int(config.duration_s / (max(span_s, 1e-9) * pace)) + 1
        offsets = np.array([row.time_s for row in trace]) * pace
        times = np.concatenate([offsets + number * span_s * pace for number in range(rounds)])
        return times[times < config.duration_s]
    return poisson_arrivals(config.requests_per_s, config.duration_s, rng, config.bursts)


def _lengths(
    count: int, trace: list[TraceRow] | None, rng: np.random.Generator
) -> tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]:
    if trace is None:
        return sample_lengths(count, rng)
    rows = [trace[number % len(trace)] for number in range(count)]
    return [row.num_prompt_tokens for row in rows], [row.num_output_tokens for row in rows]


def _choose(mix: AdapterMix, adapters: Sequence[Adapter], times: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Index of each request's adapter; -1: the base model."""
    count = len(times)
    if not adapters:
        return np.full(count, -1)
    num_ranks = min(len(mix.ranks), len(adapters))
    rank_weights = popularity_shares(num_ranks, mix.rank_popularity, mix.exponent)
    groups = rng.choice(num_ranks, size=count, p=rank_weights)
    chosen = np.empty(count, int)
    for group in range(num_ranks):
        members = np.arange(group, len(adapters), len(mix.ranks))
        mine = np.flatnonzero(groups == group)
        shares = popularity_shares(len(members), mix.popularity, mix.exponent)
        places = rng.choice(len(members), size=len(mine), p=shares)
        moved = (times[mine] // mix.drift_s).astype(int) if mix.drift_s else 0
        chosen[mine] = members[(places + moved) % len(members)]
    chosen[rng.random(count) < mix.base_share] = -1
    return chosen
