"""What the configured adapters are like, before an engine starts: where they can lie depends on it."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from chameleon_ray.adapters.errors import AdapterError
from chameleon_ray.adapters.safetensors_header import HeaderError, read_header
from chameleon_ray.adapters.sources import WEIGHTS_FILE, local_path
from chameleon_ray.config import AdaptersConfig, AppConfig

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What models with experts call their number in ``config.json``."""


def first_with_experts(config: AppConfig) -> Path | None:
    """The first configured adapter that changes experts of the base model, told from its weights' names; None without
    one, and where the model has none. Adapters that cannot be read here are left to whoever loads them."""
    if not _has_experts(Path(config.model.source).expanduser()):
        return None
    return next((folder for folder in _folders(config.adapters) if _changes_experts(folder)), None)


def _has_experts(model: Path) -> bool:
    try:
        settings = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # A hub's name, which is not resolved here: look at the adapters.
        return True
    return any(part.get(name) for part in (settings, settings.get("text_config") or {}) for name in _EXPERT_COUNTS)


def _folders(adapters: AdaptersConfig) -> Iterator[Path]:
    if adapters.folder is not None:
        with suppress(OSError):
            yield from sorted(Path(adapters.folder).expanduser().iterdir())
    for source in adapters.preload:
        with suppress(AdapterError):  # Not a local one.
            yield Path(local_path(source.uri))


def _changes_experts(folder: Path) -> bool:
    try:
        names = read_header(folder / WEIGHTS_FILE)
    except (HeaderError, OSError):
        return False
    return any(".experts." in name for name in names)
