"""A model's sizes from its ``config.json`` alone: projections, KV heads, and what keeps adapters out of KV memory."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SPLIT = ("llama", "mistral", "qwen2", "qwen3", "gemma", "granite", "olmo2", "qwen2_vl", "qwen2_5_vl", "mistral3")
_FUSED = ("phi3",)
FAMILIES = (*_SPLIT, *_FUSED)
"""``model_type`` of the models whose layers are known here: attention and a gated MLP, dense."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class ModelConfigError(ValueError):
    """The configuration cannot be read, or is of a model that is not known here."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A dense decoder's sizes. fused: q, k, v are one projection with one LoRA pair, and so are gate and up."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_model_len: int
    tied_embeddings: bool = False
    fused: bool = False
    element_bytes: int = 2

    @classmethod
    def of(cls, config: Mapping[str, Any], name: str) -> "ModelShape":
        """Of a Llama-like model's configuration. Raises ModelConfigError where a size is missing."""
        try:
            heads, hidden = config["num_attention_heads"], config["hidden_size"]
            return cls(
                name=name,
                hidden=hidden,
                intermediate=config["intermediate_size"],
                layers=config["num_hidden_layers"],
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or hidden // heads,
                vocabulary=config["vocab_size"],
                max_model_len=config.get("max_position_embeddings", 8192),
                tied_embeddings=bool(config.get("tie_word_embeddings")),
                fused=config.get("model_type") in _FUSED,
                element_bytes=_ELEMENT_BYTES.get(str(config.get("dtype") or config.get("torch_dtype")), 2),
            )
        except KeyError as error:
            raise ModelConfigError(
                f"the config.json of {name} has no {error}: only Llama-like models are known"
            ) from None

    def parts(self, tp: int = 1) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Projections of a layer on one of ``tp`` GPUs: name -> (in_features, output widths of their slices)."""
        q, kv = self.heads * self.head_dim // tp, self.kv_heads_on_gpu(tp) * self.head_dim
        half = self.intermediate // tp
        return {
            "qkv_proj": (self.hidden, (q + 2 * kv,) if self.fused else (q, kv, kv)),
            "o_proj": (q, (self.hidden,)),
            "gate_up_proj": (self.hidden, (2 * half,) if self.fused else (half, half)),
            "down_proj": (half, (self.hidden,)),
        }

    def kv_heads_on_gpu(self, tp: int) -> int:
        """Of a layer; fewer heads than GPUs are repeated."""
        return max(1, self.kv_heads // tp)

    def block_elems(self, block_size: int, tp: int = 1) -> int:
        """Numbers in one layer's share of a KV block of ``block_size`` tokens on one GPU: keys and values."""
        return block_size * 2 * self.kv_heads_on_gpu(tp) * self.head_dim

    def layer_weights(self) -> int:
        """Numbers in a layer's weights."""
        return sum(inputs * sum(widths) for inputs, widths in self.parts().values())

    def weights(self) -> int:
        """Numbers in the model's weights, without norms and biases."""
        embeddings = 1 if self.tied_embeddings else 2
        return self.layers * self.layer_weights() + embeddings * self.vocabulary * self.hidden

    def adapter_bytes(self, rank: int, element_bytes: int) -> int:
        """Of an adapter of that rank on all projections."""
        per_rank = sum(inputs * len(widths) + sum(widths) for inputs, widths in self.parts().values())
        return rank * per_rank * self.layers * element_bytes


def read_config(model: Path) -> dict[str, Any]:
    """``config.json`` of a folder, or that file itself; of a model with several parts, the language model's. Raises
    ModelConfigError."""
    path = model / "config.json" if model.is_dir() else model
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelConfigError(f"cannot read {path}: {error}") from None
    if not isinstance(config, dict):
        raise ModelConfigError(f"{path} is not a model's configuration")
    language = config.get("text_config")
    return {**config, **language} if isinstance(language, dict) else config


def obstacle(config: Mapping[str, Any]) -> str | None:
    """Why adapters of such a model cannot lie in KV memory; None if nothing in its configuration is against it."""
    kinds = set(config.get("layer_types") or ())
    quantization = config.get("quantization_config") or {}
    reasons = {
        "it has experts, and adapters of experts do not go into KV memory": any(config.get(key) for key in _EXPERTS),
        "latent attention (MLA) keeps rows that are too short": bool(config.get("kv_lora_rank")),
        "an encoder's and a decoder's KV caches differ": bool(config.get("is_encoder_decoder")),
        "layers without attention keep no KV blocks": any(not kind.endswith("_attention") for kind in kinds)
        or "linear_attention" in kinds
        or config.get("model_type") in ("mamba", "mamba2", "jamba"),
        "its layers do not share one table of KV blocks: some have a sliding window": {
            "sliding_attention",
            "full_attention",
        }
        <= kinds
        or str(config.get("model_type")).startswith(("gemma2", "gemma3")),
        "its KV cache is kept in another type than adapters": bool(quantization.get("kv_cache_scheme")),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)
