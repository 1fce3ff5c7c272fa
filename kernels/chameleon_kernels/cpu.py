"""LoRA on the CPU: one call of the compiled kernel per part, or small GEMMs in torch where there is no compiler."""

import ctypes
import functools

import torch

from chameleon_kernels.batch import LoraBatch
from chameleon_kernels.cpu_build import load_library
from chameleon_kernels.layout import AdapterRows, Part

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
    """y += LoRA(x) with torch alone: one pair of GEMMs per adapter, slice and run of adjacent rows."""
    for tokens, adapter in batch.segments():
        rows = x[tokens]
        out_start = 0
        for s, width in enumerate(part.slice_widths, start=part.first_slice):
            a_runs = row_runs(adapter, s, 0, part.in_features, kv)
            if a_runs:
                hidden = torch.cat([rows.to(a.dtype) @ a.T for _, a in a_runs], dim=1)
                delta = torch.zeros(len(tokens), width, dtype=torch.float32, device=y.device)
                for first, b in row_runs(adapter, s, 1, width, kv):
                    delta += hidden[:, first : first + b.shape[0]] @ b
                y[:, out_start : out_start + width].index_add_(0, tokens, delta.to(y.dtype))
            out_start += width


def row_runs(
    adapter: AdapterRows, slice_index: int, side: int, width: int, kv: torch.Tensor
) -> list[tuple[int, torch.Tensor]]:
    """Views [n, width] of rows that lie next to each other, with the index of their first row; absent rows left out."""
    offsets = adapter.offsets[slice_index, side].tolist()
    runs: list[tuple[int, torch.Tensor]] = []
    first = 0
    for r in range(1, len(offsets) + 1):
        if r < len(offsets) and offsets[r] == offsets[r - 1] + width:
            continue
        if offsets[first] >= 0:
            view = kv.as_strided((r - first, width), (width, 1), kv.storage_offset() + offsets[first])
            runs.append((first, view))
        first = r
    return runs
