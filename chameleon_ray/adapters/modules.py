"""Which modules of the base model take LoRA, as the engine that has loaded it says.

Names are of two kinds: a checkpoint's (Hugging Face's, what PEFT writes) and the engine's. Fused layers (qkv_proj,
gate_up_proj) are listed by the projections that checkpoints hold.
"""

import difflib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from chameleon_ray.adapters.errors import AdapterInvalidError, AdapterModulesUnknownError
from chameleon_ray.adapters.safetensors_header import read_header


@dataclass(frozen=True, slots=True)
class Module:
    """A linear module, whole, not one tensor-parallel rank's share of it. name: in checkpoints."""

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True)
class ModuleTable:
    """modules: engine's name -> module. rename: a checkpoint's module name -> the engine's; it may return any name.

    excluded: engine's name, or the beginning of one up to a dot -> why adapters cannot change what it names.
    problem: why the engine cannot say which modules take LoRA; "" when it can.
    """

    modules: Mapping[str, Module] = field(default_factory=dict)
    rename: Callable[[str], str] = str
    excluded: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""

    def find(self, name: str) -> str:
        """The engine's name of a checkpoint's module. Raises AdapterInvalidError, which names the nearest module, and
        AdapterModulesUnknownError where there is no table."""
        if self.problem:
            raise AdapterModulesUnknownError(
                f"adapters cannot be loaded: which modules of the base model take LoRA is not known ({self.problem})"
            )
        engine_name = self.rename(name)
        if engine_name in self.modules:
            return engine_name
        raise AdapterInvalidError(f"{name!r} {self._explain(engine_name)}")

    @property
    def mark(self) -> str:
        """Changes with the modules and their shapes."""
        listed = sorted((engine_name, *_fields(module)) for engine_name, module in self.modules.items())
        return hashlib.sha256(repr(listed).encode()).hexdigest()[:16]

    def _explain(self, engine_name: str) -> str:
        parts = engine_name.split(".")
        for length in range(len(parts), 0, -1):
            if reason := self.excluded.get(".".join(parts[:length])):
                return f"takes no adapter here: {reason}"
        # difflib takes milliseconds per hundred names: look only at those that end alike, if there are any.
        alike = [name for name in self.modules if name.rsplit(".", 1)[-1] == parts[-1]] or list(self.modules)
        nearest = difflib.get_close_matches(engine_name, alike, n=1, cutoff=0.0)
        hint = f"; the nearest that there is: {self.modules[nearest[0]].name!r}" if nearest else ""
        return f"is no module of the base model that takes LoRA{hint}. Was the adapter made for another base model?"


def table_of_weights(folder: Path) -> ModuleTable:
    """Without an engine: every matrix of a model's weights, as what adapters may change."""
    tensors = {name: entry for path in folder.glob("*.safetensors") for name, entry in read_header(path).items()}
    shapes = {name.removesuffix(".weight"): entry.shape for name, entry in tensors.items() if len(entry.shape) == 2}
    return ModuleTable({name: Module(name, *shape) for name, shape in shapes.items()})


def _fields(module: Module) -> tuple[str, int, int]:
    return module.name, module.out_features, module.in_features
