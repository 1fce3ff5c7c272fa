"""What an adapter is to a policy, and where its weights can lie."""

from dataclasses import dataclass
from enum import IntEnum


class Tier(IntEnum):
    """Where a replica holds an adapter's weights; a higher tier is closer to compute."""

    ABSENT = 0
    """Only at the adapter's source: a fetch is needed first."""
    DISK = 1
    """In the node's content-addressed store."""
    HOST = 2
    """In host memory, one host-to-device copy away."""
    GPU = 3
    """Readable by the LoRA kernels."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One version of an adapter. Its identity is the digest of its content, never its name.

    digest: lower-case hex SHA-256 of the adapter's files (see ``chameleon_ray.adapters.store``).
    rank: the LoRA rank ``r``.
    size_bytes: bytes of its weights as the engine holds them.
    """

    digest: str
    rank: int
    size_bytes: int
