"""Adapters into vLLM's slots, each module at its own rank and scale.

vLLM 0.30's own reader gives all modules the rank and the scale of ``r`` and ``lora_alpha``, whatever patterns stand
beside them, and does not know the names of a saved model state.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

from chameleon_ray.adapters.checkpoint import AdapterShape, read_checkpoint
from chameleon_ray.adapters.sources import WEIGHTS_FILE
from chameleon_ray.engine.modules import EngineNames
from chameleon_ray.engine.weights import read_weights

_EXPERTS = "experts."


class ScaledLoRAModel(LoRAModel):
    """vLLM's adapter, read by the rules that all adapters are checked by."""

    @classmethod
    def from_local_checkpoint(
        cls, lora_dir: str, expected_lora_modules: set[str], peft_helper: PEFTHelper, **options: Any
    ) -> "ScaledLoRAModel":
        """In the place of vLLM's. Raises AdapterInvalidError, ValueError or OSError."""
        folder = Path(lora_dir)
        checkpoint = read_checkpoint(folder)
        check_experts(checkpoint.shape, {name for name in expected_lora_modules if name.startswith(_EXPERTS)})
        view = read_weights(folder / WEIGHTS_FILE)
        tensors = {}
        for name, pair in checkpoint.pairs.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = view(pair.a)
            tensors[f"base_model.model.{name}.lora_B.weight"] = view(pair.b)
        kept = ("device", "dtype", "model_vocab_size", "weights_mapper", "skip_prefixes")
        model = cls.from_lora_tensors(
            options["lora_model_id"], tensors, peft_helper, **{name: options[name] for name in kept}
        )
        names = EngineNames(options["weights_mapper"])
        for name, pair in checkpoint.pairs.items():
            weights = model.loras[names(name)]
            weights.rank, weights.scaling = pair.rank, pair.scale
            weights.optimize()  # Folds the scale into B, so that whoever packs layers finds nothing left to scale.
        return model


def expected_experts(supported: Iterable[str], packed: Mapping[str, Sequence[str]]) -> frozenset[str]:
    """vLLM's names of a layer's expert projections, from its lists of modules that take LoRA and of packed ones."""
    names = (part for name in supported for part in packed.get(name, (name,)))
    return frozenset(name for name in names if name.startswith(_EXPERTS))


def check_experts(shape: AdapterShape, expected: Set[str]) -> None:
    """vLLM stacks the adapters of all experts of a layer: none may be missing or of another rank. Raises ValueError."""
    layers: dict[str, set[str]] = {}
    ranks = set()
    for name, rank in shape:
        layer, found, expert = name.partition(f".{_EXPERTS}")
        if found:
            layers.setdefault(layer, set()).add(_EXPERTS + expert)
            ranks.add(rank)
    for layer, experts in layers.items():
        if missing := sorted(expected - experts):
            raise ValueError(f"{layer}.{missing[0]} has no weights: vLLM needs all experts of a layer, or none")
    if len(ranks) > 1:
        raise ValueError(f"its experts have the ranks {sorted(ranks)}, and vLLM needs one rank for all experts")
