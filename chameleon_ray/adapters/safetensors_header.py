"""Reading a safetensors header without loading a weight, and without trusting a byte of it.

Layout: 8 bytes little-endian header length, a JSON header, then the tensors' bytes, in order and without holes.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 32 << 20
_DTYPE_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2}
_DTYPE_BYTES |= {"BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8}


class HeaderError(ValueError):
    """Not a whole, well-formed safetensors file; the message says what is wrong."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor in a file: dtype as safetensors names it; start and end are byte offsets from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name. Raises HeaderError; OSError passes through."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise HeaderError("it is truncated, or not a safetensors file")
        if length > MAX_HEADER_BYTES:
            raise HeaderError(f"its header claims {length} bytes, more than {MAX_HEADER_BYTES}")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise HeaderError("its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _entry(name, value, 8 + length) for name, value in header.items()}
    _check_layout(tensors, 8 + length, size)
    return tensors


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise HeaderError("a key appears twice in its header")
    return found


def _entry(name: str, value: Any, data_start: int) -> TensorEntry:
    if not isinstance(value, dict):
        raise HeaderError(f"tensor {name!r} has no description")
    dtype, shape, offsets = value.get("dtype"), _sizes(value.get("shape")), _sizes(value.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        raise HeaderError(f"tensor {name!r} has a malformed description")
    width = _DTYPE_BYTES.get(dtype)
    if width is not None and offsets[1] - offsets[0] != math.prod(shape) * width:
        raise HeaderError(f"tensor {name!r}: shape {shape} and dtype {dtype} do not match its byte range {offsets}")
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _sizes(value: Any) -> list[int] | None:
    """``value`` if it is a short list of numbers that fit a file, else None."""
    if isinstance(value, list) and len(value) <= 16 and all(type(item) is int and 0 <= item < 2**63 for item in value):
        return value
    return None


def _check_layout(tensors: dict[str, TensorEntry], data_start: int, size: int) -> None:
    position = data_start
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position or entry.end < entry.start:
            raise HeaderError(f"tensor {name!r} does not begin where the one before it ends")
        position = entry.end
    if position != size:
        raise HeaderError(f"it should have {position} bytes and has {size}: truncated or damaged")
