"""Is this folder an adapter that the engine can serve on its base model? Answered without torch.

``read_info`` answers what the files alone can tell, ``check_fits`` the rest, once the engine has said which modules
there are. vLLM's own loader (vllm/lora/peft_helper.py, lora_model.py) is far more trusting: it ignores modules that the
base model does not have, variants of LoRA that it does not compute, ranks and scales that differ, and NaN.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt

from chameleon_ray.adapters.checkpoint import AdapterShape, Checkpoint, LoraPair, read_checkpoint
from chameleon_ray.adapters.errors import AdapterInvalidError, AdapterTooLargeError
from chameleon_ray.adapters.modules import ModuleTable
from chameleon_ray.adapters.safetensors_header import TensorEntry
from chameleon_ray.adapters.sources import WEIGHTS_FILE

_BITS = {"F32": (np.uint32, 0x7FFFFFFF, 0x7F800000), "F16": (np.uint16, 0x7FFF, 0x7C00)}
_BITS |= {"BF16": (np.uint16, 0x7FFF, 0x7F80)}
"""dtype -> how to look at it as integers, the mask of all but the sign, and infinity: what is larger is a NaN."""
_CHUNK_BYTES = 4 << 20
_HUB_CACHE = re.compile(r"models--([^/]+)/snapshots/")


@dataclass(frozen=True, slots=True)
class Rules:
    """What is accepted: ``adapters.max_rank``, ``max_adapter_mib`` in bytes, ``check_finite``, and whether adapters
    that change nothing are refused (``check_effect``)."""

    max_rank: int
    max_bytes: int
    check_finite: bool = True
    check_effect: bool = True


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What the files tell.

    rank: the largest. size_bytes: of the weights file. base_model: the one that its PEFT configuration names.
    modules: (name in checkpoints, out_features, in_features), sorted. targets: see ``LoraConfig``.
    """

    rank: int
    size_bytes: int
    base_model: str
    warnings: tuple[str, ...]
    modules: tuple[tuple[str, int, int], ...]
    shape: AdapterShape
    targets: tuple[str, ...]


def validate_adapter(folder: Path, table: ModuleTable, rules: Rules) -> AdapterInfo:
    """``read_info`` and ``check_fits`` in one."""
    info = read_info(folder, rules)
    check_fits(info.modules, info.targets, table)
    return info


def read_info(folder: Path, rules: Rules) -> AdapterInfo:
    """Checks the two files in ``folder`` by themselves. Reads all weights with ``check_finite``, a few for the effect
    alone, else only headers.

    Raises AdapterInvalidError or AdapterTooLargeError. The files must not change meanwhile (a private copy).
    """
    path = folder / WEIGHTS_FILE
    size_bytes = path.stat().st_size
    if size_bytes > rules.max_bytes:
        raise AdapterTooLargeError(
            f"{WEIGHTS_FILE} has {size_bytes} bytes, over adapters.max_adapter_mib ({rules.max_bytes} bytes)"
        )
    checkpoint = read_checkpoint(folder)
    if checkpoint.rank > rules.max_rank:
        raise AdapterTooLargeError(f"its rank {checkpoint.rank} is over the bound adapters.max_rank = {rules.max_rank}")
    if rules.check_finite or rules.check_effect:
        _check_weights(path, checkpoint, rules)
    return AdapterInfo(
        rank=checkpoint.rank,
        size_bytes=size_bytes,
        base_model=checkpoint.config.base_model,
        warnings=checkpoint.config.warnings,
        modules=checkpoint.modules,
        shape=checkpoint.shape,
        targets=checkpoint.config.targets,
    )


def check_fits(modules: Sequence[tuple[str, int, int]], targets: tuple[str, ...], table: ModuleTable) -> None:
    """Raises AdapterInvalidError unless each of an adapter's modules is one of the table's, of the same shape, and none
    of the targets is missing. modules, targets: see ``AdapterInfo``."""
    found: dict[str, str] = {}
    for name, out_features, in_features in modules:
        engine_name = table.find(name)
        if engine_name in found:
            _bad(f"{WEIGHTS_FILE}: {found[engine_name]!r} and {name!r} are the same module")
        found[engine_name] = name
        module = table.modules[engine_name]
        if (out_features, in_features) != (module.out_features, module.in_features):
            _bad(
                f"{name!r} of the adapter is for {in_features} inputs and {out_features} outputs, the base model's has "
                f"{module.in_features} and {module.out_features}: was the adapter made for another base model?"
            )
    suffixes = tuple(f".{target}" for target in targets)
    for engine_name, module in table.modules.items():
        # Fused experts have no modules that PEFT could have adapted, though the files name their weights so.
        if f".{module.name}".endswith(suffixes) and engine_name not in found and ".experts." not in engine_name:
            _bad(
                f"{WEIGHTS_FILE}: target module {module.name!r} has no weights: the adapter is incomplete, save it "
                "again"
            )


def foreign_base_warning(base_model: str, served: tuple[str, ...]) -> str | None:
    """A warning when an adapter names a base model that is none of the ``served`` names, folders or hub ids; only their
    last parts are compared, and the name in a hub cache's path."""
    if not base_model or _last_part(base_model) in {_last_part(name) for name in served}:
        return None
    return f"it names the base model {base_model!r}, this is {served[0]!r}: its shapes fit, but was it trained on it?"


def _last_part(name: str) -> str:
    cached = _HUB_CACHE.search(name)
    return (cached.group(1).rsplit("--", 1)[-1] if cached else name.rstrip("/").rsplit("/", 1)[-1]).lower()


def _bad(message: str) -> NoReturn:
    raise AdapterInvalidError(message)


def _check_weights(path: Path, checkpoint: Checkpoint, rules: Rules) -> None:
    """One pass for both checks; without ``check_finite`` it ends with the first module that has an effect."""
    buffer = bytearray(_CHUNK_BYTES)
    has_effect = False
    with open(path, "rb", buffering=0) as file:
        for name, pair in checkpoint.pairs.items():
            nonzero = [_scan(file, name, entry, buffer, rules.check_finite) for entry in (pair.a, pair.b)]
            has_effect = has_effect or (all(nonzero) and pair.scale != 0)
            if has_effect and not rules.check_finite:
                return
    if rules.check_effect and not has_effect:
        _bad(
            f"{WEIGHTS_FILE}: it changes nothing ({_explain_nothing(checkpoint.pairs.values())}): its answers would be "
            "the base model's. Save it after training, or set adapters.check_effect: off"
        )


def _explain_nothing(pairs: Iterable[LoraPair]) -> str:
    return "lora_alpha is 0" if all(pair.scale == 0 for pair in pairs) else "lora_A or lora_B is zero in every module"


def _scan(file: BinaryIO, name: str, entry: TensorEntry, buffer: bytearray, whole: bool) -> bool:
    """Whether any weight is not zero; ends there unless ``whole``. Raises AdapterInvalidError for one not finite."""
    mask, infinity = _BITS[entry.dtype][1:]
    nonzero = False
    for values in _chunks(file, entry, buffer):
        largest = int((values & mask).max())
        if largest >= infinity and whole:
            _bad(f"{WEIGHTS_FILE}: {name!r} holds NaN or infinite weights: the training diverged, train again")
        nonzero = nonzero or largest > 0
        if nonzero and not whole:
            break
    return nonzero


def _chunks(file: BinaryIO, entry: TensorEntry, buffer: bytearray) -> Iterator[npt.NDArray[Any]]:
    integer = np.dtype(_BITS[entry.dtype][0])
    start = entry.start
    while start < entry.end:
        file.seek(start)
        count = file.readinto(memoryview(buffer)[: min(entry.end - start, _CHUNK_BYTES)])  # type: ignore[attr-defined]
        count -= count % integer.itemsize
        if not count:
            _bad(f"{WEIGHTS_FILE} is truncated")
        yield np.frombuffer(buffer, integer, count // integer.itemsize)
        start += count
