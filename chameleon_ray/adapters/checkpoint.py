"""An adapter's files as PEFT writes them: the configuration and the LoRA pairs, told from headers, without a weight."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from safetensors import SafetensorError, safe_open

from chameleon_ray.adapters.errors import AdapterInvalidError
from chameleon_ray.adapters.peft_config import LoraConfig
from chameleon_ray.adapters.safetensors_header import HeaderError, TensorEntry, read_header
from chameleon_ray.adapters.sources import WEIGHTS_FILE

AdapterShape = tuple[tuple[str, int], ...]
"""(module's name in checkpoints, rank) of each of an adapter's modules, sorted: what its size depends on."""

FLOATING = ("F32", "F16", "BF16")
"""Types that weights may have, as safetensors names them."""

_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight")
"""``default`` is PEFT's name for an adapter in a model; whoever saves a model's state by hand leaves it in."""
_TOKENS = re.compile(r"(^|\.)(embed_tokens|lm_head|lora_embedding_[AB])(\.|$)")
_ADVICE = {
    "lora_magnitude_vector": "that is DoRA: train without it, or merge it and serve the merged model as a base model",
    "bias": "biases are not served: train with bias='none' and lora_bias=False, or merge it and serve the merged model",
}


@dataclass(frozen=True, slots=True)
class LoraPair:
    """One module's weights: a [rank, in_features], b [out_features, rank]. scale: what ``b @ a`` is multiplied by."""

    a: TensorEntry
    b: TensorEntry
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def in_features(self) -> int:
        return self.a.shape[1]

    @property
    def out_features(self) -> int:
        return self.b.shape[0]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """pairs: module name in the checkpoint, without PEFT's ``base_model.model.`` -> its weights, sorted by name."""

    config: LoraConfig
    pairs: Mapping[str, LoraPair]

    @property
    def modules(self) -> tuple[tuple[str, int, int], ...]:
        """(name, out_features, in_features) of each."""
        return tuple((name, pair.out_features, pair.in_features) for name, pair in self.pairs.items())

    @property
    def shape(self) -> AdapterShape:
        """Name and rank of each."""
        return tuple((name, pair.rank) for name, pair in self.pairs.items())

    @property
    def rank(self) -> int:
        """The largest of its modules."""
        return max(pair.rank for pair in self.pairs.values())


def read_checkpoint(folder: Path) -> Checkpoint:
    """The adapter in ``folder``. Raises AdapterInvalidError, AdapterTooLargeError or OSError.

    ``folder`` must not change meanwhile.
    """
    config = LoraConfig.read(folder)
    halves = _pair_up(_read_tensors(folder / WEIGHTS_FILE))
    pairs = {}
    for module, (a, b) in halves.items():
        rank = config.rank_of(module)
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
            _bad(
                f"{module!r} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, not rank {rank} as its "
                "configuration says"
            )
        pairs[module] = LoraPair(a, b, config.scale_of(module))
    return Checkpoint(config, pairs)


def _bad(problem: str) -> NoReturn:
    raise AdapterInvalidError(f"{WEIGHTS_FILE}: {problem}")


def _read_tensors(path: Path) -> dict[str, TensorEntry]:
    try:
        tensors = read_header(path)
        with safe_open(path, framework="numpy"):  # the reader that vLLM uses must agree
            pass
    except (HeaderError, SafetensorError) as error:
        raise AdapterInvalidError(
            f"{WEIGHTS_FILE} is not a whole safetensors file: {error}. Copy or save the adapter again"
        ) from None
    if not tensors:
        _bad("it holds no weights: save the adapter again with PEFT's save_pretrained")
    return tensors


def _pair_up(tensors: Mapping[str, TensorEntry]) -> dict[str, tuple[TensorEntry, TensorEntry]]:
    """Module name -> its A and B."""
    halves: dict[str, dict[str, TensorEntry]] = {}
    for key in sorted(tensors):
        module, half = _parse(key)
        if tensors[key].dtype not in FLOATING:
            _bad(f"{key!r} is {tensors[key].dtype}; float32, float16 and bfloat16 are supported")
        if half in halves.setdefault(module, {}):
            _bad(f"{module!r} has two lora_{half} weights")
        halves[module][half] = tensors[key]
    for module, found in halves.items():
        if len(found) != 2:
            missing = "lora_B" if "A" in found else "lora_A"
            _bad(f"{module!r} has no {missing} weight: the adapter is incomplete, save it again")
    return {module: (found["A"], found["B"]) for module, found in halves.items()}


def _parse(key: str) -> tuple[str, str]:
    if _TOKENS.search(key):
        _bad(
            f"{key!r}: adapters of the embedding and the output head are not served: train without them, or merge it "
            "and serve the merged model as a base model"
        )
    match = _KEY.fullmatch(key)
    if match is None:
        advice = next((text for part, text in _ADVICE.items() if part in key), "LoRA weights are ...lora_A.weight")
        _bad(f"{key!r} is not the name of a LoRA weight as PEFT saves it; {advice}")
    return match["module"], match["half"]
