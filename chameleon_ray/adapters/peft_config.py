"""A PEFT LoRA configuration: what it says of each module, and which of PEFT's options can be served."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from chameleon_ray.adapters.errors import AdapterInvalidError, AdapterTooLargeError
from chameleon_ray.adapters.sources import CONFIG_FILE, MAX_CONFIG_BYTES

_AS_LORA = "convert it with peft.save_as_lora, or merge it and serve the merged model as a base model"
_UNSUPPORTED = {  # options of PEFT's LoraConfig that change what the adapter computes -> what to do instead
    "use_dora": "train without DoRA, or merge it (merge_and_unload) and serve the merged model as a base model",
    "use_qalora": "train without QALoRA",
    "use_bdlora": f"train without BD-LoRA, or {_AS_LORA}",
    "kasa_config": f"train without KaSA, or {_AS_LORA}",
    "monteclora_config": "train without MonteCLoRA",
    "arrow_config": "train without Arrow routing",
    "alora_invocation_tokens": "train a plain LoRA instead of an activated one",
    "lora_bias": "train with lora_bias=False, or merge it and serve the merged model as a base model",
    "modules_to_save": "train without fully trained modules, or merge it and serve the merged model as a base model",
    "trainable_token_indices": "train without trainable tokens, or merge it and serve the merged model as a base model",
    "target_parameters": "target modules instead of parameters",
    "layer_replication": "train without replicated layers",
}
_INIT_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
"""Values of init_lora_weights with which PEFT changes the base model's weights whenever it loads the adapter."""
_CONVERT_INIT = "PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
_SILENT = {  # what else PEFT writes: looked at below, or of no matter after training
    *("peft_type", "r", "lora_alpha", "target_modules", "bias", "use_rslora", "init_lora_weights", "rank_pattern"),
    *("alpha_pattern", "fan_in_fan_out", "megatron_config", "megatron_core", "auto_mapping", "revision", "task_type"),
    *("base_model_name_or_path", "inference_mode", "peft_version", "lora_dropout", "exclude_modules", "runtime_config"),
    *("layers_to_transform", "layers_pattern", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("velora_config", "qalora_group_size", "ensure_weight_tying"),
}
_MAX_REPEATS = 4
"""Repetitions in one pattern: with more of them, or nested, matching a name could take for ever."""

Pattern = tuple[tuple[re.Pattern[str], float], ...]
"""A rank_pattern or alpha_pattern in its order; the first that matches a module's name counts."""


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """A LoRA configuration that can be served.

    rank, alpha: of modules that no pattern names. targets: last parts of the names of modules that must all have
    weights; empty where the configuration narrows them. base_model: its base_model_name_or_path.
    """

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Pattern
    alpha_pattern: Pattern
    targets: tuple[str, ...]
    base_model: str
    warnings: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> "LoraConfig":
        """That of the adapter in ``folder``. Raises AdapterInvalidError, AdapterTooLargeError or OSError."""
        path = folder / CONFIG_FILE
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise AdapterTooLargeError(
                f"{CONFIG_FILE} has more than {MAX_CONFIG_BYTES} bytes: is it a PEFT configuration?"
            )
        try:
            config = json.loads(path.read_bytes().decode())
        except (ValueError, RecursionError) as error:
            _bad(f"is not JSON ({error}): save the adapter again with PEFT's save_pretrained")
        if not isinstance(config, dict):
            _bad("is not a JSON object: save the adapter again with PEFT's save_pretrained")
        _check_supported(config)
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if not _is_rank(rank):
            _bad(f"r must be a positive integer, not {rank!r}")
        if not _is_alpha(alpha):
            _bad(f"lora_alpha must be a number, not {alpha!r}")
        if not isinstance(config.get("use_rslora", False), bool):
            _bad("use_rslora must be true or false")
        return cls(
            rank=rank,
            alpha=float(alpha),
            use_rslora=config.get("use_rslora", False),
            rank_pattern=_pattern(config, "rank_pattern", _is_rank, "positive integers"),
            alpha_pattern=_pattern(config, "alpha_pattern", _is_alpha, "numbers"),
            targets=_targets(config),
            base_model=str(config.get("base_model_name_or_path") or ""),
            warnings=tuple(_warnings(config)),
        )

    def rank_of(self, module: str) -> int:
        """The rank of a module, by its checkpoint name without PEFT's ``base_model.model.``."""
        return int(_match(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """What the module's ``B @ A`` is multiplied by: alpha / rank, with rsLoRA alpha / sqrt(rank)."""
        rank, alpha = self.rank_of(module), _match(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _bad(problem: str) -> NoReturn:
    raise AdapterInvalidError(f"{CONFIG_FILE}: {problem}")


def _match(pattern: Pattern, module: str, default: float) -> float:
    return next((value for compiled, value in pattern if compiled.match(module)), default)


def _is_rank(value: Any) -> TypeGuard[int]:
    return type(value) is int and value > 0


def _is_alpha(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _pattern(config: Mapping[str, Any], option: str, is_value: Callable[[Any], bool], values: str) -> Pattern:
    """As PEFT matches it (``peft.utils.other.get_pattern_key``): a regular expression for the name's last parts."""
    given = config.get(option) or {}
    if not isinstance(given, dict) or not all(is_value(value) for value in given.values()):
        _bad(f"{option} must map module names or regular expressions to {values}")
    compiled = []
    for key, value in given.items():
        literal = re.sub(r"\\.", "", key)
        if re.search(r"\)[*+{]", literal) or len(re.findall(r"[*+{]", literal)) > _MAX_REPEATS:
            _bad(f"{option}: {key!r} repeats too much to be matched safely: name the modules, or use fewer of * + {{")
        try:
            compiled.append((re.compile(rf"(.*\.)?({key})$"), float(value)))
        except (re.error, RecursionError, OverflowError) as error:
            _bad(f"{option}: {key!r} is not a regular expression ({error})")
    return tuple(compiled)


def _targets(config: Mapping[str, Any]) -> tuple[str, ...]:
    targets = config.get("target_modules")
    is_list = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    if not (is_list or isinstance(targets, str)) or not targets:
        _bad(f"target_modules must be a list of module names or a pattern, not {targets!r}")
    narrowing = (config.get(key) for key in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    narrowed = any(value not in (None, [], "") for value in narrowing)
    return () if isinstance(targets, str) or narrowed else tuple(sorted(targets))


def _check_supported(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        _bad(
            f"peft_type is {config.get('peft_type')!r}; only LORA adapters are served: many others become one with "
            "peft.save_as_lora"
        )
    if config.get("bias", "none") != "none":
        _bad(
            f"bias {config['bias']!r} is not supported: train with bias='none', or merge it and serve the merged model "
            "as a base model"
        )
    for option, advice in _UNSUPPORTED.items():
        if config.get(option):
            _bad(f"{option} is not supported: {advice}")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(_INIT_CHANGES_BASE):
        _bad(
            f"init_lora_weights {init!r} belongs to a changed base model: convert it to a plain LoRA with "
            f"{_CONVERT_INIT}"
        )


def _warnings(config: Mapping[str, Any]) -> list[str]:
    found = []
    if config.get("init_lora_weights") == "lora_ga":
        # PEFT changes the base model where training begins, not where it loads the adapter (LoraLayer.lora_ga_init).
        found.append(
            "init_lora_weights is 'lora_ga': served on the unchanged base model, as PEFT loads it; if its training "
            f"began by changing the base model, convert it with {_CONVERT_INIT}"
        )
    if config.get("fan_in_fan_out"):
        found.append("fan_in_fan_out is ignored: LoRA's A and B are stored the same way with and without it")
    if config.get("megatron_config"):
        found.append("megatron_config is ignored: the weights are served as those of plain linear layers")
    unknown = sorted(name for name, value in config.items() if value and name not in _SILENT | _UNSUPPORTED.keys())
    if unknown:
        found.append(f"options that are not known here are ignored: {', '.join(unknown)}")
    return found
