"""What the base model looks like to an adapter: the shape of every module that a LoRA could sit on.

Read from the headers of the model's safetensors files, without torch and without loading a weight.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chameleon_ray.adapters.safetensors_header import HeaderError, read_header

logger = logging.getLogger(__name__)

_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
_FLOATING = ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2")  # others are packed: not shaped as the module is
_LAYERS = "model.layers."


@dataclass(frozen=True, slots=True)
class BaseModelShapes:
    """modules: name -> (out_features, in_features) of each linear module in the layers; empty: not known.

    num_layers: transformer layers (0: not known).
    """

    modules: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    num_layers: int = 0

    @classmethod
    def from_folder(cls, folder: Path) -> "BaseModelShapes":
        """Shapes of the model in ``folder`` (Hugging Face format).

        Falls back to config.json of Llama-like models where the weights do not show them (quantised, or no safetensors
        files), and to no checks, with a warning, where neither does.
        """
        folder = Path(folder)
        modules = _from_weights(folder) or _from_config(folder)
        if not modules:
            logger.warning(
                "Cannot tell the module shapes of %s: adapters are not checked against the base model", folder
            )
        layers = {name.removeprefix(_LAYERS).split(".", 1)[0] for name in modules}
        return cls(modules, len(layers))


def _from_weights(folder: Path) -> dict[str, tuple[int, int]]:
    modules: dict[str, tuple[int, int]] = {}
    for path in _weight_files(folder):
        try:
            tensors = read_header(path)
        except (OSError, HeaderError) as error:
            logger.warning("Cannot read the shapes in %s: %s", path, error)
            return {}
        for name, tensor in tensors.items():
            if name.startswith(_LAYERS) and name.endswith(".weight") and len(tensor.shape) == 2:
                if tensor.dtype not in _FLOATING:
                    return {}
                modules[name.removesuffix(".weight")] = (tensor.shape[0], tensor.shape[1])
    return modules


def _weight_files(folder: Path) -> list[Path]:
    index = _read_json(folder / "model.safetensors.index.json").get("weight_map")
    if isinstance(index, dict):
        return [folder / str(name) for name in sorted(set(index.values()))]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else []


def _from_config(folder: Path) -> dict[str, tuple[int, int]]:
    config = _read_json(folder / "config.json")
    if config.get("model_type") not in _LLAMA_LIKE:
        return {}
    try:
        hidden, intermediate, heads = (
            int(config[key]) for key in ("hidden_size", "intermediate_size", "num_attention_heads")
        )
        head_dim = int(config.get("head_dim") or hidden // heads)
        kv_width = int(config.get("num_key_value_heads") or heads) * head_dim
        num_layers = int(config["num_hidden_layers"])
    except (KeyError, TypeError, ValueError):
        return {}
    in_layer = {
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (kv_width, hidden),
        "self_attn.v_proj": (kv_width, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    return {f"{_LAYERS}{n}.{name}": shape for n in range(num_layers) for name, shape in in_layer.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
