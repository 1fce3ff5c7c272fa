"""What an engine says of an adapter before any request uses it."""

from collections.abc import Mapping
from dataclasses import dataclass

from chameleon_ray.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterLoadError,
    AdapterModulesUnknownError,
    AdapterNoRoomError,
    AdapterTooLargeError,
)

_ERRORS: Mapping[str, type[AdapterError]] = {
    error.code: error
    for error in (
        AdapterInvalidError,
        AdapterModulesUnknownError,
        AdapterTooLargeError,
        AdapterLoadError,
        AdapterNoRoomError,
    )
}


@dataclass(frozen=True, slots=True)
class Inspection:
    """The engine can serve the adapter, or ``code`` and ``reason`` say why not (see ``engine_error``). Plain values, as
    vLLM passes on nothing else.

    num_blocks, size_bytes: what it takes of each rank's KV pool and host memory; 0 where adapters have vLLM's slots.
    """

    num_blocks: int = 0
    size_bytes: int = 0
    code: str = ""
    reason: str = ""


def engine_error(code: str, reason: str) -> AdapterError:
    """An engine's refusal as the AdapterError of that ``code``."""
    return _ERRORS[code](reason)
