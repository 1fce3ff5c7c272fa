"""Adapters made for a test: copies of the demo's, changed."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from chameleon_ray.adapters.sources import CONFIG_FILE, WEIGHTS_FILE


def scaled_adapter(source: Path, target: Path, scale: float) -> Path:
    """``source`` with B times ``scale``, written over what is in ``target``: other content, other answers."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    weights = load_file(source / WEIGHTS_FILE)
    changed = {name: array * scale if "lora_B" in name else array for name, array in weights.items()}
    save_file({name: array.astype("float32") for name, array in changed.items()}, target / WEIGHTS_FILE)
    return target


def widened_adapter(source: Path, target: Path, times: int) -> Path:
    """``source`` at so many times its rank."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    weights = load_file(source / WEIGHTS_FILE)
    wide = {name: np.tile(one, (times, 1) if "lora_A" in name else (1, times)) for name, one in weights.items()}
    save_file(wide, target / WEIGHTS_FILE)
    config = json.loads((source / CONFIG_FILE).read_text())
    (target / CONFIG_FILE).write_text(json.dumps(config | {"r": times * config["r"]}))
    return target
