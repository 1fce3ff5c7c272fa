"""The weights of an adapter's file as tensors."""

import math
from collections.abc import Callable
from pathlib import Path

import torch

from chameleon_ray.adapters.safetensors_header import TensorEntry

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class FileChangedError(ValueError):
    """The file is shorter than its header said when it was read."""


def read_weights(path: Path) -> Callable[[TensorEntry], torch.Tensor]:
    """All bytes of the file; returns what gives its tensors, which are views of them and may be changed.

    Read, not mapped, as a file that shrinks meanwhile must not end the process. Raises FileChangedError or OSError.
    """
    buffer = bytearray(path.stat().st_size)
    with path.open("rb", buffering=0) as file:
        if file.readinto(buffer) != len(buffer):
            raise FileChangedError(f"{path} has changed while it was read")

    def view(entry: TensorEntry) -> torch.Tensor:
        if entry.end > len(buffer):
            raise FileChangedError(f"{path} has changed while it was read")
        count = math.prod(entry.shape)
        return torch.frombuffer(buffer, dtype=_DTYPES[entry.dtype], count=count, offset=entry.start).view(entry.shape)

    return view
