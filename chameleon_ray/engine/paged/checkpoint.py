"""An adapter's files: what they hold, told from their headers, and their weights in page order."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from chameleon_kernels import RowPlan, layer_parts, plan_rows
from chameleon_kernels.layout import Run
from vllm.lora.utils import parse_fine_tuned_lora_name

from chameleon_ray.adapters.safetensors_header import HeaderError, TensorEntry, read_header
from chameleon_ray.engine.paged.messages import ModelLayout

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
    for name, entry in _read_header(folder / WEIGHTS_FILE).items():
        (_, slice_index), is_a = _target(name, layout)
        if len(entry.shape) != 2:
            raise AdapterFilesError(f"{name} has the shape {entry.shape}, not that of a matrix")
        ranks[slice_index] = max(ranks[slice_index], entry.shape[0 if is_a else 1])
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
    """Fill ``pages``, zeros [num_layers, num_pages, page_elems], with the weights as the kernels read them.

    Raises AdapterFilesError or OSError; ``pages`` is then not to be used.
    """
    plan = pack_plan(layout, slice_ranks)
    shapes = slice_shapes(layout)
    scale = _scale(_read_config(folder))
    tensors = {_parse(name, layout): tensor for name, tensor in _read_weights(folder).items()}
    for module in modules:
        a = [tensors.get((name, True)) for name in module.slices]
        b = [tensors.get((name, False)) for name in module.slices]
        if all(tensor is None for tensor in a + b):
            continue
        flat = pages[module.layer].view(-1)
        for index, (rows_a, rows_b) in enumerate(zip(module.shard_a(a), module.shard_b(b), strict=True)):
            if rows_a is None and rows_b is None:
                continue
            number = module.first_slice + index
            _check_pair(module.slices[index], rows_a, rows_b, shapes[number], slice_ranks[number])
            _place(flat, rows_a, plan.runs[number][0], 1.0)
            _place(flat, rows_b.t(), plan.runs[number][1], scale)
    if check_finite and not all(_is_finite(layer) for layer in pages):
        raise AdapterFilesError("its weights are not all finite: train it again, or check the file")


def _check_pair(
    name: str, a: torch.Tensor | None, b: torch.Tensor | None, shape: tuple[int, int], max_rank: int
) -> None:
    if a is None or b is None:
        raise AdapterFilesError(f"{name} has only one of lora_A and lora_B")
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or (a.shape[1], b.shape[0]) != shape:
        raise AdapterFilesError(
            f"{name}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit [rank, {shape[0]}] and [{shape[1]}, rank]"
        )
    if a.shape[0] > max_rank:
        raise AdapterFilesError(f"{name} has changed while it was read")


def _is_finite(weights: torch.Tensor) -> bool:
    # One pass; only a sum that is not finite, which large finite weights can also have, needs the exact answer.
    return bool(torch.isfinite(weights.sum())) or bool(torch.isfinite(weights).all())


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the file, as views into one buffer: read, not mapped, as a file that shrinks meanwhile must not
    end the process."""
    path = folder / WEIGHTS_FILE
    header = _read_header(path)
    buffer = bytearray(path.stat().st_size)
    with path.open("rb", buffering=0) as file:
        if file.readinto(buffer) != len(buffer) or any(entry.end > len(buffer) for entry in header.values()):
            raise AdapterFilesError(f"{path} has changed while it was read")
    return {
        name: torch.frombuffer(
            buffer, dtype=_DTYPES[entry.dtype], count=math.prod(entry.shape), offset=entry.start
        ).view(entry.shape)
        for name, entry in header.items()
    }


def slice_names(layout: ModelLayout) -> list[str]:
    """Part names, one per slice."""
    return [name for name, (_, widths) in layout.parts.items() for _ in widths]


def slice_shapes(layout: ModelLayout) -> list[tuple[int, int]]:
    """(in_features, out_features) of every slice on one rank."""
    return [(in_features, width) for in_features, widths in layout.parts.values() for width in widths]


@dataclass(frozen=True, slots=True)
class PackPlan:
    """How adapters with the same rank in every slice fill pages. runs: by slice, for A and for B; their starts count
    in the flattened pages."""

    rows: RowPlan
    runs: tuple[tuple[tuple[Run, ...], tuple[Run, ...]], ...]


def pack_plan(layout: ModelLayout, slice_ranks: tuple[int, ...]) -> PackPlan:
    """The plan for an adapter; adapters of one shape share one."""
    parts = tuple((name, in_features, widths) for name, (in_features, widths) in layout.parts.items())
    return _pack_plan(parts, slice_ranks, layout.page_elems)


@lru_cache(maxsize=256)
def _pack_plan(
    parts: tuple[tuple[str, int, tuple[int, ...]], ...], slice_ranks: tuple[int, ...], page_elems: int
) -> PackPlan:
    numbered = layer_parts({name: (in_features, widths) for name, in_features, widths in parts}, page_elems)
    rows = plan_rows(list(numbered.values()), slice_ranks, page_elems)
    shapes = [(in_features, width) for _, in_features, widths in parts for width in widths]
    runs = tuple(
        (tuple(rows.runs(number, 0, in_features)), tuple(rows.runs(number, 1, out_features)))
        for number, (in_features, out_features) in enumerate(shapes)
    )
    return PackPlan(rows, runs)


def _place(flat: torch.Tensor, rows: torch.Tensor, runs: tuple[Run, ...], scale: float) -> None:
    """Write rows, [rank, width]; where the slice has a higher rank in other layers, the rows above stay zeros."""
    for run in runs:
        count = min(run.num_rows, len(rows) - run.first_row)
        if count > 0:
            source = rows[run.first_row : run.first_row + count, run.first_column : run.first_column + run.num_columns]
            target = flat.as_strided((count, run.num_columns), (run.stride, 1), flat.storage_offset() + run.start)
            torch.mul(source, scale, out=target)


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


def _read_header(path: Path) -> dict[str, TensorEntry]:
    try:
        header = read_header(path)
    except FileNotFoundError:
        raise AdapterFilesError(f"{path} is missing") from None
    except HeaderError as error:
        raise AdapterFilesError(f"{path} cannot be read: {error}") from None
    for name, entry in header.items():
        if entry.dtype not in _DTYPES:
            raise AdapterFilesError(f"{path}: {name} is {entry.dtype}, not one of {', '.join(_DTYPES)}")
    return header


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
