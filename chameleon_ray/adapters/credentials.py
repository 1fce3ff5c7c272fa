"""Secrets by reference: read where and when they are used, kept nowhere, and in no message."""

import os
from pathlib import Path

from chameleon_ray.adapters.errors import AdapterSourceError


def read_secret(reference: str | None) -> str | None:
    """The value of ``env:NAME`` or ``file:/path`` (its last line break left out); None for None.

    AdapterSourceError, which names only the reference, when there is none: time may bring it.
    """
    if reference is None:
        return None
    kind, _, place = reference.partition(":")
    value = os.environ.get(place) if kind == "env" else _text(Path(place), reference)
    if not value:
        raise AdapterSourceError(f"the credentials at {reference} are missing or empty on this node")
    return value


def _text(path: Path, reference: str) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterSourceError(f"the credentials at {reference} cannot be read: {type(error).__name__}") from None
