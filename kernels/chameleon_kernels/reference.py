"""The equations, readable and in a precision of the caller's choice: what all other implementations are tested against.

For each token i of an adapter, and each slice s of a part (see layout.py for words and tables):
    h[s, i, r] = sum_k x[i, k] * A_s[r, k]
    y[i, out_start_s + n] += sum_r h[s, i, r] * B_s[r, n]
"""

import torch

from chameleon_kernels.batch import LoraBatch
from chameleon_kernels.layout import Part, piece_spans
from chameleon_kernels.rows import AdapterRows


def shrink(h: torch.Tensor, x: torch.Tensor, kv: torch.Tensor, batch: LoraBatch, part: Part) -> None:
    """h [1, num_slices, num_tokens, >= rank] = x [num_tokens, in] @ A.T, in h's dtype.

    Writes only h[0, s, i, :rank] for tokens i that have an adapter.
    """
    for tokens, adapter in batch.segments():
        for s in range(part.num_slices):
            a = gather_rows(adapter, part, s, 0, kv).to(h.dtype)
            h[0, s, tokens, : adapter.rank] = x[tokens].to(h.dtype) @ a.T


def expand(y: torch.Tensor, h: torch.Tensor, kv: torch.Tensor, batch: LoraBatch, part: Part) -> None:
    """y [num_tokens, out] += h @ B, summed in h's dtype. Rows of base-only tokens are not touched."""
    for tokens, adapter in batch.segments():
        out_start = 0
        for s, width in enumerate(part.slice_widths):
            b = gather_rows(adapter, part, s, 1, kv).to(h.dtype)
            delta = h[0, s, tokens, : adapter.rank] @ b
            out = slice(out_start, out_start + width)
            y[tokens, out] = (y[tokens, out].to(h.dtype) + delta).to(y.dtype)
            out_start += width


def apply(y: torch.Tensor, x: torch.Tensor, kv: torch.Tensor, batch: LoraBatch, part: Part, dtype: torch.dtype) -> None:
    """y += LoRA(x), all sums in `dtype`."""
    h = torch.empty(1, part.num_slices, x.shape[0], batch.spec.max_rank, dtype=dtype, device=x.device)
    shrink(h, x, kv, batch, part)
    expand(y, h, kv, batch, part)


def gather_rows(adapter: AdapterRows, part: Part, nth_slice: int, side: int, kv: torch.Tensor) -> torch.Tensor:
    """A (side 0) or B (side 1) of one of the part's slices as a [rank, width] copy; absent rows are zero."""
    width = part.in_features if side == 0 else part.slice_widths[nth_slice]
    length = kv.untyped_storage().nbytes() // kv.element_size() - kv.storage_offset()
    memory = kv.as_strided((length,), (1,), kv.storage_offset())
    pieces = []
    for offsets, (begin, end) in zip(
        adapter.offsets[part.first_slice + nth_slice, side], piece_spans(width, part.piece_elems), strict=False
    ):
        index = offsets.clamp(min=0)[:, None] + torch.arange(end - begin, device=kv.device)
        pieces.append(
            torch.where((offsets >= 0)[:, None], memory[index], torch.zeros((), dtype=kv.dtype, device=kv.device))
        )
    return torch.cat(pieces, dim=1)
