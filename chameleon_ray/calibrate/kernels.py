"""Bare kernels in a model's shapes on a CUDA device: what a step would take there if the host took no time.

One layer is timed and counted as often as the model has layers: matrix products with weights in 16 bits, torch's
attention, our LoRA kernels over pages. On a GPU each is one CUDA graph, so that launches do not count.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from chameleon_kernels import apply_lora
from chameleon_kernels.testing import make_batch, make_layer

from chameleon_ray.calibrate.measured import CalibrationError, Measured
from chameleon_ray.model_shape import ModelConfigError, ModelShape, read_config
from chameleon_ray.sim.fit import StepPoint
from chameleon_ray.sim.parallel import show_progress

RANKS = (8, 16, 32, 64, 128)
_BLOCK_TOKENS = 16
_MAX_MODEL_LEN = 8192
_ACTIVATIONS_BYTES = 2 << 30
_REPEATS = 7


LLAMA_8B = ModelShape("Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128, 128256, _MAX_MODEL_LEN)


def read_shape(model: str | None) -> ModelShape:
    """Of a folder with a ``config.json``; None: Llama 3.1 8B's. Raises CalibrationError."""
    if model is None:
        return LLAMA_8B
    try:
        shape = ModelShape.of(read_config(Path(model)), Path(model).resolve().name)
    except ModelConfigError as error:
        raise CalibrationError(f"--kernels reads the model's config.json: {error}") from None
    return replace(shape, max_model_len=min(shape.max_model_len, _MAX_MODEL_LEN))


@dataclass(frozen=True, slots=True)
class Step:
    """requests: (tokens computed, tokens of context) of each; ranks: of each request's adapter, 0 for none."""

    requests: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]


def measure_kernels(
    model: str | None,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    steps: Sequence[Step] | None = None,
) -> Measured:
    """See the module's head; steps: other ones than usual. Raises CalibrationError, also without a CUDA device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise CalibrationError("--kernels needs a CUDA device, and torch finds none: leave it out to measure an engine")
    shape = read_shape(model)
    timer = _Timer(device)
    bench = _Bench(shape, device, dtype, timer)
    steps = steps or usual_steps(shape.max_model_len)
    points = []
    for number, step in enumerate(steps):
        show_progress("kernels", number / len(steps))
        points.append(bench.point(step))
    show_progress("", None)
    element_bytes = dtype.itemsize
    loads = [(size, timer.copy_s(size)) for size in (shape.adapter_bytes(rank, element_bytes) for rank in RANKS)]
    return Measured(
        engine=f"bare kernels on {timer.name}, {shape.name}, {str(dtype).removeprefix('torch.')}",
        memory=_memory(shape, element_bytes, timer.total_bytes()),
        limits={"max_num_seqs": 256, "max_num_batched_tokens": 2048, "max_model_len": shape.max_model_len},
        steps=points,
        loads=loads,
        assumptions=[
            "Bare kernels: the host's time per step, sampling, norms and activations are not in the numbers.",
            "One layer is timed and multiplied by the number of layers.",
            "Memory: 90% of the device's, less weights and 2 GiB of activations; 128 GB of host memory.",
            "max_num_seqs, max_num_batched_tokens are vLLM's usual ones.",
        ],
    )


def usual_steps(max_model_len: int) -> list[Step]:
    """Batches that decode, prompts, both at once; without adapters, with one small or large, with one for each."""
    mixed = RANKS * 64
    steps = []
    for batch in (1, 4, 16, 64):
        for context in (128, 1024):
            requests = ((1, min(context, max_model_len // 2)),) * batch
            choices = ((0,) * batch, (RANKS[0],) * batch, (RANKS[-1],) * batch, mixed[:batch])
            steps += [Step(requests, ranks) for ranks in choices]
    for tokens in (64, 256, 512, 1024, 2048):
        steps += [Step(((min(tokens, max_model_len), 0),), (rank,)) for rank in (0, RANKS[0], RANKS[-1])]
    return [*steps, Step((*(((1, 512),) * 16), (512, 0)), mixed[:17])]


class _Bench:
    def __init__(self, shape: ModelShape, device: str, dtype: torch.dtype, timer: "_Timer") -> None:
        self._shape, self._device, self._dtype, self._timer = shape, device, dtype, timer
        self._weights = [
            torch.randn(sum(widths), inputs, device=device, dtype=dtype) for inputs, widths in shape.parts().values()
        ]
        self._head = torch.randn(shape.vocabulary, shape.hidden, device=device, dtype=dtype)

    def point(self, step: Step) -> StepPoint:
        """The time of one step, and what is in it."""
        tokens = sum(computed for computed, _ in step.requests)
        x = {weight.shape[1]: self._random(tokens, weight.shape[1]) for weight in self._weights}
        last = self._random(len(step.requests), self._shape.hidden)
        layer = self._timer.seconds(lambda: [torch.nn.functional.linear(x[w.shape[1]], w) for w in self._weights])
        head = self._timer.seconds(lambda: torch.nn.functional.linear(last, self._head))
        times = [layer, self._timer.seconds(self._attention(step.requests))]
        if any(step.ranks):
            times.append(self._timer.seconds(self._lora(step)))
        layers = self._shape.layers
        median, fastest = (sum(one[pick] for one in times) * layers + head[pick] for pick in (0, 1))
        used = {rank for rank in step.ranks if rank} if len(set(step.ranks)) == 1 else step.ranks
        return StepPoint(
            tokens=tokens,
            context_tokens=sum(context for _, context in step.requests),
            token_ranks=sum(one[0] * rank for one, rank in zip(step.requests, step.ranks, strict=True)),
            adapter_bytes=sum(self._shape.adapter_bytes(rank, self._dtype.itemsize) for rank in used),
            requests=len(step.requests),
            attended_tokens=sum(computed * (context + (computed + 1) / 2) for computed, context in step.requests),
            seconds=median,
            fastest_s=fastest,
            count=_REPEATS,
        )

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self._device, dtype=self._dtype)

    def _attention(self, requests: Sequence[tuple[int, int]]) -> Callable[[], object]:
        """Decoding requests of one length as one batch, each prompt by itself."""
        shape, attend = self._shape, torch.nn.functional.scaled_dot_product_attention
        decoding = [context for computed, context in requests if computed == 1]
        batches = [(len(decoding), 1, decoding[0] + 1)] if decoding else []
        batches += [(1, computed, context + computed) for computed, context in requests if computed > 1]
        inputs = [
            (
                self._random(count, shape.heads, queries, shape.head_dim),
                self._random(count, shape.kv_heads, keys, shape.head_dim),
                self._random(count, shape.kv_heads, keys, shape.head_dim),
                queries > 1,
            )
            for count, queries, keys in batches
        ]
        return lambda: [attend(q, k, v, is_causal=causal, enable_gqa=True) for q, k, v, causal in inputs]

    def _lora(self, step: Step) -> Callable[[], object]:
        parts = self._shape.parts()
        page_elems = max(
            self._shape.block_elems(_BLOCK_TOKENS),
            *(width for inputs, widths in parts.values() for width in (inputs, *widths)),
        )
        same = len(set(step.ranks)) == 1
        ranks = [step.ranks[0]] if same else list(step.ranks)
        layer = make_layer(ranks, parts, page_elems, self._dtype, self._device)
        of_token = [0 if same else n for n, (computed, _) in enumerate(step.requests) for _ in range(computed)]
        batch = make_batch(layer, of_token)
        xs = {part.in_features: self._random(len(of_token), part.in_features) for part in layer.parts.values()}
        ys = {part.out_features: self._random(len(of_token), part.out_features) for part in layer.parts.values()}

        def apply() -> None:
            for part in layer.parts.values():
                apply_lora(ys[part.out_features], xs[part.in_features], layer.kv, batch, part)

        return apply


class _Timer:
    """Seconds of device work."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        self.name = torch.cuda.get_device_name() if self._on_gpu else "CPU"

    def total_bytes(self) -> int:
        """Of the device's memory."""
        return torch.cuda.mem_get_info()[1] if self._on_gpu else 16 << 30

    def seconds(self, work: Callable[[], object]) -> tuple[float, float]:
        """(median, fastest) of several runs, after two that warm up."""
        for _ in range(2):
            work()
        run = self._graph(work) if self._on_gpu else work
        times = [self._time(run) for _ in range(_REPEATS)]
        return statistics.median(times), min(times)

    def copy_s(self, num_bytes: int) -> float:
        """Of a copy from page-locked host memory to the device, by median."""
        source = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._on_gpu)
        target = torch.empty(num_bytes, dtype=torch.uint8, device="cuda" if self._on_gpu else "cpu")
        times = [self._time(lambda: target.copy_(source, non_blocking=True)) for _ in range(_REPEATS + 2)]
        return statistics.median(times[2:])

    def _graph(self, work: Callable[[], object]) -> Callable[[], object]:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def _time(self, run: Callable[[], object]) -> float:
        if not self._on_gpu:
            began_s = time.perf_counter()
            run()
            return time.perf_counter() - began_s
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def _memory(shape: ModelShape, element_bytes: int, total_bytes: int) -> dict[str, int]:
    kv_bytes = 2 * shape.kv_heads * shape.head_dim * shape.layers * element_bytes
    left = int(0.9 * total_bytes) - shape.weights() * element_bytes - _ACTIVATIONS_BYTES
    if left < _BLOCK_TOKENS * kv_bytes:
        raise CalibrationError(f"{shape.name} does not fit in {total_bytes / 1e9:.0f} GB of device memory")
    return {
        "block_tokens": _BLOCK_TOKENS,
        "kv_bytes_per_token": kv_bytes,
        "pool_blocks": left // (_BLOCK_TOKENS * kv_bytes),
        "adapter_host_bytes": 128_000_000_000,
        "adapter_bytes_per_rank": shape.adapter_bytes(1, element_bytes),
    }
