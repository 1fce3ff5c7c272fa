"""An adapter's files: what they hold, told from their headers, and their weights in page order."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from chameleon_kernels import RowPlan, layer_parts, plan_rows
from safetensors import SafetensorError, safe_open
from vllm.lora.utils import parse_fine_tuned_lora_name

from chameleon_ray.engine.paged.messages import ModelLayout

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


class AdapterFilesError(ValueError):
    """The adapter's files cannot be served; the message says why."""


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
    _scale(_read_config(folder))
    ranks = [0] * len(slice_names(layout))
    with _open(folder) as weights:
        for name in weights.keys():  # noqa: SIM118 (safe_open is no mapping)
            (_, slice_index), is_a = _target(name, layout)
            shape = weights.get_slice(name).get_shape()
            ranks[slice_index] = max(ranks[slice_index], shape[0 if is_a else 1])
    if max(ranks) > max_rank:
        raise AdapterFilesError(f"its rank {max(ranks)} is over the bound of {max_rank}")
    if not any(ranks):
        raise AdapterFilesError(f"{WEIGHTS_FILE} holds no LoRA weights")
    num_pages = pack_plan(layout, tuple(ranks)).rows.num_pages
    num_blocks = -(-num_pages // layout.pages_per_block)
    size_bytes = num_pages * layout.page_elems * layout.element_bytes * layout.num_layers
    return AdapterSummary(max(ranks), tuple(ranks), num_blocks, size_bytes)


@dataclass(frozen=True, slots=True)
class LayerModule:
    """One module of one layer on this rank.

    slices: checkpoint names of its slices, in order; first_slice: the number of the first. shard_a, shard_b: vLLM's
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
    """Fill ``pages`` [num_layers, num_pages, page_elems] with the adapter's weights as the kernels read them.

    Raises AdapterFilesError or OSError; ``pages`` is then not to be used.
    """
    plan = pack_plan(layout, slice_ranks)
    shapes = slice_shapes(layout)
    scale = _scale(_read_config(folder))
    pages.zero_()
    with _open(folder) as weights:
        names: dict[tuple[str, bool], str] = {}
        for name in weights.keys():  # noqa: SIM118
            module_name, is_a = _parse(name, layout)
            names[module_name, is_a] = name
        for module in modules:
            a = _tensors(weights, names, module.slices, True)
            b = _tensors(weights, names, module.slices, False)
            if all(tensor is None for tensor in a):
                continue
            flat = pages[module.layer].view(-1)
            for index, (rows_a, rows_b) in enumerate(zip(module.shard_a(a), module.shard_b(b), strict=True)):
                if rows_a is None or rows_b is None:
                    continue
                number = module.first_slice + index
                wanted = (rows_a.shape[0], *shapes[number])
                if (rows_b.shape[1], rows_a.shape[1], rows_b.shape[0]) != wanted or wanted[0] > slice_ranks[number]:
                    raise AdapterFilesError(
                        f"{module.slices[index]}: A {tuple(rows_a.shape)} and B {tuple(rows_b.shape)} do not fit "
                        f"[rank, {shapes[number][0]}] and [{shapes[number][1]}, rank]"
                    )
                _place(flat, rows_a, plan.runs[number][0])
                _place(flat, rows_b.to(torch.float32).mul(scale).t(), plan.runs[number][1])
    if check_finite and not all(bool(torch.isfinite(layer).all()) for layer in pages):
        raise AdapterFilesError("its weights are not all finite: train it again, or check the file")


def slice_names(layout: ModelLayout) -> list[str]:
    """Part names, one per slice."""
    return [name for name, (_, widths) in layout.parts.items() for _ in widths]


def slice_shapes(layout: ModelLayout) -> list[tuple[int, int]]:
    """(in_features, out_features) of every slice on one rank."""
    return [(in_features, width) for in_features, widths in layout.parts.values() for width in widths]


Runs = list[tuple[int, int, int]]
"""(first row, number of rows, start in the flattened pages) of rows that lie next to each other."""


@dataclass(frozen=True, slots=True)
class PackPlan:
    """How adapters with the same rank in every slice fill pages. runs: by slice, for A and for B."""

    rows: RowPlan
    runs: tuple[tuple[Runs, Runs], ...]


def pack_plan(layout: ModelLayout, slice_ranks: tuple[int, ...]) -> PackPlan:
    """The plan for an adapter; adapters of one shape share one."""
    parts = tuple((name, in_features, widths) for name, (in_features, widths) in layout.parts.items())
    return _pack_plan(parts, slice_ranks, layout.page_elems)


@lru_cache(maxsize=256)
def _pack_plan(
    parts: tuple[tuple[str, int, tuple[int, ...]], ...], slice_ranks: tuple[int, ...], page_elems: int
) -> PackPlan:
    numbered = list(layer_parts({name: (in_features, widths) for name, in_features, widths in parts}).values())
    rows = plan_rows(numbered, slice_ranks, page_elems)
    offsets = np.where(rows.page >= 0, rows.page * page_elems + rows.start, -1)
    shapes = [(in_features, width) for _, in_features, widths in parts for width in widths]
    runs = tuple(
        (_find_runs(offsets[number, 0], in_features), _find_runs(offsets[number, 1], out_features))
        for number, (in_features, out_features) in enumerate(shapes)
    )
    return PackPlan(rows, runs)


def _find_runs(offsets: npt.NDArray[np.int64], width: int) -> Runs:
    runs: Runs = []
    for row, offset in enumerate(offsets.tolist()):
        if offset < 0:
            break
        if runs and offset == runs[-1][2] + runs[-1][1] * width:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, runs[-1][2])
        else:
            runs.append((row, 1, offset))
    return runs


def _place(flat: torch.Tensor, rows: torch.Tensor, runs: Runs) -> None:
    num_rows, width = rows.shape
    for first, count, start in runs:
        if first >= num_rows:
            return
        count = min(count, num_rows - first)
        flat[start : start + count * width].view(count, width).copy_(rows[first : first + count])


def _tensors(
    weights: Any, names: Mapping[tuple[str, bool], str], slices: tuple[str, ...], is_a: bool
) -> list[torch.Tensor | None]:
    return [
        weights.get_tensor(names[name, is_a]) if (name, True) in names and (name, False) in names else None
        for name in slices
    ]


def _parse(name: str, layout: ModelLayout) -> tuple[str, bool]:
    try:
        module, is_a = parse_fine_tuned_lora_name(name, layout.renames)
    except ValueError as error:
        raise AdapterFilesError(f"{WEIGHTS_FILE}: {error}") from None
    return module, is_a


def _target(name: str, layout: ModelLayout) -> tuple[tuple[int, int], bool]:
    module, is_a = _parse(name, layout)
    target = layout.targets.get(module)
    if target is None:
        raise AdapterFilesError(
            f"it changes {module}, which adapters in KV memory cannot (no such layer in this model, an embedding, the "
            "output head or an expert): leave it out, or use vLLM's slots (engine.adapter_memory: slots)"
        )
    return target, is_a


def _open(folder: Path) -> Any:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise AdapterFilesError(f"{path} is missing")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise AdapterFilesError(f"{path} cannot be read: {error}") from None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise AdapterFilesError(f"{path} is missing") from None
    except ValueError as error:
        raise AdapterFilesError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise AdapterFilesError(f"{path} is not a PEFT configuration")
    return config


def _scale(config: Mapping[str, Any]) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA. Raises AdapterFilesError for what is no plain LoRA."""
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise AdapterFilesError(f"{CONFIG_FILE} needs r and lora_alpha, has {rank!r} and {alpha!r}")
    for option in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias"):
        if config.get(option):
            raise AdapterFilesError(f"{CONFIG_FILE}: {option} is not supported")
    if config.get("bias", "none") != "none":
        raise AdapterFilesError(f"{CONFIG_FILE}: bias is not supported")
    return float(alpha / math.sqrt(rank)) if config.get("use_rslora") else float(alpha / rank)
