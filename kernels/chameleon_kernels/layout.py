"""Where an adapter's rows lie: parts of a layer, pieces of rows, and the packing of pieces into pages. No torch.

Words
- slice: one projection with a LoRA pair, e.g. `q_proj`. A is stored as [rank, in] rows, B transposed as [rank, out]
  rows, the scale (alpha / rank) folded into B.
- part: slices that share an input and write side by side into one output (`qkv_proj` has three); one kernel call each.
- page: `page_elems` contiguous elements of a layer's KV-cache tensor, in the weights' dtype.
- piece: columns p * piece_elems to (p + 1) * piece_elems of a row, the last one shorter. A piece lies in one page and
  begins at a multiple of 8 elements; the pieces of a row lie anywhere. So a row may be wider than a page, as with
  tensor parallelism, where pages shrink with the KV heads and rows of A do not, and widths that do not divide the page
  waste little. All parts of a layer share one piece size; where rows fit whole, it is one piece per row.
- row-offset table: int64 [num_slices, 2, num_pieces, rank]; [s, 0, p, r] is where piece p of row r of A_s begins,
  [s, 1, p, r] the same for B_s, in elements from the KV tensor's `data_ptr()`. -1 means "zero and not stored"; such
  rows come last, so a slice of a lower rank, or one that the adapter does not touch, needs no memory. As every layer
  uses the same pages, one table serves all layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

ALIGNED_ELEMS = 8  # Sixteen bytes of a two-byte dtype: what a vectorised GPU load needs. Every piece begins so.
PIECE_ALIGN = 256  # Piece sizes are multiples of it, so that no tile of a kernel crosses from one piece to the next.
_PLANNING_RANK = 16
_TOLERATED_WASTE = 0.05


class PageTooSmallError(ValueError):
    """Pages are too small to hold anything useful, so this model's adapters cannot be paged."""


@dataclass(frozen=True, slots=True)
class Part:
    """One linear layer that carries LoRA: `y[:, out_start_s : out_start_s + out_s] += (x @ A_s.T) @ B_s` for each s.

    `first_slice` is the row-table index of its first slice; `slice_widths` are the output widths, side by side in y
    from column 0. `piece_elems` and `num_pieces` are the layer's: see the words above.
    """

    first_slice: int
    in_features: int
    slice_widths: tuple[int, ...]
    piece_elems: int
    num_pieces: int

    @property
    def num_slices(self) -> int:
        return len(self.slice_widths)

    @property
    def out_features(self) -> int:
        return sum(self.slice_widths)


def layer_parts(shapes: Mapping[str, tuple[int, Sequence[int]]], page_elems: int) -> dict[str, Part]:
    """Number the slices of a layer: {"qkv_proj": (in_features, (q_width, k_width, v_width)), ...} -> parts by name.

    Chooses the piece size for pages of `page_elems`: the fewest pieces with which an adapter of rank 16 wastes at most
    5 % of its pages, else the ones that waste least. Raises PageTooSmallError, and ValueError for a width below 1.
    """
    for name, (in_features, slice_widths) in shapes.items():
        if in_features < 1 or not slice_widths or min(slice_widths) < 1:
            raise ValueError(f"part {name!r} needs positive widths, got {in_features} -> {tuple(slice_widths)}")
    candidates = [_number(shapes, piece_elems) for piece_elems in _piece_sizes(shapes, page_elems)]
    if not candidates:
        raise PageTooSmallError(
            f"a page holds {page_elems} elements of an adapter and it takes {PIECE_ALIGN}; raise the KV-cache block "
            "size, or use vLLM's adapter slots for this model"
        )
    waste = []
    for parts in candidates:
        every = list(parts.values())
        plan = plan_rows(every, [_PLANNING_RANK] * len(slice_shapes(every)), page_elems)
        waste.append(plan.waste(every))
        if waste[-1] <= _TOLERATED_WASTE:
            return parts
    return candidates[waste.index(min(waste))]


def _piece_sizes(shapes: Mapping[str, tuple[int, Sequence[int]]], page_elems: int) -> list[int]:
    """Descending: whole rows if a page holds them, then the page and its simple fractions."""
    widest = max(max(in_features, *widths) for in_features, widths in shapes.values())
    sizes = [_round_up(widest, PIECE_ALIGN)] if _round_up(widest, ALIGNED_ELEMS) <= page_elems else []
    sizes += [page_elems // share // PIECE_ALIGN * PIECE_ALIGN for share in (1, 2, 3, 4, 8, 16)]
    return [size for i, size in enumerate(sizes) if size and (i == 0 or size < sizes[i - 1])]


def _number(shapes: Mapping[str, tuple[int, Sequence[int]]], piece_elems: int) -> dict[str, Part]:
    num_pieces = max(-(-max(in_features, *widths) // piece_elems) for in_features, widths in shapes.values())
    parts: dict[str, Part] = {}
    first_slice = 0
    for name, (in_features, slice_widths) in shapes.items():
        parts[name] = Part(first_slice, in_features, tuple(slice_widths), piece_elems, num_pieces)
        first_slice += len(slice_widths)
    return parts


def slice_shapes(parts: Sequence[Part]) -> list[tuple[int, int]]:
    """(in_features, out_features) of every slice, in row-table order."""
    return [(part.in_features, width) for part in parts for width in part.slice_widths]


def piece_spans(width: int, piece_elems: int) -> list[tuple[int, int]]:
    """(first column, end) of every piece of a row."""
    return list(pairwise((*range(0, width, piece_elems), width)))


@dataclass(frozen=True, slots=True)
class RowPlan:
    """How an adapter's pieces of one layer fill pages. `page` and `start`: int64 [num_slices, 2, num_pieces, rank], -1
    = absent. `piece_elems`: see the words above."""

    page: np.ndarray
    start: np.ndarray
    num_pages: int
    page_elems: int
    piece_elems: int

    @property
    def rank(self) -> int:
        return int(self.page.shape[3])

    def waste(self, parts: Sequence[Part]) -> float:
        """Share of the pages that holds no weights."""
        ranks = (self.page[:, :, 0] >= 0).sum(axis=2)
        stored = sum(int(rank) * width for rank, width in zip(ranks.flat, np.ravel(slice_shapes(parts)), strict=True))
        return 1 - stored / (self.num_pages * self.page_elems)

    def offsets(self, page_starts: Sequence[int] | np.ndarray) -> np.ndarray:
        """The row-offset table once page i lies at element `page_starts[i]`; int64, shaped like `page`."""
        starts = np.asarray(page_starts, dtype=np.int64)
        if starts.shape != (self.num_pages,):
            raise ValueError(f"the adapter needs {self.num_pages} pages, got {starts.shape} page starts")
        if starts.size and (starts.min() < 0 or (starts % ALIGNED_ELEMS).any()):
            raise ValueError(f"page starts must not be negative, and be multiples of {ALIGNED_ELEMS} elements")
        return np.where(self.page >= 0, starts[self.page] + self.start, -1)


@dataclass(frozen=True, slots=True)
class Run:
    """Pieces of adjacent rows, one behind the other. `start`: of the first, in elements; `stride`: to the next."""

    first_row: int
    num_rows: int
    first_column: int
    num_columns: int
    start: int
    stride: int


def runs(offsets: np.ndarray, width: int, piece_elems: int) -> Iterator[Run]:
    """The runs of one matrix with rows of `width`; `offsets`: int64 [num_pieces, rank], -1 = absent."""
    for piece, (begin, end) in enumerate(piece_spans(width, piece_elems)):
        stored = offsets[piece, : int((offsets[piece] >= 0).sum())]
        stride = _round_up(end - begin, ALIGNED_ELEMS)
        firsts = np.flatnonzero(np.diff(stored, prepend=-stride - 1) != stride)
        for first, last in zip(firsts, np.append(firsts, len(stored))[1:], strict=True):
            yield Run(int(first), int(last - first), begin, end - begin, int(stored[first]), stride)


def plan_rows(parts: Sequence[Part], slice_ranks: Sequence[int], page_elems: int) -> RowPlan:
    """Pack the rows of an adapter with rank `slice_ranks[s]` (0 = not adapted) in slice s into pages.

    Widest pieces first, each kind filling what earlier pages left over before it opens new pages, so that little is
    wasted when widths do not divide the page. Raises ValueError for a page that is no multiple of 8 elements or too
    small for the parts' pieces, and when every rank is 0.
    """
    shapes = slice_shapes(parts)
    if len(slice_ranks) != len(shapes):
        raise ValueError(f"need one rank for each of {len(shapes)} slices, got {len(slice_ranks)}")
    if min(slice_ranks) < 0 or max(slice_ranks) < 1:
        raise ValueError(f"slice ranks must be >= 0 and not all 0, got {tuple(slice_ranks)}")
    piece_elems = parts[0].piece_elems
    page = np.full((len(shapes), 2, parts[0].num_pieces, max(slice_ranks)), -1, dtype=np.int64)
    start = np.full_like(page, -1)
    used = np.zeros(0, dtype=np.int64)
    pieces = [
        (_round_up(end - begin, ALIGNED_ELEMS), s, side, piece)
        for s, widths in enumerate(shapes)
        for side, width in enumerate(widths)
        for piece, (begin, end) in enumerate(piece_spans(width, piece_elems))
    ]
    if page_elems % ALIGNED_ELEMS or max(pieces)[0] > page_elems:
        raise ValueError(
            f"pages of {page_elems} elements do not hold pieces of {max(pieces)[0]} at multiples of {ALIGNED_ELEMS}"
        )
    for size, s, side, piece in sorted(pieces, key=lambda each: -each[0]):
        rank = slice_ranks[s]
        used = _place(used, size, page_elems, page[s, side, piece, :rank], start[s, side, piece, :rank])
    return RowPlan(page, start, len(used), page_elems, piece_elems)


def _place(used: np.ndarray, size: int, page_elems: int, page: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Place len(page) pieces of `size`, writing their page and start; returns the new fill of every page."""
    num_rows = len(page)
    missing = num_rows - int(((page_elems - used) // size).sum())
    new_pages = max(0, -(-missing // (page_elems // size)))
    used = np.concatenate([used, np.zeros(new_pages, dtype=np.int64)])
    room = (page_elems - used) // size
    row_page = np.repeat(np.arange(len(used)), room)[:num_rows]
    taken = np.bincount(row_page, minlength=len(used))
    nth_in_page = np.arange(num_rows) - np.repeat(np.cumsum(taken) - taken, taken)
    page[:] = row_page
    start[:] = used[row_page] + nth_in_page * size
    return used + taken * size


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
