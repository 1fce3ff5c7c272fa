"""Triton kernels: one launch shrinks all slices of a part, one expands them; `launch.py` says how the work is cut.

    h[i, j] = sum over splits p of (sum over the p-th share of k of x[i, k] * A[j, k])     shrink, float32
    y[i, out_start_s + n] += sum_r h[i, s * rank + r] * B_s[r, n]                          expand, sums in float32

A is the part's slices' A rows, stacked. i counts the step's tokens that have an adapter, by adapter (`tokens` in
batch.py). Ranks count rounded up to multiples of 8, so that loads of h are aligned; rows that are not stored make
zeros. In small steps a segment of one token, most of decode, is multiplied without tensor cores, in float32;
elsewhere h is rounded to the weights' dtype before it meets B.

CUDA graphs: nothing but the grid's size depends on the host; what changes between steps is read from `meta`, and
programs share the step's items among them. With programmatic dependent launch, expand starts while shrink ends, and
has found its rows of B when h is there.

Checked in Triton's interpreter, which gets bfloat16 wrong unless operands are cast to float32 first: `_UPCAST_BF16`.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton import knobs

from chameleon_kernels.batch import BatchSpec
from chameleon_kernels.launch import (
    MAX_PROCESSORS,
    MAX_SLICES_PER_LAUNCH,
    Launch,
    StepCounts,
    choose_variant,
    plan_launches,
)
from chameleon_kernels.layout import Part

_UPCAST_BF16 = bool(knobs.runtime.interpret)
_INTERPRETED_PROCESSORS = 4  # Few, as the interpreter runs one program after the other; splits and turns remain.


def plan(num_tokens: int, spec: BatchSpec, part: Part, counts: StepCounts | None, num_processors: int) -> list[Launch]:
    """The launches of a part for `num_tokens` rows of x; counts: of this step, None: for any step of so many."""
    max_tiles = spec.num_tiles(num_tokens, choose_variant(num_tokens).tile)
    return list(plan_launches(part, num_tokens, max_tiles, spec.max_rank, num_processors, counts))


def new_hidden(launches: list[Launch], device: torch.device) -> torch.Tensor:
    """Uninitialised scratch that serves each of the launches, one after the other."""
    return torch.empty(max(launch.hidden_elems for launch in launches), dtype=torch.float32, device=device)


def paged_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    kv: torch.Tensor,
    meta: torch.Tensor,
    spec: BatchSpec,
    part: Part,
    counts: StepCounts | None = None,
    hidden: torch.Tensor | None = None,
) -> None:
    """y += LoRA(x) for one part. x [num_tokens, in], y [num_tokens, out], last dimensions contiguous.

    counts: of this step, for grids of just the size; None: grids for any step of so many tokens, to be captured.
    hidden: scratch from `new_hidden`; by default from the caching allocator (in a capture, the graph's pool).
    """
    num_tokens = x.shape[0]
    if num_tokens == 0 or (counts is not None and counts.tokens == 0):
        return
    num_processors, can_overlap = _device(x.device)
    launches = plan(num_tokens, spec, part, counts, num_processors)
    if hidden is None:
        hidden = new_hidden(launches, x.device)
    regions = spec.regions()
    for launch in launches:
        variant, num_slices = launch.variant, len(launch.widths)
        tiles_at, tokens_at = regions[variant.name][0], regions["tokens"][0]
        upcast = _UPCAST_BF16 and kv.dtype == torch.bfloat16
        _shrink_kernel[(launch.shrink_programs,)](
            hidden, x, kv, meta, tiles_at, tokens_at, regions["locks"][0], num_tokens, num_processors,
            launch.first_slice, num_slices, part.in_features, part.piece_elems, part.num_pieces, x.stride(0),
            COUNT_SLOT=variant.count_slot, BLOCK_M=variant.tile, BLOCK_N=variant.rows, BLOCK_K=variant.block_k,
            SINGLE=variant.single, PDL=can_overlap, UPCAST=upcast, num_warps=variant.num_warps,
            num_stages=variant.shrink_stages,
        )  # fmt: skip
        overlap = {"launch_pdl": True} if can_overlap else {}
        _expand_kernel[(launch.expand_programs,)](
            y, hidden, kv, meta, tiles_at, tokens_at, num_tokens, launch.first_slice, num_slices, launch.out_start,
            part.piece_elems, part.num_pieces, *launch.widths, *[0] * (MAX_SLICES_PER_LAUNCH - num_slices), y.stride(0),
            COUNT_SLOT=variant.count_slot, BLOCK_M=variant.tile, BLOCK_R=variant.expand_rows, BLOCK_N=variant.columns,
            SINGLE=variant.single, PDL=can_overlap, UPCAST=upcast, num_warps=variant.num_warps, **overlap,
        )  # fmt: skip


@cache
def _device(device: torch.device) -> tuple[int, bool]:
    """Processors of the device, and whether a kernel can start before the one it waits for has ended."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS, False
    properties = torch.cuda.get_device_properties(device)
    return min(properties.multi_processor_count, MAX_PROCESSORS), torch.version.hip is None and properties.major >= 9


@triton.jit
def _locate(meta_ptr, tiles_at, tile):
    """The tile's row-offset table, its adapter's rank, its first position in `tokens`, its number of tokens."""
    record = meta_ptr + tiles_at + 4 * tile
    table_ptr = tl.load(record).to(tl.pointer_type(tl.int64))
    return table_ptr, tl.load(record + 1).to(tl.int32), tl.load(record + 2), tl.load(record + 3).to(tl.int32)


@triton.jit(do_not_specialize=["tiles_at", "tokens_at", "locks_at", "num_rows", "num_processors", "first_slice",
                               "num_slices", "num_pieces"])  # fmt: skip
def _shrink_kernel(
    h_ptr, x_ptr, kv_ptr, meta_ptr, tiles_at, tokens_at, locks_at, num_rows, num_processors, first_slice, num_slices,
    in_features, piece_elems, num_pieces, x_stride,
    COUNT_SLOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SINGLE: tl.constexpr,
    PDL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    num_tiles = tl.load(meta_ptr + COUNT_SLOT).to(tl.int32)
    max_rank = tl.multiple_of(tl.load(meta_ptr + 4).to(tl.int32), 8)
    min_rank = tl.load(meta_ptr + 5).to(tl.int32)
    h_stride = num_slices * max_rank
    split_stride = tl.load(meta_ptr + 3) * h_stride
    row_blocks = tl.cdiv(h_stride, BLOCK_N)
    k_blocks = tl.cdiv(in_features, BLOCK_K)
    blocks = tl.maximum(1, num_tiles * tl.cdiv(num_slices * min_rank, BLOCK_N))
    splits = tl.minimum(k_blocks, tl.cdiv(num_processors, blocks))
    for item in range(tl.program_id(0), num_tiles * row_blocks * splits, tl.num_programs(0)):
        split = item % splits
        row_block = item // splits % row_blocks
        tile = item // splits // row_blocks
        table_ptr, rank, first, count = _locate(meta_ptr, tiles_at, tile)
        rank8 = (rank + 7) // 8 * 8
        if row_block * BLOCK_N < num_slices * rank8:
            j = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
            slice_id = j // rank8
            r = j % rank8
            is_row = (slice_id < num_slices) & (r < rank)
            rows_ptr = table_ptr + (2 * (first_slice + slice_id) * num_pieces * rank + r)
            k_begin = k_blocks * split // splits * BLOCK_K
            k_end = tl.minimum(k_blocks * (split + 1) // splits * BLOCK_K, in_features)
            nth = tl.arange(0, BLOCK_M)
            token = tl.load(meta_ptr + tokens_at + first + nth, mask=nth < count, other=0)
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            if SINGLE:  # noqa: SIM108 (chosen when it is compiled)
                is_single = count == 1
            else:
                is_single = False
            if is_single:
                x_row = x_ptr + tl.load(meta_ptr + tokens_at + first) * x_stride
                x_end = tl.where(tl.load(meta_ptr + tokens_at + first) < num_rows, k_end, 0)
                products = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
                for piece in range(k_begin // piece_elems, tl.cdiv(k_end, piece_elems)):
                    offset = tl.load(rows_ptr + piece * rank, mask=is_row, other=-1)
                    base = tl.multiple_of((offset - piece * piece_elems)[:, None], [8, 8])
                    end = tl.minimum(k_end, (piece + 1) * piece_elems)
                    for k0 in range(tl.maximum(k_begin, piece * piece_elems), end, BLOCK_K):
                        k = k0 + tl.arange(0, BLOCK_K)
                        x = tl.load(x_row + k, mask=k < tl.minimum(end, x_end), other=0.0).to(tl.float32)
                        in_a = (offset >= 0)[:, None] & (k < end)[None, :]
                        a = tl.load(kv_ptr + (base + k[None, :]), mask=in_a, other=0.0).to(tl.float32)
                        products += x[None, :] * a
                acc += tl.where((nth == 0)[:, None], tl.sum(products, 1)[None, :], 0.0)
            else:
                in_x = ((nth < count) & (token < num_rows))[:, None]
                x_rows = x_ptr + token[:, None] * x_stride
                for piece in range(k_begin // piece_elems, tl.cdiv(k_end, piece_elems)):
                    offset = tl.load(rows_ptr + piece * rank, mask=is_row, other=-1)
                    base = tl.multiple_of((offset - piece * piece_elems)[None, :], [8, 8])
                    end = tl.minimum(k_end, (piece + 1) * piece_elems)
                    for k0 in range(tl.maximum(k_begin, piece * piece_elems), end, BLOCK_K):
                        k = k0 + tl.arange(0, BLOCK_K)
                        x = tl.load(x_rows + k[None, :], mask=in_x & (k < end)[None, :], other=0.0)
                        in_a = (offset >= 0)[None, :] & (k < end)[:, None]
                        a = tl.load(kv_ptr + (base + k[:, None]), mask=in_a, other=0.0)
                        if UPCAST:
                            x = x.to(tl.float32)
                            a = a.to(tl.float32)
                        acc = tl.dot(x.to(a.dtype), a, acc, input_precision="ieee")
            h_ptrs = h_ptr + (first + nth)[:, None] * h_stride + j[None, :]
            in_h = (nth < count)[:, None] & (j < num_slices * rank8)[None, :]
            if splits == 1:
                tl.store(h_ptrs, acc, mask=in_h)
            else:
                tl.store(h_ptrs + (1 + split) * split_stride, acc, mask=in_h)
                lock = meta_ptr + locks_at + tile * row_blocks + row_block
                tl.debug_barrier()  # All of this program's numbers are written before it says so.
                if tl.atomic_add(lock, 1) == splits - 1:
                    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
                    for other in range(splits):
                        share = h_ptrs + (1 + other) * split_stride
                        total += tl.load(share, mask=in_h, other=0.0, cache_modifier=".cg")
                    tl.store(h_ptrs, total, mask=in_h)
                    tl.atomic_xchg(lock, 0)


@triton.jit(do_not_specialize=["tiles_at", "tokens_at", "num_rows", "first_slice", "num_slices", "num_pieces"])
def _expand_kernel(
    y_ptr, h_ptr, kv_ptr, meta_ptr, tiles_at, tokens_at, num_rows, first_slice, num_slices, out_start, piece_elems,
    num_pieces, w0, w1, w2, w3, y_stride,
    COUNT_SLOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, SINGLE: tl.constexpr,
    PDL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.load(meta_ptr + COUNT_SLOT).to(tl.int32)
    h_stride = num_slices * tl.multiple_of(tl.load(meta_ptr + 4).to(tl.int32), 8)
    b1 = tl.cdiv(w0, BLOCK_N)
    b2 = b1 + tl.cdiv(w1, BLOCK_N)
    b3 = b2 + tl.cdiv(w2, BLOCK_N)
    blocks = b3 + tl.cdiv(w3, BLOCK_N)
    for item in range(tl.program_id(0), num_tiles * blocks, tl.num_programs(0)):
        block = item % blocks
        slice_id = (block >= b1).to(tl.int32) + (block >= b2).to(tl.int32) + (block >= b3).to(tl.int32)
        width = tl.where(slice_id == 0, w0, tl.where(slice_id == 1, w1, tl.where(slice_id == 2, w2, w3)))
        before = tl.where(slice_id == 0, 0, tl.where(slice_id == 1, b1, tl.where(slice_id == 2, b2, b3)))
        left = tl.where(slice_id > 0, w0, 0) + tl.where(slice_id > 1, w1, 0) + tl.where(slice_id > 2, w2, 0)
        column = (block - before) * BLOCK_N
        n = column + tl.arange(0, BLOCK_N)
        in_slice = (n < width)[None, :]
        piece = column // piece_elems
        table_ptr, rank, first, count = _locate(meta_ptr, tiles_at, item // blocks)
        rank8 = (rank + 7) // 8 * 8
        rows_ptr = table_ptr + ((2 * (first_slice + slice_id) + 1) * num_pieces + piece) * rank
        if tl.load(rows_ptr) >= 0:
            y_columns = y_ptr + (out_start + left + n)
            if SINGLE:  # noqa: SIM108 (chosen when it is compiled)
                is_single = count == 1
            else:
                is_single = False
            if is_single:
                only = tl.load(meta_ptr + tokens_at + first)
                h_row = h_ptr + first * h_stride + slice_id * rank8
                products = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
                for r0 in range(0, rank, BLOCK_R):
                    r = r0 + tl.arange(0, BLOCK_R)
                    offset = tl.load(rows_ptr + r, mask=r < rank, other=-1)
                    base = tl.multiple_of((offset - piece * piece_elems)[:, None], [8, 8])
                    in_b = (offset >= 0)[:, None] & in_slice
                    b = tl.load(kv_ptr + (base + n[None, :]), mask=in_b, other=0.0).to(tl.float32)
                    if PDL:
                        tl.extra.cuda.gdc_wait()
                    products += tl.load(h_row + r, mask=r < rank8, other=0.0)[:, None] * b
                in_row = n < tl.where(only < num_rows, width, 0)
                y_row = y_columns + only * y_stride
                row = tl.load(y_row, mask=in_row, other=0.0).to(tl.float32) + tl.sum(products, 0)
                tl.store(y_row, row.to(y_ptr.dtype.element_ty), mask=in_row)
            else:
                nth = tl.arange(0, BLOCK_M)
                token = tl.load(meta_ptr + tokens_at + first + nth, mask=nth < count, other=0)
                h_rows = h_ptr + ((first + nth)[:, None] * h_stride + slice_id * rank8)
                acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
                if PDL:  # Not in the loop, where it would keep the compiler from loading ahead.
                    tl.extra.cuda.gdc_wait()
                for r0 in range(0, rank, BLOCK_R):
                    r = r0 + tl.arange(0, BLOCK_R)
                    offset = tl.load(rows_ptr + r, mask=r < rank, other=-1)
                    base = tl.multiple_of((offset - piece * piece_elems)[:, None], [8, 8])
                    in_b = (offset >= 0)[:, None] & in_slice
                    b = tl.load(kv_ptr + (base + n[None, :]), mask=in_b, other=0.0)
                    if UPCAST:
                        b = b.to(tl.float32)
                    h = tl.load(h_rows + r[None, :], mask=(nth < count)[:, None] & (r < rank8)[None, :], other=0.0)
                    acc = tl.dot(h.to(b.dtype), b, acc, input_precision="ieee")
                in_y = ((nth < count) & (token < num_rows))[:, None] & in_slice
                y_ptrs = y_columns[None, :] + token[:, None] * y_stride
                y = tl.load(y_ptrs, mask=in_y, other=0.0).to(tl.float32) + acc
                tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=in_y)
    if PDL:  # Whatever it had to do, this kernel ends after shrink, so that the next one finds nothing of it running.
        tl.extra.cuda.gdc_wait()
