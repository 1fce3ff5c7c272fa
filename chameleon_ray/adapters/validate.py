"""Is this folder an adapter that vLLM can serve on this base model? Answered without torch and without loading weights.

What passes here also loads in vLLM 0.30 (vllm/lora/peft_helper.py, lora_model.py), which is stricter in some places and
far more trusting in others: it ignores modules that the base model does not have, variants of LoRA that it does not
compute, and NaN.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from chameleon_ray.adapters.base_model import BaseModelShapes
from chameleon_ray.adapters.errors import AdapterInvalidError, AdapterTooLargeError
from chameleon_ray.adapters.safetensors_header import HeaderError, TensorEntry, read_header
from chameleon_ray.adapters.sources import CONFIG_FILE, MAX_CONFIG_BYTES, WEIGHTS_FILE

_UNSUPPORTED = {  # options of PEFT's LoraConfig that change what the adapter computes -> what to do instead
    "use_dora": "train without DoRA",
    "use_qalora": "train without QALoRA",
    "use_bdlora": "train without BD-LoRA",
    "kasa_config": "train without KaSA",
    "monteclora_config": "train without MonteCLoRA",
    "arrow_config": "train without Arrow routing",
    "alora_invocation_tokens": "train a plain LoRA instead of an activated one",
    "lora_bias": "train with lora_bias=False",
    "modules_to_save": "train without fully trained modules",
    "trainable_token_indices": "train without trainable tokens",
    "target_parameters": "target modules instead of parameters",
    "layer_replication": "train without replicated layers",
    "rank_pattern": "train with one rank for all modules",
    "alpha_pattern": "train with one lora_alpha for all modules",
}
_INIT_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
_EXPONENT_BITS = {"F32": (np.uint32, 0x7F800000), "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80)}
"""dtype -> how to look at it as integers, and the exponent bits that are all set in an infinity and in a NaN."""
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What validation learnt: rank r, bytes of the weights file, the base model its PEFT configuration names, and the
    last parts of the modules it changes, sorted."""

    rank: int
    size_bytes: int
    base_model: str
    target_modules: tuple[str, ...]


def validate_adapter(
    folder: Path, shapes: BaseModelShapes, *, max_rank: int, max_bytes: int, check_finite: bool
) -> AdapterInfo:
    """Checks CONFIG_FILE and WEIGHTS_FILE in ``folder``; ``check_finite`` reads all weights, the rest only headers.

    Raises AdapterInvalidError or AdapterTooLargeError. The files must not change meanwhile (a private copy).
    """
    config = _read_config(folder / CONFIG_FILE)
    rank = _check_config(config)
    if rank > max_rank:
        raise AdapterTooLargeError(f"its rank {rank} is over the bound adapters.max_rank = {max_rank}")
    path = folder / WEIGHTS_FILE
    size_bytes = path.stat().st_size
    if size_bytes > max_bytes:
        raise AdapterTooLargeError(
            f"{WEIGHTS_FILE} has {size_bytes} bytes, over adapters.max_adapter_mib ({max_bytes} bytes)"
        )
    tensors = _read_tensors(path)
    modules = _pair_up(tensors)
    for module, (a, b) in modules.items():
        _check_shapes(module, a, b, rank, shapes)
    _check_complete(modules, config, shapes)
    if check_finite:
        _check_finite(path, tensors)
    return AdapterInfo(
        rank=rank,
        size_bytes=size_bytes,
        base_model=str(config.get("base_model_name_or_path") or ""),
        target_modules=tuple(sorted({module.rsplit(".", 1)[-1] for module in modules})),
    )


def _bad(message: str) -> NoReturn:
    raise AdapterInvalidError(message)


def _read_config(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterTooLargeError(f"{CONFIG_FILE} has more than {MAX_CONFIG_BYTES} bytes: is it a PEFT configuration?")
    try:
        config = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        _bad(f"{CONFIG_FILE} is not JSON ({error}): save the adapter again with PEFT's save_pretrained")
    if not isinstance(config, dict):
        _bad(f"{CONFIG_FILE} is not a JSON object: save the adapter again with PEFT's save_pretrained")
    return config


def _check_config(config: Mapping[str, Any]) -> int:
    """Returns the rank."""
    if config.get("peft_type") != "LORA":
        _bad(f"{CONFIG_FILE}: peft_type is {config.get('peft_type')!r}; only LORA adapters are served")
    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if type(rank) is not int or rank <= 0:
        _bad(f"{CONFIG_FILE}: r must be a positive integer, not {rank!r}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) < 1e9:
        _bad(f"{CONFIG_FILE}: lora_alpha must be a number, not {alpha!r}")
    is_list = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    if not (is_list or isinstance(targets, str)) or not targets:
        _bad(f"{CONFIG_FILE}: target_modules must be a list of module names or a pattern, not {targets!r}")
    if config.get("bias", "none") != "none":
        _bad(f"{CONFIG_FILE}: bias {config['bias']!r} is not supported: train with bias='none'")
    if not isinstance(config.get("use_rslora", False), bool):
        _bad(f"{CONFIG_FILE}: use_rslora must be true or false")
    for option, advice in _UNSUPPORTED.items():
        if config.get(option):
            _bad(f"{CONFIG_FILE}: {option} is not supported: {advice}")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(_INIT_CHANGES_BASE):
        _bad(
            f"{CONFIG_FILE}: init_lora_weights {init!r} belongs to a changed base model: convert it to a plain LoRA "
            "with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    return rank


def _read_tensors(path: Path) -> dict[str, TensorEntry]:
    try:
        tensors = read_header(path)
        with safe_open(path, framework="numpy"):  # the reader that vLLM uses must agree
            pass
    except (HeaderError, SafetensorError) as error:
        _bad(f"{WEIGHTS_FILE} is not a whole safetensors file: {error}. Copy or save the adapter again")
    if not tensors:
        _bad(f"{WEIGHTS_FILE} holds no weights: save the adapter again with PEFT's save_pretrained")
    return tensors


def _pair_up(tensors: Mapping[str, TensorEntry]) -> dict[str, tuple[TensorEntry, TensorEntry]]:
    """Module name (as in the base model) -> its A and B."""
    halves: dict[str, dict[str, TensorEntry]] = {}
    for key in sorted(tensors):
        module, _, half = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        if "embed_tokens" in key or "lm_head" in key:
            _bad(f"{WEIGHTS_FILE}: {key!r}: LoRA on embed_tokens or lm_head is not supported: train without it")
        if not key.endswith(".weight") or half not in ("lora_A", "lora_B") or not module:
            _bad(f"{WEIGHTS_FILE}: {key!r} is not the name of a LoRA weight as PEFT saves it (...lora_A.weight)")
        if tensors[key].dtype not in _EXPONENT_BITS:
            _bad(f"{WEIGHTS_FILE}: {key!r} is {tensors[key].dtype}; float32, float16 and bfloat16 are supported")
        if half in halves.setdefault(module, {}):
            _bad(f"{WEIGHTS_FILE}: {module!r} has two {half} weights")
        halves[module][half] = tensors[key]
    for module, found in halves.items():
        if len(found) != 2:
            missing = "lora_B" if "lora_A" in found else "lora_A"
            _bad(f"{WEIGHTS_FILE}: {module!r} has no {missing} weight: the adapter is incomplete, save it again")
    return {module: (found["lora_A"], found["lora_B"]) for module, found in halves.items()}


def _check_shapes(module: str, a: TensorEntry, b: TensorEntry, rank: int, shapes: BaseModelShapes) -> None:
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        _bad(
            f"{WEIGHTS_FILE}: {module!r} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, not rank {rank} as "
            f"{CONFIG_FILE} says"
        )
    if not shapes.modules:
        return
    expected = shapes.modules.get(module)
    if expected is None:
        _bad(f"the base model has no module {module!r}: was the adapter made for another base model?")
    if (b.shape[0], a.shape[1]) != expected:
        _bad(
            f"{module!r} of the adapter is for {a.shape[1]} inputs and {b.shape[0]} outputs, the base model's has "
            f"{expected[1]} and {expected[0]}: was the adapter made for another base model?"
        )


def _check_complete(modules: Mapping[str, Any], config: Mapping[str, Any], shapes: BaseModelShapes) -> None:
    """Every module of the base model that the configuration targets has weights."""
    targets = config["target_modules"]
    narrowed = any(config.get(key) for key in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    if isinstance(targets, str) or narrowed:
        return
    suffixes = tuple(f".{target}" for target in targets)
    for module in shapes.modules:
        # Fused experts have no modules that PEFT could have adapted, though the files name their weights so.
        if f".{module}".endswith(suffixes) and module not in modules and ".experts." not in module:
            _bad(f"{WEIGHTS_FILE}: target module {module!r} has no weights: the adapter is incomplete, save it again")


def _check_finite(path: Path, tensors: Mapping[str, TensorEntry]) -> None:
    buffer = bytearray(_CHUNK_BYTES)
    with open(path, "rb", buffering=0) as file:
        for key, entry in tensors.items():
            integer, exponent = _EXPONENT_BITS[entry.dtype]
            file.seek(entry.start)
            left = entry.end - entry.start
            while left:
                count = file.readinto(memoryview(buffer)[: min(left, _CHUNK_BYTES)])
                count -= count % np.dtype(integer).itemsize
                if not count:
                    _bad(f"{WEIGHTS_FILE} is truncated")
                file.seek(entry.end - left + count)
                values: npt.NDArray[Any] = np.frombuffer(buffer, integer, count // np.dtype(integer).itemsize)
                if bool(np.any((values & integer(exponent)) == exponent)):
                    _bad(f"{WEIGHTS_FILE}: {key!r} holds NaN or infinite weights: the training diverged, train again")
                left -= count
