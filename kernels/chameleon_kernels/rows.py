"""Adapters in memory: weights packed into pages, rows seen where they lie, the table that the kernels read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from chameleon_kernels.layout import Part, RowPlan, runs


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """A resident adapter as the kernels see it: its row-offset table on the KV cache's device.

    `offsets`: int64 [num_slices, 2, num_pieces, rank], contiguous. `end`: one past the last element of a KV tensor that
    any row may touch.
    """

    offsets: torch.Tensor
    end: int

    @property
    def rank(self) -> int:
        return self.offsets.shape[3]

    @staticmethod
    def build(plan: RowPlan, page_starts: Sequence[int] | np.ndarray, device: torch.device | str) -> "AdapterRows":
        """The rows of an adapter whose page i lies at element `page_starts[i]` of every layer's KV tensor.

        The table must live until the last step that uses it is done. Waits for the device, if it is not the host.
        """
        return AdapterRows(torch.from_numpy(plan.offsets(page_starts)).to(device), end_of(plan, page_starts))


def end_of(plan: RowPlan, page_starts: Sequence[int] | np.ndarray) -> int:
    """One past the last element that these pages cover."""
    return int(np.max(np.asarray(page_starts, dtype=np.int64))) + plan.page_elems


def pack(
    plan: RowPlan,
    parts: Sequence[Part],
    weights: Sequence[tuple[torch.Tensor, torch.Tensor] | None],
    pages: torch.Tensor,
) -> None:
    """Write one layer's weights in page order into `pages`, contiguous [num_pages, page_elems], converting dtypes.

    `weights[s]` is (A [rank_s, in], B transposed [rank_s, out], scale folded in), or None for an absent slice.
    Elements that no row uses keep what they were.
    """
    if pages.shape != (plan.num_pages, plan.page_elems) or not pages.is_contiguous():
        raise ValueError(f"pages must be contiguous [{plan.num_pages}, {plan.page_elems}], got {pages.shape}")
    table = plan.offsets(np.arange(plan.num_pages) * plan.page_elems)
    for offsets, pair in zip(table, weights, strict=True):
        for side, rows in enumerate(pair or ()):
            planned = int((offsets[side, 0] >= 0).sum())
            if len(rows) != planned:
                raise ValueError(f"planned for {planned} rows, got {len(rows)}")
            write_rows(offsets[side], rows, parts[0].piece_elems, pages)


def write_rows(
    offsets: np.ndarray, rows: torch.Tensor, piece_elems: int, memory: torch.Tensor, scale: float = 1.0
) -> None:
    """Write `scale * rows`, rounded once, where the first rows of a slice's A or B lie; `offsets` as in `run_views`.

    `rows`: [n, width] of any float dtype, n at most the rows planned; the others keep what they were.
    """
    rows = rows.to(torch.promote_types(rows.dtype, memory.dtype))
    for row, column, view in run_views(offsets[:, : len(rows)], rows.shape[1], piece_elems, memory):
        torch.mul(rows[row : row + len(view), column : column + view.shape[1]], scale, out=view)


def run_views(
    offsets: np.ndarray, width: int, piece_elems: int, memory: torch.Tensor
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Views [rows, columns] into `memory`, one per run, with the first row and the first column they hold.

    `offsets`: int64 [num_pieces, rank], elements from memory's data_ptr(). Absent rows (-1) are left out.
    """
    for run in runs(offsets, width, piece_elems):
        at = memory.storage_offset() + run.start
        view = memory.as_strided((run.num_rows, run.num_columns), (run.stride, 1), at)
        yield run.first_row, run.first_column, view
