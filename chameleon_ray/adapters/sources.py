"""Where adapters come from: what a source is, and local folders. ``access.py`` chooses the source for a URI.

Local files are read only inside the allowed roots. Paths are checked twice: resolved before anything is opened, so
that a path outside tells nothing about what is there, and again on the open file descriptor, so that a symlink that
changes in between cannot lead outside.
"""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from chameleon_ray.adapters.errors import (
    AdapterChangedError,
    AdapterInvalidError,
    AdapterNotFoundError,
    AdapterPathNotAllowedError,
    AdapterSourceError,
    AdapterStoreError,
    AdapterTooLargeError,
)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FILES = (CONFIG_FILE, WEIGHTS_FILE)
MAX_CONFIG_BYTES = 1 << 20

_PICKLED_FILES = ("adapter_model.bin", "adapter_model.pt")
_CHUNK_BYTES = 4 << 20
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_ABSENT = (FileNotFoundError, NotADirectoryError)


class AdapterSource(Protocol):
    """A kind of place that holds adapters in PEFT layout. All methods block and raise AdapterError."""

    @property
    def remembered_as(self) -> str | None:
        """What the store may know it by: an equal ``fingerprint`` then means equal content, and what a failed fetch
        leaves in its folder is the beginning for the next. None: neither holds."""

    def fingerprint(self, uri: str) -> str:
        """A mark that changes when the files change, without reading them."""

    def fetch(self, uri: str, into: Path, *, max_bytes: int) -> str:
        """Copies CONFIG_FILE and WEIGHTS_FILE, nothing else, into the existing folder ``into``; the fingerprint of what
        it copied.

        AdapterTooLargeError when the weights have more than ``max_bytes``, AdapterChangedError when the files changed
        while they were read.
        """


class LocalSource:
    """Plain paths and ``file://`` URIs, inside ``allowed_roots`` only."""

    remembered_as = None

    def __init__(self, allowed_roots: Sequence[Path]) -> None:
        self._roots = tuple(os.path.realpath(root) for root in allowed_roots)

    def fingerprint(self, uri: str) -> str:
        """Sizes and modification times of both files."""
        marks = []
        with self._open_folder(uri) as folder:
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                with self._open_file(folder, name, uri) as file:
                    status = os.fstat(file)
                    marks.append(f"{status.st_size}-{status.st_mtime_ns}")
        return ":".join(marks)

    def fetch(self, uri: str, into: Path, *, max_bytes: int) -> str:
        """See AdapterSource."""
        mark = self.fingerprint(uri)
        with self._open_folder(uri) as folder:
            for name, limit in ((CONFIG_FILE, MAX_CONFIG_BYTES), (WEIGHTS_FILE, max_bytes)):
                with self._open_file(folder, name, uri) as file:
                    _copy(file, into / name, limit, uri)
        if self.fingerprint(uri) != mark:  # what was read may be half old, half new
            raise AdapterChangedError(
                f"the files at {uri!r} changed while they were read: load it again when they are complete"
            )
        return mark

    def _resolve(self, uri: str) -> str:
        path = local_path(uri)
        try:
            if os.path.isabs(path):
                return self._check_inside(os.path.realpath(path), uri)
            for root in self._roots:
                candidate = self._check_inside(os.path.realpath(os.path.join(root, path)), uri)
                if os.path.isdir(candidate):
                    return candidate
        except ValueError:  # an embedded null byte
            raise AdapterNotFoundError(f"{uri!r} is not a path") from None
        raise AdapterNotFoundError(
            f"no folder {uri!r} inside the allowed roots: give the adapter's absolute path or file:// URI"
        )

    def _check_inside(self, path: str, uri: str) -> str:
        for root in self._roots:
            if path == root or path.startswith(root.rstrip("/") + "/"):
                return path
        raise AdapterPathNotAllowedError(
            f"{uri!r} leads outside the folders that adapters may come from: move the adapter into one of them, "
            "or add its real folder (symlinks resolved) to adapters.allowed_roots"
        )

    @contextmanager
    def _open_folder(self, uri: str) -> Iterator[int]:
        try:
            descriptor = self._open(self._resolve(uri), os.O_DIRECTORY, None, uri)
        except _ABSENT:
            raise AdapterNotFoundError(f"{uri!r}: there is no such folder") from None
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def _open_file(self, folder: int, name: str, uri: str) -> Iterator[int]:
        try:
            descriptor = self._open(name, os.O_NONBLOCK, folder, uri)  # non-blocking: a FIFO must not make it wait
        except _ABSENT:
            raise AdapterInvalidError(f"{uri!r}: {_explain_missing(folder, name)}") from None
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise AdapterInvalidError(f"{uri!r}: {name} is not a regular file")
            yield descriptor
        finally:
            os.close(descriptor)

    def _open(self, path: str, flags: int, folder: int | None, uri: str) -> int:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags, dir_fd=folder)
        except _ABSENT:
            raise
        except OSError as error:
            raise AdapterSourceError(f"{uri!r} cannot be read: {error.strerror}") from None
        try:
            self._check_inside(os.readlink(f"/proc/self/fd/{descriptor}"), uri)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def scheme_of(uri: str) -> str:
    """The URI's scheme in lower case; "" for a plain path."""
    match = _SCHEME.match(uri)
    return match.group(1).lower() if match else ""


def shown(uri: str) -> str:
    """A URI for messages, without what may be secret in it: user, password, query."""
    return re.sub(r"//[^/]*@", "//…@", uri).partition("?")[0]


def local_path(uri: str) -> str:
    """The path in a plain path or ``file://`` URI. AdapterInvalidError when the URI is malformed."""
    if not _SCHEME.match(uri):
        return uri
    try:
        parts = urlsplit(uri)
    except ValueError:
        raise AdapterInvalidError(f"{uri!r} is not a URI") from None
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise AdapterInvalidError(f"{uri!r}: write file:///absolute/path (special characters percent-encoded)")
    return unquote(parts.path)


def _explain_missing(folder: int, name: str) -> str:
    if name == WEIGHTS_FILE:
        for pickled in _PICKLED_FILES:
            if os.path.lexists(f"/proc/self/fd/{folder}/{pickled}"):
                return (
                    f"{pickled} is a pickle, which can run code when it is read; only safetensors is accepted: "
                    "save the adapter again with PEFT's save_pretrained(..., safe_serialization=True)"
                )
    return f"there is no {name} in this folder"


def too_large(name: str, uri: str, max_bytes: int) -> AdapterTooLargeError:
    """One of an adapter's files is over its bound."""
    bound = "" if name == CONFIG_FILE else "; the bound is adapters.max_adapter_mib"
    return AdapterTooLargeError(f"{name} of {uri!r} has more than {max_bytes} bytes{bound}")


def _copy(source: int, target: Path, max_bytes: int, uri: str) -> None:
    copied = 0
    try:
        with open(target, "xb") as out:
            while chunk := _read(source, uri):
                copied += len(chunk)
                if copied > max_bytes:
                    raise too_large(target.name, uri, max_bytes)
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise AdapterStoreError(f"cannot write {target}: {error.strerror}; check adapters.store_dir") from error


def _read(source: int, uri: str) -> bytes:
    try:
        return os.read(source, _CHUNK_BYTES)
    except OSError as error:
        raise AdapterSourceError(f"{uri!r} cannot be read: {error.strerror}") from error
