"""Measures one live engine: workloads as users would send them, then steps of many compositions, then adapter loads.

The first workload is a rehearsal: it warms the engine up, and its steps are fitted along with the others, because steps
among requests that come and go take longer than the same steps repeated (adapters have left the processor's caches).
The second one, of other requests and for adapters that the engine has not seen, is what the simulator has to predict.
Every other kind of step is measured several times, spread over the whole time; medians are taken, and the fastest tells
how busy the machine was otherwise.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain, zip_longest
from pathlib import Path

from chameleon_ray.calibrate.live import LiveAdapter, LiveEngine, Request
from chameleon_ray.calibrate.measured import CalibrationError, Effort, Served
from chameleon_ray.policy.adapter import Adapter
from chameleon_ray.sim.fit import Composition, StepPoint
from chameleon_ray.sim.workload import AdapterMix, WorkloadConfig, generate

Progress = Callable[[str, float], None]

_OUTPUTS = 6
_LOAD = 0.6
"""Of the highest rate that the engine serves: short queues, yet batches of several requests."""
_LENGTH_SCALE = 0.1
"""Of the Azure trace's lengths: 115 prompt and 21 output tokens on average."""
_MIN_COUNT = 2


def some_adapters(engine: LiveEngine, folders: Sequence[Path], most: int = 20) -> list[LiveAdapter]:
    """Up to ``most`` of the adapters in these folders, ranks in turn. Raises CalibrationError."""
    by_rank: dict[int, list[LiveAdapter]] = defaultdict(list)
    for adapter in map(engine.adapter, folders[:200]):
        by_rank[adapter.rank].append(adapter)
    if len(by_rank) < 2:
        raise CalibrationError(
            f"{len(folders)} adapters of {len(by_rank)} rank(s): a cost model needs adapters of two ranks at least"
        )
    in_turn = chain.from_iterable(zip_longest(*(by_rank[rank] for rank in sorted(by_rank))))
    return [adapter for adapter in in_turn if adapter is not None][:most]


# Steps


def measure_steps(
    engine: LiveEngine, adapters: Sequence[LiveAdapter], effort: Effort, progress: Progress
) -> list[StepPoint]:
    """Steps of many compositions: prompts, decoding, both; without adapters, with small and large ones, mixed."""
    probes = list(_probes(engine, adapters, effort))
    engine.steps.clear()
    for adapter in adapters:  # All are resident from here on.
        engine.add(4, 1, adapter)
    engine.run()
    engine.steps.clear()
    for repeat in range(effort.repeats):
        for number, (batch, prompt, chosen) in enumerate(probes):
            progress("steps", (repeat + number / len(probes)) / effort.repeats)
            _probe(engine, batch, prompt, chosen)
    measured = engine.steps.copy()
    engine.steps.clear()
    return step_points(measured)


def step_points(measured: Sequence[tuple[Composition, float]]) -> list[StepPoint]:
    """Steps of equal composition become one point each; those seen but once are left out."""
    kinds: dict[Composition, list[float]] = defaultdict(list)
    for composition, seconds in measured:
        kinds[composition].append(seconds)
    return [
        StepPoint(**asdict(kind), seconds=statistics.median(times), fastest_s=min(times), count=len(times))
        for kind, times in kinds.items()
        if len(times) >= _MIN_COUNT
    ]


def single_steps(measured: Sequence[tuple[Composition, float]]) -> list[StepPoint]:
    """A point for each step."""
    return [StepPoint(**asdict(kind), seconds=seconds, fastest_s=seconds) for kind, seconds in measured]


def _probes(
    engine: LiveEngine, adapters: Sequence[LiveAdapter], effort: Effort
) -> Iterator[tuple[int, int, list[LiveAdapter | None]]]:
    """(batch, prompt tokens, adapters in turn)."""
    by_rank = sorted(adapters, key=lambda adapter: adapter.rank)
    choices: list[list[LiveAdapter | None]] = [[None], [by_rank[0]], [by_rank[-1]], list(adapters)]
    limits = engine.config.scheduler_config
    longest = engine.config.model_config.max_model_len - 2 * _OUTPUTS
    pool_tokens = engine.memory.free_blocks() * engine.config.cache_config.block_size
    for batch in effort.batches:
        for prompt in effort.prompts:
            fits = batch < limits.max_num_seqs and prompt <= longest and 4 * batch * (prompt + _OUTPUTS) <= pool_tokens
            if fits and batch * prompt <= 8 * limits.max_num_batched_tokens:
                yield from ((batch, prompt, chosen) for chosen in choices)


def _probe(engine: LiveEngine, batch: int, prompt: int, chosen: Sequence[LiveAdapter | None]) -> None:
    """A batch of requests, and one more when the others are decoding."""
    requests = [engine.add(prompt, 2 * _OUTPUTS, chosen[number % len(chosen)]) for number in range(batch)]
    while engine.llm.has_unfinished_requests() and len(requests[-1].token_times_s) < _OUTPUTS // 2:
        engine.step()
    engine.add(prompt, _OUTPUTS, chosen[-1])
    engine.run()


# Loads


def measure_loads(
    engine: LiveEngine, adapters: Sequence[LiveAdapter], effort: Effort, progress: Progress
) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """(bytes, seconds) of loads from host memory and of fetches from disk: how much later an idle engine's first token
    comes, by median over ``effort.num_loads`` for each size. A fetch reads the files' headers as well; the files are in
    the system's page cache."""
    by_size = {adapter.size_bytes: adapter for adapter in adapters}
    times: dict[tuple[int, str], list[float]] = defaultdict(list)
    for turn in range(effort.num_loads):
        progress("loads", turn / effort.num_loads)
        for size_bytes, adapter in by_size.items():
            fresh = engine.adapter(Path(adapter.lora.lora_path))
            for where in ("disk", "gpu", "host"):
                if where == "host":
                    engine.memory.evict_idle()
                times[size_bytes, where].append(_ttft_s(engine, fresh))
    engine.steps.clear()
    median = {key: statistics.median(values) for key, values in times.items()}
    loads = [(size, max(1e-6, median[size, "host"] - median[size, "gpu"])) for size in by_size]
    fetches = [(size, max(1e-6, median[size, "disk"] - median[size, "host"])) for size in by_size]
    return loads, fetches


def _ttft_s(engine: LiveEngine, adapter: LiveAdapter) -> float:
    began_s = engine.now_s()
    request = engine.add(4, 1, adapter)
    engine.run()
    if request.end_s is None:
        raise CalibrationError("the engine does not serve an adapter any more; its log says why")
    return request.end_s - began_s


# The workload


def serve_workload(
    engine: LiveEngine, adapters: Sequence[LiveAdapter], effort: Effort, seed: int, progress: Progress
) -> list[Served]:
    """Open-loop: requests of the Azure trace's lengths (scaled) for the adapters, at a part of the rate that the engine
    can serve, sent when their time has come however late the engine is. Leaves its steps in ``engine.steps``."""
    limits = engine.config.model_config
    known = [Adapter(str(index), one.rank, one.size_bytes) for index, one in enumerate(adapters)]
    rate = _LOAD * _highest_rate(engine)
    config = WorkloadConfig(
        requests_per_s=rate,
        duration_s=effort.num_requests / rate,
        warmup_s=0.0,
        length_scale=_LENGTH_SCALE,
        adapters=AdapterMix(count=len(known), ranks=sorted({one.rank for one in adapters}), base_share=0.1),
    )
    todo = generate(config, known, limits.max_model_len, seed)
    requests: list[Request] = []
    engine.steps.clear()
    began_s = engine.now_s()
    while len(requests) < len(todo) or engine.llm.has_unfinished_requests():
        now_s = engine.now_s() - began_s
        while len(requests) < len(todo) and todo[len(requests)].arrival_s <= now_s:
            one = todo[len(requests)]
            adapter = adapters[int(one.adapter.digest)] if one.adapter else None
            requests.append(engine.add(one.num_prompt_tokens, one.num_output_tokens, adapter))
        if engine.llm.has_unfinished_requests():
            engine.step()
        else:
            engine.wait(todo[len(requests)].arrival_s - now_s)
        progress("workload", len(requests) / len(todo))
    return [
        Served(
            one.arrival_s,
            one.num_prompt_tokens,
            one.num_output_tokens,
            int(one.adapter.digest) if one.adapter else -1,
            request.token_times_s[0] - began_s,
            (request.end_s or began_s) - began_s,
        )
        for one, request in zip(todo, requests, strict=True)
    ]


def _highest_rate(engine: LiveEngine) -> float:
    """Base-model requests per second of such lengths when many are there at once."""
    config = WorkloadConfig(
        requests_per_s=24.0, duration_s=1.0, warmup_s=0.0, length_scale=_LENGTH_SCALE, adapters=AdapterMix(count=0)
    )
    for _ in range(2):  # The first time warms up.
        todo = generate(config, [], engine.config.model_config.max_model_len, seed=0)
        began_s = engine.now_s()
        for one in todo:
            engine.add(one.num_prompt_tokens, one.num_output_tokens)
        engine.run()
        rate = len(todo) / (engine.now_s() - began_s)
    return rate
