"""Triton kernels: one launch shrinks all slices of a part, one expands them.

    h[p, s, i, r] = sum over the p-th share of k of x[i, k] * A_s[r, k]           shrink, float32
    y[i, out_start_s + n] += sum_r (sum_p h[p, s, i, r]) * B_s[r, n]              expand, sums in float32

`p` cuts the input dimension so that a few tokens still fill a GPU; the shares are added up by expand, in a fixed order
and without atomics, so that results repeat bit by bit. Before it meets B, h is rounded to the weights' dtype.

CUDA graphs: the grid depends on the number of rows of x (the captured size), the spec and the part only. Programs
beyond the step's tiles or for slices without rows leave at once, ranks beyond an adapter's own are never looped over;
nothing is padded to a maximum rank. All that changes between steps is read from `meta` (batch.py).

Checked in Triton's interpreter, which gets bfloat16 wrong unless operands are cast to float32 first: `_UPCAST_BF16`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton import knobs

from chameleon_kernels.batch import LARGE_TILE, NUM_COUNTS, SMALL_TILE, BatchSpec
from chameleon_kernels.layout import Part

MAX_SLICES_PER_LAUNCH = 4
SMALL_STEP_TOKENS = 512  # Up to here a step is taken for decode: small tiles, a finer cut of the input dimension.
_UPCAST_BF16 = bool(knobs.runtime.interpret)


@dataclass(frozen=True, slots=True)
class Launch:
    """Everything static about the launches for one number of tokens. Untuned: chosen by reasoning, not measurement."""

    count_slot: int  # Where in `meta` the number of tiles stands.
    tiles_at: int
    tiles_capacity: int
    num_tiles: int
    block_m: int  # tokens
    block_r: int  # rank rows
    block_k: int  # input columns
    block_n: int  # output columns
    rank_programs: int
    num_splits: int


def plan_launch(spec: BatchSpec, num_tokens: int, in_features: int) -> Launch:
    """The launch for `num_tokens` rows of x: a function of static sizes alone."""
    small = num_tokens <= SMALL_STEP_TOKENS
    tile = SMALL_TILE if small else LARGE_TILE
    at, length = spec.regions()["small" if small else "large"]
    block_k = 128 if small else 64
    splits = 8 if num_tokens <= 64 else 4 if num_tokens <= 256 else 1
    return Launch(
        count_slot=1 if small else 2,
        tiles_at=at,
        tiles_capacity=length // 2,
        num_tiles=spec.num_tiles(num_tokens, tile),
        block_m=tile,
        block_r=16 if small else 32,
        block_k=block_k,
        block_n=128,
        rank_programs=4 if small else 2,
        num_splits=min(splits, triton.cdiv(in_features, block_k)),
    )


def new_hidden(x: torch.Tensor, spec: BatchSpec, num_slices: int) -> torch.Tensor:
    """Uninitialised h: float32 [num_splits, num_slices, num_tokens, max_rank]."""
    splits = plan_launch(spec, x.shape[0], x.shape[1]).num_splits
    return torch.empty(splits, num_slices, x.shape[0], spec.max_rank, dtype=torch.float32, device=x.device)


def shrink(h: torch.Tensor, x: torch.Tensor, kv: torch.Tensor, meta: torch.Tensor, spec: BatchSpec, part: Part) -> None:
    """Fill h[:, s, i, :rank] of every token i that has an adapter, for slices whose first row is stored.

    x [num_tokens, in], last dimension contiguous; h from `new_hidden`.
    """
    num_tokens, in_features = x.shape
    launch = plan_launch(spec, num_tokens, in_features)
    _shrink_kernel[(launch.num_tiles, h.shape[1] * launch.rank_programs, launch.num_splits)](
        h, x, kv, meta, spec.max_adapters, launch.tiles_at, launch.tiles_capacity, part.first_slice, in_features,
        part.piece_elems, part.num_pieces, x.stride(0), h.stride(0), h.stride(1), h.stride(2),
        COUNT_SLOT=launch.count_slot, BLOCK_M=launch.block_m, BLOCK_R=launch.block_r, BLOCK_K=launch.block_k,
        RANK_PROGRAMS=launch.rank_programs, NUM_SPLITS=launch.num_splits,
        UPCAST=_upcast(kv), NUM_COUNTS=NUM_COUNTS,
    )  # fmt: skip


def expand(y: torch.Tensor, h: torch.Tensor, kv: torch.Tensor, meta: torch.Tensor, spec: BatchSpec, part: Part) -> None:
    """y[i, out_start_s : + out_s] += h @ B_s for every token that has an adapter.

    y [num_tokens, out], last dimension contiguous.
    """
    launch = plan_launch(spec, y.shape[0], part.in_features)
    widths = part.slice_widths
    out_start = 0
    for first in range(0, len(widths), MAX_SLICES_PER_LAUNCH):
        some = widths[first : first + MAX_SLICES_PER_LAUNCH]
        w0, w1, w2, w3 = (*some, *[0] * (MAX_SLICES_PER_LAUNCH - len(some)))
        _expand_kernel[(launch.num_tiles, triton.cdiv(max(some), launch.block_n), len(some))](
            y, h, kv, meta, spec.max_adapters, launch.tiles_at, launch.tiles_capacity, part.first_slice, first,
            out_start, part.piece_elems, part.num_pieces, w0, w1, w2, w3, y.stride(0), h.stride(0), h.stride(1),
            h.stride(2), COUNT_SLOT=launch.count_slot, BLOCK_M=launch.block_m, BLOCK_R=16, BLOCK_N=launch.block_n,
            NUM_SPLITS=h.shape[0], UPCAST=_upcast(kv), NUM_COUNTS=NUM_COUNTS,
        )  # fmt: skip
        out_start += sum(some)


def paged_lora(
    y: torch.Tensor, x: torch.Tensor, kv: torch.Tensor, meta: torch.Tensor, spec: BatchSpec, part: Part
) -> None:
    """y += LoRA(x) for one part: both launches; scratch from the caching allocator (in a capture, the graph's pool)."""
    if x.shape[0] == 0:
        return
    h = new_hidden(x, spec, part.num_slices)
    shrink(h, x, kv, meta, spec, part)
    expand(y, h, kv, meta, spec, part)


def _upcast(kv: torch.Tensor) -> bool:
    return _UPCAST_BF16 and kv.dtype == torch.bfloat16


@triton.jit
def _locate(meta_ptr, max_adapters, tiles_at, tiles_capacity, tile, BLOCK_M: tl.constexpr, NUM_COUNTS: tl.constexpr):
    """The tile's row-offset table, its adapter's rank, its token indices and which of them exist."""
    segment = tl.load(meta_ptr + tiles_at + tile)
    first = tl.load(meta_ptr + tiles_at + tiles_capacity + tile)
    fields = meta_ptr + NUM_COUNTS + segment
    table_ptr = tl.load(fields).to(tl.pointer_type(tl.int64))
    rank = tl.load(fields + max_adapters).to(tl.int32)
    end = tl.load(fields + 2 * max_adapters) + tl.load(fields + 3 * max_adapters)
    position = first + tl.arange(0, BLOCK_M)
    exists = position < end
    token = tl.load(meta_ptr + NUM_COUNTS + 4 * max_adapters + position, mask=exists, other=0)
    return table_ptr, rank, token, exists


@triton.jit
def _shrink_kernel(
    h_ptr, x_ptr, kv_ptr, meta_ptr, max_adapters, tiles_at, tiles_capacity, first_slice, in_features,
    piece_elems, num_pieces, x_stride, h_split_stride, h_slice_stride, h_token_stride,
    COUNT_SLOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    RANK_PROGRAMS: tl.constexpr, NUM_SPLITS: tl.constexpr, UPCAST: tl.constexpr,
    NUM_COUNTS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    slice_id = tl.program_id(1) // RANK_PROGRAMS
    rank_program = tl.program_id(1) % RANK_PROGRAMS
    split = tl.program_id(2)
    if tile >= tl.load(meta_ptr + COUNT_SLOT):
        return
    table_ptr, rank, token, exists = _locate(
        meta_ptr, max_adapters, tiles_at, tiles_capacity, tile, BLOCK_M, NUM_COUNTS
    )
    if rank_program * BLOCK_R >= rank:
        return
    rows_ptr = table_ptr + 2 * (first_slice + slice_id) * num_pieces * rank
    if tl.load(rows_ptr) < 0:
        return
    x_rows = x_ptr + token[:, None] * x_stride
    h_rows = h_ptr + split.to(tl.int64) * h_split_stride + slice_id * h_slice_stride + token[:, None] * h_token_stride
    for r0 in range(rank_program * BLOCK_R, rank, RANK_PROGRAMS * BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for piece in range(0, tl.cdiv(in_features, piece_elems)):
            offset = tl.load(rows_ptr + piece * rank + r, mask=r < rank, other=-1)
            stored = (offset >= 0)[None, :]
            row_offset = tl.multiple_of(offset[None, :], [8, 8])
            first = piece * piece_elems
            end = tl.minimum(first + piece_elems, in_features)
            for k0 in range(first + split * BLOCK_K, end, NUM_SPLITS * BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                x = tl.load(x_rows + k[None, :], mask=exists[:, None] & (k < end)[None, :], other=0.0)
                a = tl.load(kv_ptr + (row_offset + (k - first)[:, None]), mask=stored & (k < end)[:, None], other=0.0)
                if UPCAST:
                    x = x.to(tl.float32)
                    a = a.to(tl.float32)
                acc = tl.dot(x.to(a.dtype), a, acc, input_precision="ieee")
        tl.store(h_rows + r[None, :], acc, mask=exists[:, None] & (r < rank)[None, :])


@triton.jit
def _expand_kernel(
    y_ptr, h_ptr, kv_ptr, meta_ptr, max_adapters, tiles_at, tiles_capacity, first_slice, first_launch_slice, out_start,
    piece_elems, num_pieces, w0, w1, w2, w3, y_stride, h_split_stride, h_slice_stride, h_token_stride,
    COUNT_SLOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr, UPCAST: tl.constexpr, NUM_COUNTS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    column_block = tl.program_id(1)
    nth = tl.program_id(2)
    if tile >= tl.load(meta_ptr + COUNT_SLOT):
        return
    width = tl.where(nth == 0, w0, tl.where(nth == 1, w1, tl.where(nth == 2, w2, w3)))
    if column_block * BLOCK_N >= width:
        return
    table_ptr, rank, token, exists = _locate(
        meta_ptr, max_adapters, tiles_at, tiles_capacity, tile, BLOCK_M, NUM_COUNTS
    )
    slice_id = first_launch_slice + nth
    piece = column_block * BLOCK_N // piece_elems
    rows_ptr = table_ptr + ((2 * (first_slice + slice_id) + 1) * num_pieces + piece) * rank
    if tl.load(rows_ptr) < 0:
        return
    n = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_slice = (n < width)[None, :]
    h_rows = h_ptr + slice_id * h_slice_stride + token[:, None] * h_token_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        offset = tl.load(rows_ptr + r, mask=r < rank, other=-1)
        row_offset = tl.multiple_of(offset[:, None], [8, 8])
        b = tl.load(
            kv_ptr + (row_offset + (n - piece * piece_elems)[None, :]),
            mask=(offset >= 0)[:, None] & in_slice,
            other=0.0,
        )
        if UPCAST:
            b = b.to(tl.float32)
        in_h = exists[:, None] & (r < rank)[None, :]
        h = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for split in tl.static_range(NUM_SPLITS):
            h += tl.load(h_rows + split * h_split_stride + r[None, :], mask=in_h, other=0.0)
        acc = tl.dot(h.to(b.dtype), b, acc, input_precision="ieee")
    before = tl.where(nth > 0, w0, 0) + tl.where(nth > 1, w1, 0) + tl.where(nth > 2, w2, 0)
    y_ptrs = y_ptr + token[:, None] * y_stride + (out_start + before + n)[None, :]
    in_y = exists[:, None] & in_slice
    y = tl.load(y_ptrs, mask=in_y, other=0.0).to(tl.float32)
    tl.store(y_ptrs, (y + acc).to(y_ptr.dtype.element_ty), mask=in_y)
