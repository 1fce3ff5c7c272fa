"""LoRA on the CPU: one call of the compiled kernel per part, or small GEMMs in torch where there is no compiler."""

import ctypes
import functools

import torch

from chameleon_kernels.batch import LoraBatch
from chameleon_kernels.cpu_build import load_library
from chameleon_kernels.layout import Part
from chameleon_kernels.rows import run_views

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SHRINK, EXPAND = 1, 2


def compiled(
    steps: int,
    y: torch.Tensor | None,
    x: torch.Tensor | None,
    h: torch.Tensor | None,
    kv: torch.Tensor,
    meta: torch.Tensor,
    max_adapters: int,
    part: Part,
) -> None:
    """Run SHRINK, EXPAND or both with the compiled kernel, on torch's number of threads.

    x is not needed to expand, nor y to shrink; h None (both steps only) means scratch of the kernel's own. Raises
    RuntimeError where the kernel is not available: only `small_gemms` works there.
    """
    library = load_library()
    if library is None:
        raise RuntimeError("this needs the compiled CPU kernel (see the warning above); run eagerly through apply_lora")
    tokens = x if x is not None else y
    error = library.chameleon_paged_lora(
        steps,
        *((x.data_ptr(), x.stride(0)) if x is not None else (None, 0)),
        *((y.data_ptr(), y.stride(0)) if y is not None else (None, 0)),
        kv.data_ptr(),
        meta.data_ptr(),
        max_adapters,
        tokens.shape[0],
        part.first_slice,
        len(part.slice_widths),
        part.in_features,
        part.piece_elems,
        part.num_pieces,
        _c_widths(part.slice_widths),
        *((h.data_ptr(), h.stride(1), h.stride(2)) if h is not None else (None, 0, 0)),
        DTYPE_CODES[tokens.dtype],
        DTYPE_CODES[kv.dtype],
        torch.get_num_threads(),
    )
    if error:
        raise MemoryError("no memory for the LoRA kernel's scratch; lower the number of tokens of a step")


@functools.cache
def _c_widths(widths: tuple[int, ...]) -> ctypes.Array:
    return (ctypes.c_int64 * len(widths))(*widths)


def small_gemms(y: torch.Tensor, x: torch.Tensor, kv: torch.Tensor, batch: LoraBatch, part: Part) -> None:
    """y += LoRA(x) with torch alone: float32 GEMMs per adapter and slice, on copies of its rows."""
    for tokens, adapter in batch.segments():
        rows = x[tokens].float()
        out_start = 0
        for s, width in enumerate(part.slice_widths, start=part.first_slice):
            a_offsets, b_offsets = adapter.offsets[s].numpy()
            rank = int((a_offsets[0] >= 0).sum())
            if rank:
                h, delta = torch.zeros(len(rows), rank), torch.zeros(len(rows), width)
                for row, column, a in run_views(a_offsets, part.in_features, part.piece_elems, kv):
                    h[:, row : row + len(a)] += rows[:, column : column + a.shape[1]] @ a.float().T
                for row, column, b in run_views(b_offsets, width, part.piece_elems, kv):
                    delta[:, column : column + b.shape[1]] += h[:, row : row + len(b)] @ b.float()
                out = y[:, out_start : out_start + width]
                out[tokens] = (out[tokens] + delta).to(y.dtype)
            out_start += width
