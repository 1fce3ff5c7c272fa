"""LoRA kernels over paged weights: adapters of any rank, read in place from blocks of a KV cache.

Order of use: `layer_parts` names a layer's slices and cuts rows into pieces; `plan_rows` packs an adapter's rows into
pages and `pack` fills them; `AdapterRows.build` is the table once the pages have an address; `LoraBatch.update`
describes a step; `apply_lora(y, x, kv, batch, part)` adds LoRA to one part's output.

What only plans (`layer_parts`, `plan_rows`) needs no torch, and importing it loads none.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chameleon_kernels.batch import BatchSpec, LoraBatch
    from chameleon_kernels.layout import PageTooSmallError, Part, RowPlan, layer_parts, plan_rows
    from chameleon_kernels.ops import apply_lora, cpu_implementation, expand, new_hidden, shrink
    from chameleon_kernels.rows import AdapterRows, pack, write_rows

__all__ = [
    "AdapterRows",
    "BatchSpec",
    "LoraBatch",
    "PageTooSmallError",
    "Part",
    "RowPlan",
    "apply_lora",
    "cpu_implementation",
    "expand",
    "layer_parts",
    "new_hidden",
    "pack",
    "plan_rows",
    "shrink",
    "write_rows",
]

_MODULES = {
    "batch": ("BatchSpec", "LoraBatch"),
    "layout": ("PageTooSmallError", "Part", "RowPlan", "layer_parts", "plan_rows"),
    "ops": ("apply_lora", "cpu_implementation", "expand", "new_hidden", "shrink"),
    "rows": ("AdapterRows", "pack", "write_rows"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
