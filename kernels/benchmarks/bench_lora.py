"""Paged LoRA kernels beside vLLM's own LoRA ops on padded slots, and beside the memory-bandwidth floor, in one run.

    python kernels/benchmarks/bench_lora.py [--device cuda] [--model llama-8b] [--json FILE]

A step applies every part of `--layers` layers once. Implementations take turns, so that a busy machine slows all
alike; figures are medians. "padded" is vLLM's ops on one slot per adapter, each padded to the largest rank: its
Triton ops on a GPU, its torch ops on a CPU. Where vLLM is not installed it is our own kernels on adapters padded to
the largest rank, and the output says so. The floor is the time to move what must move (each adapter's weights once, x
read, y read and written) at the bandwidth of a large copy measured in the same run. On a GPU a step is one CUDA
graph, so launches do not count. Before anything is timed, both results are compared with each other.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # So that it runs from a checkout.

from chameleon_kernels import LoraBatch, apply_lora, cpu_implementation, reference
from chameleon_kernels.layout import piece_spans, slice_shapes
from chameleon_kernels.testing import DEMO_SHAPES, TOLERANCE, Layer, make_batch, make_layer

try:
    import vllm
except ImportError:
    vllm = None

LLAMA_8B_SHAPES = {
    "qkv_proj": (4096, (4096, 1024, 1024)),
    "o_proj": (4096, (4096,)),
    "gate_up_proj": (4096, (14336, 14336)),
    "down_proj": (14336, (4096,)),
}
# Layer shapes, and the elements of a page: for the 8B model the keys and values of a block of 16 tokens.
MODELS = {"demo": (DEMO_SHAPES, 4096), "llama-8b": (LLAMA_8B_SHAPES, 32768)}
RANK_MIX = [8, 16, 32, 64, 128]
CASES = {"32 tokens, 8 adapters": (32, 8), "64 tokens, 64 adapters": (64, 64), "512 tokens, 8 adapters": (512, 8)}

Step = Callable[[], None]
ApplyPart = Callable[[Layer, str, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class Row:
    case: str
    paged_ms: float
    padded_ms: float
    floor_ms: float
    padded_over_paged: float
    paged_over_floor: float


@dataclass(frozen=True, slots=True)
class Work:
    """Layers in memory of their own, the step they do, and activations by width (shared by all layers)."""

    layers: list[Layer]
    batch: LoraBatch
    x: dict[int, torch.Tensor]
    y: dict[int, torch.Tensor]

    def run(self, apply: ApplyPart) -> None:
        for layer in self.layers:
            for name, part in layer.parts.items():
                apply(layer, name, self.y[part.out_features], self.x[part.in_features])

    @property
    def num_tokens(self) -> int:
        return self.batch.num_tokens

    def moved_bytes(self) -> int:
        """Bytes that one step must move: weights of the step's adapters, x once, y twice."""
        weights = sum(
            adapter.rank * (inputs + outputs)
            for adapter in self.batch.adapters
            for inputs, outputs in slice_shapes(list(self.layers[0].parts.values()))
        )
        activations = sum(part.in_features + 2 * part.out_features for part in self.layers[0].parts.values())
        return len(self.layers) * (weights + self.num_tokens * activations) * self.layers[0].kv.element_size()


def make_work(case: tuple[int, int], args: argparse.Namespace) -> Work:
    num_tokens, num_adapters = case
    shapes, page_elems = MODELS[args.model]
    ranks = [RANK_MIX[i % len(RANK_MIX)] for i in range(num_adapters)]
    dtype = getattr(torch, args.dtype)
    layer = make_layer(ranks, shapes, page_elems, dtype, args.device)
    layers = [layer, *(replace(layer, kv=layer.kv.clone()) for _ in range(args.layers - 1))]
    batch = make_batch(layer, [token % num_adapters for token in range(num_tokens)])
    widths = layer.parts.values()
    x = {part.in_features: torch.randn(num_tokens, part.in_features).to(args.device, dtype) for part in widths}
    y = {part.out_features: torch.zeros(num_tokens, part.out_features).to(args.device, dtype) for part in widths}
    return Work(layers, batch, x, y)


def padded_slots(work: Work) -> dict[tuple[int, str], list[tuple[torch.Tensor, torch.Tensor]]]:
    """vLLM's slots, by the layer's kv address and the part: for each slice, stacked A [slots, 1, rank, in] and B
    [slots, 1, out, rank], padded with zeros to the largest rank.
    """
    max_rank = max(adapter.rank for adapter in work.batch.adapters)
    slots = {}
    for layer in work.layers:
        for name, part in layer.parts.items():
            pairs = []
            for s, width in enumerate(part.slice_widths):
                a = torch.zeros(len(layer.adapters), 1, max_rank, part.in_features).to(layer.kv)
                b = torch.zeros(len(layer.adapters), 1, width, max_rank).to(layer.kv)
                for slot, adapter in enumerate(layer.adapters):
                    a[slot, 0, : adapter.rank] = reference.gather_rows(adapter, part, s, 0, layer.kv)
                    b[slot, 0, :, : adapter.rank] = reference.gather_rows(adapter, part, s, 1, layer.kv).T
                pairs.append((a, b))
            slots[layer.kv.data_ptr(), name] = pairs
    return slots


def vllm_cpu_step(work: Work) -> Step:
    """What vLLM's PunicaWrapperCPU.add_lora_linear does in decode; prefill comes down to the same ops."""
    from vllm.lora.ops.torch_ops import bgmv_expand_slice, bgmv_shrink

    slots = padded_slots(work)
    indices = torch.arange(work.num_tokens) % len(work.layers[0].adapters)

    def apply(layer: Layer, name: str, y: torch.Tensor, x: torch.Tensor) -> None:
        start = 0
        for (a, b), width in zip(slots[layer.kv.data_ptr(), name], layer.parts[name].slice_widths, strict=True):
            buffer = torch.zeros(work.num_tokens, a.shape[2])
            bgmv_shrink(x, a, buffer, indices, 1.0)
            bgmv_expand_slice(buffer, b, y, indices, start, width, True)
            start += width

    return lambda: work.run(apply)


def vllm_gpu_step(work: Work) -> Step:
    """What vLLM's PunicaWrapperGPU.add_lora_linear does."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    slots = padded_slots(work)
    num_slots, device = len(work.layers[0].adapters), work.batch.meta.device
    meta = LoRAKernelMeta.make(num_slots, work.num_tokens, device)
    meta.prepare_tensors(torch.arange(work.num_tokens, dtype=torch.int32, device=device) % num_slots)

    def apply(layer: Layer, name: str, y: torch.Tensor, x: torch.Tensor) -> None:
        pairs = slots[layer.kv.data_ptr(), name]
        shape = (len(pairs), work.num_tokens, pairs[0][0].shape[2])
        buffer = torch.empty(shape, dtype=torch.float32, device=device)
        lora_shrink(x, tuple(a for a, _ in pairs), buffer, *meta.meta_args(work.num_tokens, False), 1.0)
        arguments = meta.meta_args(work.num_tokens, False)
        lora_expand(buffer, tuple(b for _, b in pairs), y, *arguments, offset_start=0, add_inputs=True)

    return lambda: work.run(apply)


def own_padded_step(work: Work, args: argparse.Namespace) -> Step:
    """Without vLLM: our kernels on slots, i.e. adapters whose rows beyond their rank are stored zeros."""
    max_rank = max(adapter.rank for adapter in work.batch.adapters)
    shapes, page_elems = MODELS[args.model]
    num_adapters = len(work.layers[0].adapters)
    layer = make_layer([max_rank] * num_adapters, shapes, page_elems, work.layers[0].kv.dtype, args.device)
    memory = layer.kv.view(-1)
    for padded, adapter in zip(layer.adapters, work.layers[0].adapters, strict=True):
        slices = [(part, nth) for part in layer.parts.values() for nth in range(part.num_slices)]
        for (part, nth), side in product(slices, (0, 1)):
            rows = reference.gather_rows(adapter, part, nth, side, work.layers[0].kv)
            filled = torch.cat([rows, rows.new_zeros(max_rank - len(rows), rows.shape[1])])
            offsets = padded.offsets[part.first_slice + nth, side]
            for piece, (begin, end) in enumerate(piece_spans(rows.shape[1], part.piece_elems)):
                memory[offsets[piece, :, None] + torch.arange(end - begin, device=memory.device)] = filled[:, begin:end]
    layers = [layer, *(replace(layer, kv=layer.kv.clone()) for _ in range(len(work.layers) - 1))]
    batch = make_batch(layer, [token % num_adapters for token in range(work.num_tokens)])
    return paged_step(Work(layers, batch, work.x, work.y))


def paged_step(work: Work) -> Step:
    return lambda: work.run(lambda layer, name, y, x: apply_lora(y, x, layer.kv, work.batch, layer.parts[name]))


def check_same(work: Work, paged: Step, padded: Step) -> None:
    results = []
    for step in (paged, padded):
        for y in work.y.values():
            y.zero_()
        step()
        results.append([y.float() for y in work.y.values()])
    tolerance = 2 * len(work.layers) * TOLERANCE[work.layers[0].kv.dtype][1]  # Every layer adds to the same y.
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def timed_ms(step: Step, device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def graphed(step: Step) -> Step:
    """The step as one CUDA graph, which must have run before."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def copy_gb_s(device: str) -> float:
    """Bandwidth of a copy of 512 MiB, bytes read plus bytes written; the best of ten."""
    source = torch.zeros(128 * 1024 * 1024, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    best_ms = min(timed_ms(lambda: target.copy_(source), device) for _ in range(10))
    return 2 * source.nbytes / best_ms / 1e6


def bench(name: str, args: argparse.Namespace, bandwidth_gb_s: float) -> Row:
    work = make_work(CASES[name], args)
    paged = paged_step(work)
    if vllm is None:
        padded = own_padded_step(work, args)
    else:
        padded = vllm_cpu_step(work) if args.device == "cpu" else vllm_gpu_step(work)
    check_same(work, paged, padded)
    if args.device != "cpu":
        paged, padded = graphed(paged), graphed(padded)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(args.repeats):
        for step, list_ms in zip((paged, padded), times, strict=True):
            list_ms.append(timed_ms(step, args.device))
    paged_ms, padded_ms = (statistics.median(list_ms) for list_ms in times)
    floor_ms = work.moved_bytes() / bandwidth_gb_s / 1e6
    return Row(name, paged_ms, padded_ms, floor_ms, padded_ms / paged_ms, paged_ms / floor_ms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--model", choices=list(MODELS), help="layer shapes; default: demo on a CPU, llama-8b on a GPU")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    args.model = args.model or ("demo" if args.device == "cpu" else "llama-8b")

    if args.device == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        device = f"CPU, {torch.get_num_threads()} threads, {capability}, {cpu_implementation()} kernel"
    else:
        device = torch.cuda.get_device_name()
    padded = (
        f"vLLM {vllm.__version__}'s LoRA ops" if vllm else "our own kernels on padded ranks (vLLM is not installed)"
    )
    bandwidth_gb_s = copy_gb_s(args.device)
    print(f"{device}; {args.model}, {args.layers} layers, {args.dtype}; ranks {RANK_MIX}; padded = {padded}")
    print(f"copy bandwidth {bandwidth_gb_s:.1f} GB/s; milliseconds a step, median of {args.repeats}")
    print(f"{'case':26}{'paged':>10}{'padded':>10}{'floor':>10}{'padded/paged':>14}{'paged/floor':>13}")
    rows = []
    for name in CASES:
        row = bench(name, args, bandwidth_gb_s)
        rows.append(row)
        print(
            f"{row.case:26}{row.paged_ms:10.3f}{row.padded_ms:10.3f}{row.floor_ms:10.3f}"
            f"{row.padded_over_paged:14.1f}{row.paged_over_floor:13.1f}",
            flush=True,
        )
    if args.json:
        facts = {"device": device, "model": args.model, "dtype": args.dtype, "layers": args.layers, "padded": padded}
        facts |= {"copy_gb_s": bandwidth_gb_s, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
