"""The module table of a loaded model, from the LoRA layers that vLLM has put around its modules. Runs in a worker."""

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.logger import init_logger
from vllm.lora.layers import FusedMoE3DWithLoRA, FusedMoEWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.models.utils import WeightsMapper

from chameleon_ray.adapters.modules import Module, ModuleTable

logger = init_logger(__name__)

_NO_TOWER = (
    "it belongs to the vision or audio part, and only the language model's modules are adapted: train with "
    "target_modules that name those only"
)
_NO_EXPERTS = "adapters of experts cannot live in KV memory: leave experts out, or set engine.adapter_memory: slots"
_NO_FUSED_EXPERTS = (
    "this model's experts are fused, and adapters of parameters (target_parameters) are not served: leave experts out"
)


@dataclass(frozen=True, slots=True)
class EngineNames:
    """From a checkpoint's module name to vLLM's, as vLLM's own adapter loading does it. mapper: the model's renames."""

    mapper: WeightsMapper | None

    @classmethod
    def of(cls, model: Any) -> "EngineNames":
        """Those of a loaded model."""
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        return cls(None if mapper is None else mapper.get_rename_mapper())

    def __call__(self, name: str) -> str:
        return str(parse_fine_tuned_lora_name(f"base_model.model.{name}.lora_A.weight", self.mapper)[0])

    def undo(self, engine_name: str) -> str:
        """The name that the newest checkpoints have for a module; the engine's own where that cannot be told."""
        mapper = self.mapper or WeightsMapper()
        prefixed = [
            old + engine_name.removeprefix(new)
            for old, new in mapper.orig_to_new_prefix.items()
            if new is not None and engine_name.startswith(new)
        ]
        candidates = []
        for name in (*prefixed, engine_name):
            candidates += [
                f"{name}.".replace(new, old, 1).removesuffix(".")
                for old, new in mapper.orig_to_new_substr.items()
                if new and new in f"{name}."
            ]
            candidates.append(name)
        return next((candidate for candidate in candidates if self(candidate) == engine_name), engine_name)


def describe_modules(manager: LoRAModelManager) -> ModuleTable:
    """The modules that ``manager`` has given LoRA layers, in whole sizes, whatever share this rank has of them."""
    names = EngineNames.of(manager.model)
    shapes: dict[str, tuple[int, int]] = {}
    excluded = {
        name: _NO_EXPERTS
        for name, module in manager.model.named_modules()
        if isinstance(module, MoERunner) and name not in manager.modules
    }
    if manager.supports_mm:
        towers = (*manager.mm_mapping.tower_model, *manager.mm_mapping.connector)
        excluded |= {prefix.rstrip("."): _NO_TOWER for prefix in towers}
    for name, layer in manager.modules.items():
        parts = manager.packed_modules.get(name, [name])
        if isinstance(layer, FusedMoE3DWithLoRA):
            excluded[name] = _NO_FUSED_EXPERTS
        elif isinstance(layer, FusedMoEWithLoRA):
            shapes |= zip(parts, _expert_shapes(layer, len(parts)), strict=True)
        elif isinstance(layer, BaseLinearLayerWithLoRA):
            shapes |= zip(parts, _linear_shapes(layer, len(parts)), strict=True)
        # What remains are embeddings and output heads, which adapters cannot change here.
    return ModuleTable({name: Module(names.undo(name), *shape) for name, shape in shapes.items()}, names, excluded)


def module_table(runner: Any) -> ModuleTable:
    """The table of a worker's model runner; one that says why where it cannot be made."""
    try:
        table = describe_modules(runner.lora_manager._adapter_manager)
        pickle.dumps(table)  # It goes to other processes.
        return table
    except Exception as error:  # An engine that serves its base model must start, whatever the model is made of.
        logger.exception("No adapter can be loaded: the model's modules are not understood")
        return ModuleTable(problem=f"{type(error).__name__}: {error}")


def dump_modules(runner: Any) -> bytes:
    """``module_table``, pickled, as vLLM passes on plain values only."""
    return pickle.dumps(module_table(runner))


def merge_tables(dumped: Sequence[bytes]) -> ModuleTable:
    """One table from all workers' ``dump_modules``: the stages of a pipeline have different layers."""
    tables: list[ModuleTable] = [pickle.loads(table) for table in dumped]
    for table in tables:
        if table.problem:
            return table
    modules = {name: module for table in tables for name, module in table.modules.items()}
    excluded = {name: reason for table in tables for name, reason in table.excluded.items()}
    return ModuleTable(modules, tables[0].rename, excluded)


def _linear_shapes(layer: BaseLinearLayerWithLoRA, num_parts: int) -> Iterator[tuple[int, int]]:
    """(out_features, in_features) of each part of a fused layer; parts lie side by side in its output."""
    base = layer.base_layer
    if isinstance(base, QKVParallelLinear):  # Its own sizes count replicated KV heads.
        key_size = base.total_num_kv_heads * base.head_size
        sizes = [base.total_num_heads * base.head_size, key_size, base.total_num_kv_heads * base.v_head_size]
    else:
        sizes = list(getattr(base, "output_sizes", None) or [base.output_size])
    # Where there are fewer parts than sizes the first covers several, as in expand_packed_lora of vLLM's layers.
    first = len(sizes) - num_parts + 1
    if first < 1:
        raise ValueError(f"{type(base).__name__} has {len(sizes)} outputs for {num_parts} projections")
    for size in (sum(sizes[:first]), *sizes[first:]):
        yield size, base.input_size


def _expert_shapes(layer: FusedMoEWithLoRA, num_parts: int) -> Iterator[tuple[int, int]]:
    """The same for experts, in vLLM's order: gate (or the only one), down, up of the first expert, and so on."""
    config = layer.moe_config
    hidden = config.hidden_dim_unpadded
    intermediate = config.intermediate_size_per_partition_unpadded * config.moe_parallel_config.tp_size
    per_expert = 3 if config.is_act_and_mul else 2
    for index in range(num_parts):
        yield (hidden, intermediate) if index % per_expert == 1 else (intermediate, hidden)
