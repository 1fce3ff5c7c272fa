"""LoRA kernels over paged weights: adapters of any rank, read in place from blocks of a KV cache.

Order of use: `layer_parts` names a layer's slices; `plan_rows` packs an adapter's rows into pages and `RowPlan.pack`
fills them; `AdapterRows.build` is the table once the pages have an address; `LoraBatch.update` describes a step;
`apply_lora(y, x, kv, batch, part)` adds LoRA to one part's output.
"""

from chameleon_kernels.batch import BatchSpec, LoraBatch
from chameleon_kernels.layout import AdapterRows, PageTooSmallError, Part, RowPlan, layer_parts, plan_rows
from chameleon_kernels.ops import apply_lora, cpu_implementation, expand, new_hidden, shrink

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
    "plan_rows",
    "shrink",
]
