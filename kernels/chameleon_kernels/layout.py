"""Where an adapter's rows lie: parts of a layer, the packing of rows into pages, and row-offset tables.

Words
- slice: one projection with a LoRA pair, e.g. `q_proj`. A is stored as [rank, in] rows, B transposed as [rank, out]
  rows, the scale (alpha / rank) folded into B.
- part: slices that share an input and write side by side into one output (`qkv_proj` has three); one kernel call each.
- page: `page_elems` contiguous elements of a layer's KV-cache tensor, in the weights' dtype; no row crosses a page.
- row-offset table: int64 [num_slices, 2, rank]; [s, 0, r] is where row r of A_s begins, [s, 1, r] the same for B_s, in
  elements from the KV tensor's `data_ptr()`. -1 means "this row is zero and not stored"; such rows come last, so a
  slice of a lower rank, or one that the adapter does not touch, needs no memory. As every layer uses the same pages,
  one table serves all layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

ALIGNED_ELEMS = 8  # Sixteen bytes of a two-byte dtype: what a vectorised GPU load needs.


class PageTooSmallError(ValueError):
    """A weight row is longer than a page, so this model's adapters cannot be paged."""


@dataclass(frozen=True, slots=True)
class Part:
    """One linear layer that carries LoRA: `y[:, out_start_s : out_start_s + out_s] += (x @ A_s.T) @ B_s` for each s.

    `first_slice` is the row-table index of its first slice; `slice_widths` are the output widths, side by side in y
    from column 0.
    """

    first_slice: int
    in_features: int
    slice_widths: tuple[int, ...]

    @property
    def num_slices(self) -> int:
        return len(self.slice_widths)

    @property
    def out_features(self) -> int:
        return sum(self.slice_widths)


def layer_parts(shapes: Mapping[str, tuple[int, Sequence[int]]]) -> dict[str, Part]:
    """Number the slices of a layer: {"qkv_proj": (in_features, (q_width, k_width, v_width)), ...} -> parts by name."""
    parts: dict[str, Part] = {}
    first_slice = 0
    for name, (in_features, slice_widths) in shapes.items():
        if in_features < 1 or not slice_widths or min(slice_widths) < 1:
            raise ValueError(f"part {name!r} needs positive widths, got {in_features} -> {tuple(slice_widths)}")
        parts[name] = Part(first_slice, in_features, tuple(slice_widths))
        first_slice += len(slice_widths)
    return parts


def slice_shapes(parts: Sequence[Part]) -> list[tuple[int, int]]:
    """(in_features, out_features) of every slice, in row-table order."""
    return [(part.in_features, width) for part in parts for width in part.slice_widths]


@dataclass(frozen=True, slots=True)
class RowPlan:
    """How an adapter's rows of one layer fill pages. `page` and `start`: int64 [num_slices, 2, rank], -1 = absent."""

    page: np.ndarray
    start: np.ndarray
    num_pages: int
    page_elems: int

    @property
    def rank(self) -> int:
        return int(self.page.shape[2])

    def offsets(self, page_starts: Sequence[int] | np.ndarray) -> np.ndarray:
        """The row-offset table once page i lies at element `page_starts[i]`; int64 [num_slices, 2, rank]."""
        starts = np.asarray(page_starts, dtype=np.int64)
        if starts.shape != (self.num_pages,):
            raise ValueError(f"the adapter needs {self.num_pages} pages, got {starts.shape} page starts")
        if starts.size and starts.min() < 0:
            raise ValueError("page starts must not be negative")
        return np.where(self.page >= 0, starts[self.page] + self.start, -1)

    def pack(self, weights: Sequence[tuple[torch.Tensor, torch.Tensor] | None], pages: torch.Tensor) -> None:
        """Write one layer's weights in page order into `pages`, contiguous [num_pages, page_elems], converting dtypes.

        `weights[s]` is (A [rank_s, in], B transposed [rank_s, out], scale folded in), or None for an absent slice.
        Elements that no row uses keep what they were.
        """
        if pages.shape != (self.num_pages, self.page_elems) or not pages.is_contiguous():
            raise ValueError(f"pages must be contiguous [{self.num_pages}, {self.page_elems}], got {pages.shape}")
        table = self.offsets(np.arange(self.num_pages) * self.page_elems)
        for offsets, pair in zip(table, weights, strict=True):
            for side, rows in enumerate(pair or ()):
                if len(rows) != int((offsets[side] >= 0).sum()):
                    raise ValueError(f"planned for {int((offsets[side] >= 0).sum())} rows, got {len(rows)}")
                for first, view in run_views(offsets[side], rows.shape[1], pages):
                    view.copy_(rows[first : first + len(view)])


def run_views(offsets: np.ndarray, width: int, memory: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """Views [n, width] into `memory`, one for each run of adjacent rows, with the index of its first row.

    `offsets`: int64 [rank], elements from memory's data_ptr(). Absent rows (-1) are left out.
    """
    stored = offsets[: int((offsets >= 0).sum())]
    starts = np.flatnonzero(np.diff(stored, prepend=-width - 1) != width)
    views = []
    for first, end in zip(starts, np.append(starts, len(stored))[1:], strict=True):
        at = memory.storage_offset() + int(stored[first])
        views.append((int(first), memory.as_strided((int(end - first), width), (width, 1), at)))
    return views


def plan_rows(parts: Sequence[Part], slice_ranks: Sequence[int], page_elems: int) -> RowPlan:
    """Pack the rows of an adapter with rank `slice_ranks[s]` (0 = not adapted) in slice s into pages.

    Widest rows first, each kind filling what earlier pages left over before it opens new pages, so that little is
    wasted when widths do not divide the page. Raises PageTooSmallError, and ValueError when every rank is 0.
    """
    shapes = slice_shapes(parts)
    if len(slice_ranks) != len(shapes):
        raise ValueError(f"need one rank for each of {len(shapes)} slices, got {len(slice_ranks)}")
    if min(slice_ranks) < 0 or max(slice_ranks) < 1:
        raise ValueError(f"slice ranks must be >= 0 and not all 0, got {tuple(slice_ranks)}")
    page = np.full((len(shapes), 2, max(slice_ranks)), -1, dtype=np.int64)
    start = np.full_like(page, -1)
    used = np.zeros(0, dtype=np.int64)
    groups = [(width, s, side) for s, widths in enumerate(shapes) for side, width in enumerate(widths)]
    for width, s, side in sorted(groups, key=lambda group: -group[0]):
        if width > page_elems:
            raise PageTooSmallError(
                f"a LoRA row of {width} elements does not fit a page of {page_elems}; "
                "raise the KV-cache block size, or use vLLM's adapter slots for this model"
            )
        used = _place(used, width, page_elems, page[s, side, : slice_ranks[s]], start[s, side, : slice_ranks[s]])
    return RowPlan(page, start, len(used), page_elems)


def _place(used: np.ndarray, width: int, page_elems: int, page: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Place len(page) rows of `width`, writing their page and start; returns the new fill of every page."""
    num_rows = len(page)
    missing = num_rows - int(((page_elems - used) // width).sum())
    new_pages = max(0, -(-missing // (page_elems // width)))
    used = np.concatenate([used, np.zeros(new_pages, dtype=np.int64)])
    room = (page_elems - used) // width
    row_page = np.repeat(np.arange(len(used)), room)[:num_rows]
    taken = np.bincount(row_page, minlength=len(used))
    nth_in_page = np.arange(num_rows) - np.repeat(np.cumsum(taken) - taken, taken)
    page[:] = row_page
    start[:] = used[row_page] + nth_in_page * width
    return used + taken * width


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """A resident adapter as the kernels see it: its row-offset table on the KV cache's device.

    `offsets`: int64 [num_slices, 2, rank], contiguous. `aligned`: every offset is a multiple of 8 elements.
    `end`: one past the last element that any row may touch.
    """

    offsets: torch.Tensor
    aligned: bool
    end: int

    @property
    def rank(self) -> int:
        return self.offsets.shape[2]

    @staticmethod
    def build(plan: RowPlan, page_starts: Sequence[int] | np.ndarray, device: torch.device | str) -> "AdapterRows":
        """The rows of an adapter whose page i lies at element `page_starts[i]` of every layer's KV tensor.

        The table must live until the last step that uses it is done; if it is filled on a side stream, the stream that
        computes has to wait for that first.
        """
        table = plan.offsets(page_starts)
        end = int(np.max(np.asarray(page_starts, dtype=np.int64))) + plan.page_elems
        aligned = bool(np.all(table[table >= 0] % ALIGNED_ELEMS == 0))
        return AdapterRows(torch.from_numpy(table).to(device), aligned, end)
