"""What callers use: `apply_lora` for a whole part, `shrink` and `expand` for its halves on a CPU.

    y[i, out_start_s : out_start_s + out_s] += (x[i] @ A_s.T) @ B_s        for every token i that has an adapter

x [num_tokens, in] and y [num_tokens, out] are float16, bfloat16 or float32 (the same for both), their last dimension
contiguous. `kv` is a layer's KV-cache tensor as weights: any shape or strides, its dtype the weights' (an fp8 cache has
to be viewed so), offsets count from its data_ptr(). Sums are in float32. Rows of y of base-only tokens, and padding
beyond the batch's tokens, are neither read nor written.
"""

import torch

from chameleon_kernels import cpu
from chameleon_kernels.batch import BatchSpec, LoraBatch
from chameleon_kernels.cpu_build import load_library
from chameleon_kernels.layout import Part

try:
    from chameleon_kernels import triton_ops
except ImportError:  # A CPU installation needs no Triton.
    triton_ops = None


def apply_lora(y: torch.Tensor, x: torch.Tensor, kv: torch.Tensor, batch: LoraBatch, part: Part) -> None:
    """y += LoRA(x) for one part of one layer, in place. Raises ValueError on shapes or dtypes that do not fit.

    On a GPU nothing waits for the device. While a CUDA graph is captured, and after `batch.update_for_capture`, the
    launches depend only on x.shape[0], `batch.spec` and `part`, and serve any step of so many tokens (run once before,
    so that Triton compiles); otherwise they are those that the step needs, none for a step without adapters. Can be
    traced with torch.compile.
    """
    _check_shapes(y, x, kv, part)
    if torch.compiler.is_compiling():
        spec = batch.spec
        bounds = (spec.max_tokens, spec.max_adapters, spec.max_rank)
        pieces = (part.piece_elems, part.num_pieces)
        torch.ops.chameleon_kernels.paged_lora(
            y, x, kv, batch.meta, *bounds, part.first_slice, part.slice_widths, *pieces
        )
        return
    if batch.num_segments == 0 and not batch.for_capture:
        return
    if not x.is_cpu:
        captured = batch.for_capture or torch.cuda.is_current_stream_capturing()
        _triton().paged_lora(y, x, kv, batch.meta, batch.spec, part, None if captured else batch.counts)
        return
    _check_step(x.shape[0], kv, batch)
    if load_library() is None:
        cpu.small_gemms(y, x, kv, batch, part)
    else:
        cpu.compiled(cpu.SHRINK | cpu.EXPAND, y, x, None, kv, batch.meta, batch.spec.max_adapters, part)


def new_hidden(x: torch.Tensor, batch: LoraBatch, part: Part) -> torch.Tensor:
    """Uninitialised h: float32 [1, num_slices, num_tokens, max_rank]."""
    return torch.empty(1, part.num_slices, x.shape[0], batch.spec.max_rank, dtype=torch.float32)


def shrink(h: torch.Tensor, x: torch.Tensor, kv: torch.Tensor, batch: LoraBatch, part: Part) -> None:
    """h[0, s, i, :rank_s] = x[i] @ A_s.T for every token i that has an adapter; h from `new_hidden`. On a CPU with the
    compiled kernel only; `apply_lora` runs anywhere.

    What lies beyond a slice's stored rows, and of base-only tokens, stays as it was.
    """
    _check_step(x.shape[0], kv, batch)
    cpu.compiled(cpu.SHRINK, None, x, h, kv, batch.meta, batch.spec.max_adapters, part)


def expand(y: torch.Tensor, h: torch.Tensor, kv: torch.Tensor, batch: LoraBatch, part: Part) -> None:
    """y[i, out_start_s : + out_s] += h[0, s, i] @ B_s for every token i that has an adapter; where `shrink` runs."""
    _check_step(y.shape[0], kv, batch)
    cpu.compiled(cpu.EXPAND, y, None, h, kv, batch.meta, batch.spec.max_adapters, part)


def cpu_implementation() -> str:
    """Either "compiled" or "torch"; builds the kernel if need be, so that an engine can call it at start-up."""
    return "torch" if load_library() is None else "compiled"


def _triton():
    if triton_ops is None:
        raise RuntimeError("LoRA on a GPU needs Triton, which cannot be imported; install the triton package")
    return triton_ops


def _check_shapes(y: torch.Tensor, x: torch.Tensor, kv: torch.Tensor, part: Part) -> None:
    if x.dim() != 2 or y.dim() != 2 or x.shape[0] != y.shape[0]:
        raise ValueError(f"x and y must be [num_tokens, width] of the same tokens, got {x.shape} and {y.shape}")
    if x.shape[1] != part.in_features or y.shape[1] != part.out_features:
        raise ValueError(f"x and y have widths {x.shape[1]} and {y.shape[1]}, which do not fit {part}")
    if x.stride(1) != 1 or y.stride(1) != 1:
        raise ValueError("the last dimension of x and y must be contiguous")
    if x.dtype != y.dtype or x.dtype not in cpu.DTYPE_CODES or kv.dtype not in cpu.DTYPE_CODES:
        raise ValueError(
            f"x and y must share a dtype, and it and the weights' be float32, float16 or bfloat16; "
            f"got x {x.dtype}, y {y.dtype}, weights {kv.dtype}"
        )


def _check_step(num_tokens: int, kv: torch.Tensor, batch: LoraBatch) -> None:
    if batch.num_tokens > num_tokens:
        raise ValueError(f"the batch describes {batch.num_tokens} tokens, x or y has {num_tokens}: update the batch")
    if batch.end > kv.untyped_storage().nbytes() // kv.element_size() - kv.storage_offset():
        raise ValueError(f"adapter rows end at element {batch.end}, beyond the KV tensor; wrong tensor or page starts")


LIBRARY = torch.library.Library("chameleon_kernels", "FRAGMENT")
LIBRARY.define(
    "paged_lora(Tensor(a!) y, Tensor x, Tensor kv, Tensor meta, int max_tokens, int max_adapters, int max_rank, "
    "int first_slice, int[] widths, int piece_elems, int num_pieces) -> ()"
)


def _paged_lora_cpu(y, x, kv, meta, max_tokens, max_adapters, max_rank, first_slice, widths, piece_elems, num_pieces):
    """The op on CPU tensors: for traced programs only, `apply_lora` itself calls the kernel directly."""
    part = Part(first_slice, x.shape[1], tuple(widths), piece_elems, num_pieces)
    cpu.compiled(cpu.SHRINK | cpu.EXPAND, y, x, None, kv, meta, max_adapters, part)


def _paged_lora_cuda(y, x, kv, meta, max_tokens, max_adapters, max_rank, first_slice, widths, piece_elems, num_pieces):
    spec = BatchSpec(max_tokens, max_adapters, max_rank)
    part = Part(first_slice, x.shape[1], tuple(widths), piece_elems, num_pieces)
    _triton().paged_lora(y, x, kv, meta, spec, part)


LIBRARY.impl("paged_lora", _paged_lora_cpu, "CPU")
LIBRARY.impl("paged_lora", _paged_lora_cuda, "CUDA")


@torch.library.register_fake("chameleon_kernels::paged_lora")
def _paged_lora_fake(y, x, kv, meta, max_tokens, max_adapters, max_rank, first_slice, widths, piece_elems, num_pieces):
    return None
