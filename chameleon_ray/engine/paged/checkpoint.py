"""An adapter's files for pages: what it takes of them, told from the headers, and its weights in page order."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from chameleon_kernels import RowPlan, layer_parts, plan_rows, write_rows

from chameleon_ray.adapters.checkpoint import AdapterShape, Checkpoint, read_checkpoint
from chameleon_ray.adapters.errors import AdapterError, AdapterInvalidError, AdapterTooLargeError
from chameleon_ray.adapters.modules import ModuleTable
from chameleon_ray.adapters.sources import WEIGHTS_FILE
from chameleon_ray.adapters.validate import check_fits
from chameleon_ray.engine.paged.messages import ModelLayout
from chameleon_ray.engine.weights import FileChangedError, read_weights


class AdapterFilesError(ValueError):
    """What the adapter's files hold cannot be served, now or later; the message says why. code: AdapterError's."""

    def __init__(self, reason: str, code: str = AdapterInvalidError.code) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """rank: its largest. slice_ranks: the largest of each slice over all layers. num_blocks, size_bytes: what its
    weights take of each rank's KV pool and host memory."""

    rank: int
    slice_ranks: tuple[int, ...]
    num_blocks: int
    size_bytes: int


def summarise(folder: Path, layout: ModelLayout, max_rank: int) -> AdapterSummary:
    """Reads the two files' headers only. Raises AdapterFilesError or OSError."""
    return measure(read_fitting(folder, layout.table, max_rank).shape, layout)


def measure(shape: AdapterShape, layout: ModelLayout) -> AdapterSummary:
    """What an adapter of that shape takes, whose modules are all the model's."""
    ranks = [0] * len(slice_shapes(layout))
    for name, rank in shape:
        _, slice_index = layout.targets[layout.table.find(name)]
        ranks[slice_index] = max(ranks[slice_index], rank)
    num_pages = pack_plan(layout, tuple(ranks)).num_pages
    num_blocks = -(-num_pages // layout.pages_per_block)
    size_bytes = num_pages * layout.page_elems * layout.element_bytes * layout.num_layers
    return AdapterSummary(max(ranks), tuple(ranks), num_blocks, size_bytes)


def read_fitting(folder: Path, table: ModuleTable, max_rank: int) -> Checkpoint:
    """The adapter in ``folder``, which fits the model's modules, from its files' headers. Raises AdapterFilesError or
    OSError."""
    checkpoint = _read(folder, table)
    if checkpoint.rank > max_rank:
        reason = f"its rank {checkpoint.rank} is over the bound of {max_rank}"
        raise AdapterFilesError(reason, AdapterTooLargeError.code)
    return checkpoint


@dataclass(frozen=True, slots=True)
class LayerModule:
    """One module of one layer on this rank.

    slices: vLLM's names of its slices, in order; first_slice: the number of the first. shard_a, shard_b: vLLM's
    cutting of A [rank, in] and B [out, rank] for this tensor-parallel rank: a list with one tensor or None per slice.
    """

    layer: int
    first_slice: int
    slices: tuple[str, ...]
    shard_a: Callable[[list[torch.Tensor | None]], list[torch.Tensor | None]]
    shard_b: Callable[[list[torch.Tensor | None]], list[torch.Tensor | None]]


def read_pages(
    folder: Path,
    layout: ModelLayout,
    modules: list[LayerModule],
    slice_ranks: tuple[int, ...],
    pages: torch.Tensor,
    check_finite: bool,
) -> None:
    """Fill ``pages``, zeros [num_layers, num_pages, page_elems], with the weights as the kernels read them.

    check_finite: refuse weights that are not finite in the pages' dtype. Raises AdapterFilesError for these,
    FileChangedError where the files are no longer those that ``summarise`` has read, or OSError; ``pages`` is then not
    to be used.
    """
    plan = pack_plan(layout, slice_ranks)
    table = plan.offsets(np.arange(plan.num_pages) * plan.page_elems)
    shapes = slice_shapes(layout)
    try:
        checkpoint = _read(folder, layout.table)
    except AdapterFilesError as error:
        raise FileChangedError(f"its files have changed since they were inspected: {error}") from None
    pairs = {layout.table.find(name): pair for name, pair in checkpoint.pairs.items()}
    view = read_weights(folder / WEIGHTS_FILE)
    for module in modules:
        found = [pairs.get(name) for name in module.slices]
        if not any(found):
            continue
        a = module.shard_a([view(pair.a) if pair else None for pair in found])
        b = module.shard_b([view(pair.b) if pair else None for pair in found])
        for number, (pair, rows_a, rows_b) in enumerate(zip(found, a, b, strict=True), start=module.first_slice):
            if pair is None or rows_a is None or rows_b is None:
                continue
            if pair.rank > slice_ranks[number] or (rows_a.shape[1], rows_b.shape[0]) != shapes[number]:
                raise FileChangedError(f"{folder} has changed while it was read")
            write_rows(table[number, 0], rows_a, plan.piece_elems, pages[module.layer])
            write_rows(table[number, 1], rows_b.t(), plan.piece_elems, pages[module.layer], pair.scale)
    if check_finite and not all(_is_finite(layer) for layer in pages):
        raise AdapterFilesError(f"its weights are not all finite as {pages.dtype}: train it again, or check the file")


def slice_shapes(layout: ModelLayout) -> list[tuple[int, int]]:
    """(in_features, out_features) of every slice on one rank."""
    return [(in_features, width) for in_features, widths in layout.parts.values() for width in widths]


def pack_plan(layout: ModelLayout, slice_ranks: tuple[int, ...]) -> RowPlan:
    """How an adapter fills pages; adapters of one shape share one plan."""
    parts = tuple((name, in_features, widths) for name, (in_features, widths) in layout.parts.items())
    return _pack_plan(parts, slice_ranks, layout.page_elems)


@lru_cache(maxsize=256)
def _pack_plan(
    parts: tuple[tuple[str, int, tuple[int, ...]], ...], slice_ranks: tuple[int, ...], page_elems: int
) -> RowPlan:
    numbered = layer_parts({name: (in_features, widths) for name, in_features, widths in parts}, page_elems)
    return plan_rows(list(numbered.values()), slice_ranks, page_elems)


def _is_finite(weights: torch.Tensor) -> bool:
    # One pass; only a sum that is not finite, which large finite weights can also have, needs the exact answer.
    return bool(torch.isfinite(weights.sum())) or bool(torch.isfinite(weights).all())


def _read(folder: Path, table: ModuleTable) -> Checkpoint:
    try:
        checkpoint = read_checkpoint(folder)
        check_fits(checkpoint.modules, checkpoint.config.targets, table)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error.filename} is missing") from None
    except AdapterError as error:
        raise AdapterFilesError(str(error), error.code) from None
    return checkpoint
