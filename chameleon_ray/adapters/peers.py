"""Adapters from nodes that have them already: cheaper than their source, and there when it is not."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from chameleon_ray.adapters.errors import AdapterChangedError, AdapterError, AdapterNotFoundError, AdapterSourceError
from chameleon_ray.adapters.sources import FILES, MAX_CONFIG_BYTES, too_large

logger = logging.getLogger(__name__)

Peers = Callable[[str], Iterable[tuple[str, Iterator[bytes]]]]
"""Adapter digest -> (who, its content as ``store.packed`` has it) of each node that should have the adapter. Reading
the content raises AdapterError."""


class PeerSource:
    """An ``AdapterSource`` of one digest: the first peer whose content has it."""

    remembered_as = None

    def __init__(self, digest: str, peers: Peers) -> None:
        self._digest = digest
        self._peers = peers

    def fingerprint(self, uri: str) -> str:
        """The content itself is what a peer is asked for."""
        return self._digest

    def fetch(self, uri: str, into: Path, *, max_bytes: int) -> str:
        """See AdapterSource. AdapterNotFoundError when no peer gives the right content."""
        for who, content in self._peers(self._digest):
            try:
                found = unpack(content, into, uri, max_bytes)
                if found != self._digest:
                    raise AdapterChangedError(f"its copy has the digest {found}")
            except AdapterError as error:
                logger.warning("%s did not give adapter content %s: %s", who, self._digest, error)
                for name in FILES:
                    with suppress(FileNotFoundError):
                        (into / name).unlink()
            else:
                logger.info("Adapter content %s came from %s", self._digest, who)
                return self._digest
        raise AdapterNotFoundError(f"no other node has adapter content {self._digest}")


def unpack(content: Iterator[bytes], into: Path, uri: str, max_bytes: int) -> str:
    """Writes the files of ``store.packed`` content; the content's digest.

    Raises AdapterSourceError for content that is cut off, AdapterTooLargeError over ``max_bytes`` of weights.
    """
    digest, left = sha256(), b""

    def take() -> bytes:
        chunk = next(content, b"")
        if not chunk:
            raise AdapterSourceError(f"the content of {uri!r} is cut off")
        digest.update(chunk)
        return chunk

    for name, limit in zip(FILES, (MAX_CONFIG_BYTES, max_bytes), strict=True):
        while len(left) < 8:
            left += take()
        size, left = int.from_bytes(left[:8], "little"), left[8:]
        if size > limit:
            raise too_large(name, uri, limit)
        with open(into / name, "xb") as file:
            while len(left) < size:
                file.write(left)
                size -= len(left)
                left = take()
            file.write(left[:size])
            left = left[size:]
            file.flush()
            os.fsync(file.fileno())
    if left or next(content, b""):
        raise AdapterSourceError(f"the content of {uri!r} goes on behind its end")
    return digest.hexdigest()
