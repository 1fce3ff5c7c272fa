"""The node's adapter store: one folder per content digest, shared by all replica processes of the node.

    <dir>/<digest>/{adapter_config.json, adapter_model.safetensors}   an adapter; appears by rename, whole
    <dir>/.tmp-*/      being fetched; its maker holds an exclusive lock on it. What a remote fetch that failed has left
                       stays for the next one, for a while
    <dir>/.trash-*/    being removed
    <dir>/.locks/XX    one of 256: an exclusive lock while an adapter whose digest begins with XX is fetched
    <dir>/.locks/uXXX  one of 4,096: the same for adapters from remote places, whose digest nobody knows yet
    <dir>/.known/*     for each remote place, the fingerprint and the digest of what was there last
    <dir>/.room        an exclusive lock while room is made and an adapter is put in place

Locks are ``flock`` (they end with their process). Whoever uses an adapter holds a shared lock on its folder, and only a
folder that can be locked exclusively is removed. The folder's modification time is the time of its last use.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from chameleon_ray.adapters.errors import (
    AdapterChangedError,
    AdapterNotFoundError,
    AdapterSourceError,
    AdapterStoreError,
    AdapterTooLargeError,
)
from chameleon_ray.adapters.identity import DIGEST
from chameleon_ray.adapters.sources import FILES, AdapterSource
from chameleon_ray.adapters.validate import AdapterInfo

logger = logging.getLogger(__name__)

Validator = Callable[[Path], AdapterInfo]

_CHUNK_BYTES = 4 << 20
_TEMP, _TRASH = ".tmp-", ".trash-"
_NEW_FOLDER_S = 60.0
"""A temporary folder younger than this is left alone: its maker may not have locked it yet."""
_PARTIAL_S = 3600.0
"""So long, what a failed fetch has left may be the beginning of the next one."""
_PARTIAL_SHARE = 8
"""All of that together takes at most this part of the store's bound."""
_SETTLED_NS = 2_000_000_000
"""File systems date changes in steps: until so long after a folder's latest change there may be another of its date."""


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """An adapter in the store. It may be evicted again unless it is held with ``AdapterStore.use``."""

    digest: str
    folder: Path
    info: AdapterInfo
    mark: str
    """The source's fingerprint of it."""


class AdapterStore:
    """All methods block (call them from threads) and may be called from any thread and any process of the node.

    max_bytes: size that the store shrinks to, least recently used first; adapters in use stay even if that means more.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = Path(folder).expanduser().absolute()
        self._max_bytes = max_bytes
        self._listed: tuple[int, frozenset[str]] = (-1, frozenset())
        with _store_errors(self._folder):
            for name in (".locks", ".known"):
                (self._folder / name).mkdir(parents=True, exist_ok=True)
            self._clean_up()

    def path(self, digest: str) -> Path | None:
        """The folder of the adapter with this digest, or None when it is not here."""
        if not DIGEST.fullmatch(digest):
            raise ValueError(f"{digest!r} is not a SHA-256 digest in lower-case hex")
        folder = self._folder / digest
        return folder if folder.is_dir() else None

    def digests(self) -> frozenset[str]:
        """Digests of all adapters in the store, whichever process put them there.

        The folder is read only when its modification time has changed. Raises AdapterStoreError.
        """
        with _store_errors(self._folder):
            changed_ns = os.stat(self._folder).st_mtime_ns
            listed_ns, digests = self._listed
            if changed_ns != listed_ns:
                digests = frozenset(name for name in os.listdir(self._folder) if DIGEST.fullmatch(name))
                settled = abs(time.time_ns() - changed_ns) > _SETTLED_NS
                self._listed = (changed_ns if settled else -1, digests)
            return digests

    def add(
        self, source: AdapterSource, uri: str, validator: Validator, *, max_bytes: int, digest: str | None = None
    ) -> StoredAdapter:
        """Fetches, digests, validates and keeps the adapter at ``uri``; nothing stays of one that fails.

        Raises what ``source`` and ``validator`` raise, AdapterTooLargeError over ``max_bytes`` of weights,
        AdapterChangedError when ``digest`` is given and the content is another, AdapterStoreError.
        """
        with _store_errors(self._folder), ExitStack() as stack:
            place = source.remembered_as
            key = None if place is None else hashlib.sha256(place.encode()).hexdigest()
            if key is not None:
                stack.enter_context(_locked_file(self._folder / ".locks" / f"u{key[:3]}"))
                if (known := self._known(key, source, uri, validator)) is not None:
                    _check_digest(known.digest, digest, uri)
                    return known
            temp = stack.enter_context(self._temporary_folder(key))
            mark = source.fetch(uri, temp, max_bytes=min(max_bytes, self._max_bytes))
            found = content_digest(temp)
            _check_digest(found, digest, uri)
            info = validator(temp)
            added = StoredAdapter(found, self._put_in_place(temp, found), info, mark)
            if key is not None:
                _write(self._folder / ".known" / key, f"{found} {mark}")
            return added

    def ensure(self, digest: str, source: AdapterSource, uri: str, validator: Validator, *, max_bytes: int) -> Path:
        """The folder of ``digest``, fetched from ``uri`` if it is not here; concurrent callers fetch it once.

        Raises as ``add`` does.
        """
        if (folder := self.path(digest)) is None:
            with _store_errors(self._folder), _locked_file(self._folder / ".locks" / digest[:2]):
                folder = self.path(digest)  # somebody else may have fetched it meanwhile
                if folder is None:
                    return self.add(source, uri, validator, max_bytes=max_bytes, digest=digest).folder
        return folder

    @contextmanager
    def use(self, digest: str) -> Iterator[Path]:
        """Holds the adapter in the store, in all processes, until the block ends. AdapterNotFoundError: not here."""
        folder = self.path(digest)
        descriptor = None if folder is None else _lock_folder(folder, fcntl.LOCK_SH)
        if folder is None or descriptor is None:
            raise AdapterNotFoundError(f"adapter content {digest} is not in the store {self._folder}")
        try:
            os.utime(descriptor)
            yield folder
        finally:
            os.close(descriptor)

    def size_bytes(self) -> int:
        """Bytes of all adapters in the store."""
        return sum(size for _, size, _ in self._entries())

    def _known(self, key: str, source: AdapterSource, uri: str, validator: Validator) -> StoredAdapter | None:
        """What is at a remote place, when it is in the store already."""
        try:
            digest, _, known_mark = (self._folder / ".known" / key).read_text().partition(" ")
        except FileNotFoundError:
            return None
        if self.path(digest) is not None and source.fingerprint(uri) == known_mark:
            with ExitStack() as stack:
                try:
                    folder = stack.enter_context(self.use(digest))
                except AdapterNotFoundError:  # evicted in between
                    return None
                return StoredAdapter(digest, folder, validator(folder), known_mark)
        return None

    @contextmanager
    def _temporary_folder(self, key: str | None) -> Iterator[Path]:
        """A new folder; for a remote place (``key``) the one that a failed fetch may have left."""
        if key is None:
            temp = Path(tempfile.mkdtemp(prefix=_TEMP, dir=self._folder))
        else:
            temp = self._folder / f"{_TEMP}{key}"
            temp.mkdir(exist_ok=True)
            os.utime(temp)  # so that it is not too old to be kept
        descriptor = _lock_folder(temp, fcntl.LOCK_EX)
        if descriptor is None:
            raise AdapterStoreError(f"{temp} was removed by somebody else; check adapters.store_dir")
        keep = False
        try:
            yield temp
        except AdapterSourceError:
            keep = key is not None
            raise
        finally:
            if not keep:
                shutil.rmtree(temp, ignore_errors=True)  # gone already when it was put in place
            os.close(descriptor)
            if keep:
                self._drop_partial()

    def _drop_partial(self) -> None:
        """Removes what failed fetches have left: all that is old, and the oldest until the rest is small enough."""
        left = []
        for path in self._folder.glob(f"{_TEMP}*"):
            with suppress(FileNotFoundError):  # others work here
                left.append((path.stat().st_mtime, _folder_bytes(path), path))
        used = sum(size for _, size, _ in left)
        for used_at, size, path in sorted(left):
            if used * _PARTIAL_SHARE <= self._max_bytes and time.time() - used_at < _PARTIAL_S:
                return
            if _remove_unlocked(path):
                used -= size

    def _put_in_place(self, temp: Path, digest: str) -> Path:
        target = self._folder / digest
        with _locked_file(self._folder / ".room"):
            if not target.is_dir():
                self._make_room(_folder_bytes(temp))
                os.rename(temp, target)
                _sync(self._folder)
        return target

    def _make_room(self, needed_bytes: int) -> None:
        if needed_bytes > self._max_bytes:
            raise AdapterTooLargeError(
                f"the adapter's {needed_bytes} bytes exceed the whole store; raise adapters.store_max_gib"
            )
        entries = sorted(self._entries())
        used = sum(size for _, size, _ in entries)
        for _, size, folder in entries:
            if used + needed_bytes <= self._max_bytes:
                return
            if self._evict(folder):
                used -= size
        if used + needed_bytes > self._max_bytes:
            logger.warning(
                "The adapter store %s outgrows its %d bytes: every adapter is in use; raise adapters.store_max_gib",
                self._folder,
                self._max_bytes,
            )

    def _evict(self, folder: Path) -> bool:
        descriptor = _lock_folder(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if descriptor is None:
            return False
        try:
            trash = self._folder / f"{_TRASH}{folder.name}-{os.getpid()}-{time.monotonic_ns()}"
            os.rename(folder, trash)  # whoever waits for the lock sees that the folder is gone
            shutil.rmtree(trash, ignore_errors=True)
        finally:
            os.close(descriptor)
        logger.info("Evicted adapter content %s from the store", folder.name)
        return True

    def _entries(self) -> list[tuple[float, int, Path]]:
        """(time of last use, bytes, folder) of each adapter."""
        entries = []
        for entry in os.scandir(self._folder):
            if DIGEST.fullmatch(entry.name):
                with suppress(FileNotFoundError):  # evicted by another process just now
                    entries.append((entry.stat().st_mtime, _folder_bytes(Path(entry.path)), Path(entry.path)))
        return entries

    def _clean_up(self) -> None:
        """Removes what crashed processes left behind."""
        for entry in os.scandir(self._folder):
            if not entry.name.startswith((_TEMP, _TRASH)):
                continue
            with suppress(FileNotFoundError):
                is_remote = DIGEST.fullmatch(entry.name.removeprefix(_TEMP))
                young_s = 0.0 if entry.name.startswith(_TRASH) else _PARTIAL_S if is_remote else _NEW_FOLDER_S
                if time.time() - entry.stat().st_mtime >= young_s:
                    _remove_unlocked(Path(entry.path))
        for note in os.scandir(self._folder / ".known"):
            with suppress(FileNotFoundError):
                if not (self._folder / Path(note.path).read_text().partition(" ")[0]).is_dir():
                    os.unlink(note.path)


def _check_digest(found: str, wanted: str | None, uri: str) -> None:
    if wanted is not None and found != wanted:
        raise AdapterChangedError(
            f"the adapter at {uri!r} is no longer the one that was loaded (its content changed): "
            "load it again with load_inplace to serve the new content"
        )


def content_digest(folder: Path) -> str:
    """Lower-case hex SHA-256 of the folder's ``packed`` content."""
    digest = hashlib.sha256()
    for chunk in packed(folder):
        digest.update(chunk)
    return digest.hexdigest()


def packed(folder: Path) -> Iterator[bytes]:
    """Length (8 bytes, little-endian) and bytes of CONFIG_FILE, then of WEIGHTS_FILE, in chunks."""
    for name in FILES:
        with open(folder / name, "rb") as file:
            yield os.fstat(file.fileno()).st_size.to_bytes(8, "little")
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk


def _lock_folder(folder: Path, operation: int) -> int | None:
    """An open descriptor of ``folder`` that holds the lock; None when it is gone, or (LOCK_NB) locked by others."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, operation)
        if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


@contextmanager
def _locked_file(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_unlocked(folder: Path) -> bool:
    """Whether nobody had it locked, so that it is gone now."""
    descriptor = _lock_folder(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if descriptor is None:
        return False
    shutil.rmtree(folder, ignore_errors=True)
    os.close(descriptor)
    return True


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    new = path.with_name(f"{path.name}.{os.getpid()}-{time.monotonic_ns()}")
    new.write_text(text)
    os.replace(new, path)


def _folder_bytes(folder: Path) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(folder))


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _store_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AdapterStoreError(
            f"the adapter store {folder} failed: {error.strerror or error}; check adapters.store_dir and its free space"
        ) from error
