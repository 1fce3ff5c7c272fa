"""Adapters made for a test: copies of the demo's, changed."""

import shutil
from pathlib import Path

from safetensors.numpy import load_file, save_file

from chameleon_ray.adapters.sources import WEIGHTS_FILE


def scaled_adapter(source: Path, target: Path, scale: float) -> Path:
    """``source`` with B times ``scale``, written over what is in ``target``: other content, other answers."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    weights = load_file(source / WEIGHTS_FILE)
    changed = {name: array * scale if "lora_B" in name else array for name, array in weights.items()}
    save_file({name: array.astype("float32") for name, array in changed.items()}, target / WEIGHTS_FILE)
    return target
