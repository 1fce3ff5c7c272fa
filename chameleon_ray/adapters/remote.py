"""Adapters in buckets and hubs: which URIs there are, and a download that survives what networks do.

A file comes in parts, each tried again by itself: from one answer as long as that is fast, else several at once. They
are appended in order, so that a file's length is how far it has come and a later attempt goes on from there. Sizes are
known and checked before anything is read, and a server that sends more than it was asked for is not listened to. Both
files carry a tag (ETag, generation, commit) that is looked at before, and with every answer or afterwards: a change in
between starts the fetch again.
"""

import logging
import os
import random
import re
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from chameleon_ray.adapters.errors import (
    AdapterChangedError,
    AdapterDeniedError,
    AdapterError,
    AdapterInvalidError,
    AdapterNotFoundError,
    AdapterSourceError,
)
from chameleon_ray.adapters.sources import CONFIG_FILE, MAX_CONFIG_BYTES, WEIGHTS_FILE, shown, too_large

logger = logging.getLogger(__name__)

PART_BYTES = 8 << 20
_PARTS_AT_ONCE = 4
_FAST_BYTES_S = 64 << 20
"""One answer that comes faster is not helped by others beside it."""
_JUDGED_PARTS = 2
"""After so many it is told how fast an answer comes: the first part may be slow alone."""
_FETCHES = 3
"""How often a fetch begins anew because the files changed meanwhile."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
_MARK_FILE = ".mark"
"""Beside partial files: what they are a part of."""

_URI = re.compile(r"(s3|gs|az|hf)://([A-Za-z0-9][\w.-]*)/([\w./=+-]+)(?:@([\w./-]+))?")
_ARCHIVE = re.compile(r"\.(zip|tar|t?gz|tgz|bz2|xz|zst|7z|rar)$", re.IGNORECASE)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RemoteUri:
    """``scheme://place/path[@revision]``. place: a bucket, a container or the hub's organisation."""

    scheme: str
    place: str
    path: str
    revision: str | None

    @classmethod
    def parse(cls, uri: str) -> "RemoteUri":
        """AdapterInvalidError for everything that could mean another place than it seems to. No message repeats what
        may be a password."""
        authority = uri.partition("://")[2].partition("/")[0]
        if "@" in authority or ":" in authority:
            raise AdapterInvalidError("a URI takes no credentials and no port: name an entry of adapters.credentials")
        match = _URI.fullmatch(uri)
        if match is None:
            raise AdapterInvalidError(
                f"{shown(uri)!r}: write scheme://bucket/path or hf://org/name[@revision] in letters, digits and "
                "._=+-/, nothing percent-encoded, no query"
            )
        scheme, place, path, revision = match.groups()
        segments = path.removesuffix("/").split("/")
        if any(segment in ("", ".", "..") for segment in (*segments, *(revision or "-").split("/"))):
            raise AdapterInvalidError(f"{uri!r}: no segment of it may be empty, '.' or '..'")
        if _ARCHIVE.search(segments[-1]):
            raise AdapterInvalidError(f"{uri!r} is an archive: give the folder with the adapter's two files")
        if (scheme == "hf") != (len(segments) == 1 and scheme == "hf") or (revision and scheme != "hf"):
            raise AdapterInvalidError(f"{uri!r}: only hf://org/name takes a @revision, and it takes no more than that")
        return cls(scheme, place, "/".join(segments), revision)


@dataclass(frozen=True, slots=True)
class FileMark:
    """One version of a remote file. tag: changes with the content. link: where to read it, if that is not its name."""

    size_bytes: int
    tag: str
    link: str = ""


class RemoteStream(Protocol):
    """One answer, being read."""

    def read(self, num_bytes: int) -> bytes:
        """The next bytes, all of them. Raises as RemoteFiles."""

    def close(self) -> None:
        """The rest is not wanted."""


class RemoteFiles(Protocol):
    """The files of one adapter. tells_changes: whatever is read of a file that is not the mark's any more raises
    AdapterChangedError. All methods block and raise FileNotFoundError, PermissionError, an AdapterError for
    good, and anything else for what may be better the next time."""

    @property
    def tells_changes(self) -> bool: ...

    def stat(self, name: str) -> FileMark: ...

    def read(self, name: str, mark: FileMark, start: int, end: int) -> bytes:
        """The bytes from ``start`` up to ``end``; more or fewer are taken for a fault."""

    def stream(self, name: str, mark: FileMark, start: int, end: int) -> RemoteStream | None:
        """The same to be read piece by piece; None where that is not to be had."""


@dataclass(slots=True)
class RemoteSource:
    """An ``AdapterSource`` for one URI that an operator's rule allows.

    place: identifies the server beside the URI. attempts: of each request. sleep, rng: for the pauses between them.
    """

    uri: str
    place: str
    open_files: Callable[[], RemoteFiles]
    attempts: int
    sleep: Callable[[float], None] = time.sleep
    rng: Callable[[], float] = random.random

    @property
    def remembered_as(self) -> str:
        """See AdapterSource."""
        return f"{self.place}|{self.uri}"

    def fingerprint(self, uri: str) -> str:
        """The tags of both files."""
        return _mark_of(*self._stat_both(self._files()))

    def fetch(self, uri: str, into: Path, *, max_bytes: int) -> str:
        """See AdapterSource; goes on with what an earlier fetch of the same version has left in ``into``."""
        files = self._files()
        config, weights = self._stat_both(files)
        for _ in range(_FETCHES):
            if config.size_bytes > MAX_CONFIG_BYTES:
                raise too_large(CONFIG_FILE, self.uri, MAX_CONFIG_BYTES)
            if weights.size_bytes > max_bytes:
                raise too_large(WEIGHTS_FILE, self.uri, max_bytes)
            mark = _mark_of(config, weights)
            _go_on_or_begin(into, mark)
            with suppress(AdapterChangedError):
                _of_both(
                    partial(self._download, files, CONFIG_FILE, config, into),
                    partial(self._download, files, WEIGHTS_FILE, weights, into),
                )
                if files.tells_changes or _mark_of(*self._stat_both(files)) == mark:
                    (into / _MARK_FILE).unlink()
                    return mark
            config, weights = self._stat_both(files)
            logger.info("%s changed while it was read; reading it again", self.uri)
        raise AdapterChangedError(f"the files at {self.uri!r} keep changing: load it when they are complete")

    def _files(self) -> RemoteFiles:
        return self._tried("", self.open_files)

    def _stat_both(self, files: RemoteFiles) -> tuple[FileMark, FileMark]:
        return _of_both(
            lambda: self._tried(CONFIG_FILE, lambda: files.stat(CONFIG_FILE)),
            lambda: self._tried(WEIGHTS_FILE, lambda: files.stat(WEIGHTS_FILE)),
        )

    def _download(self, files: RemoteFiles, name: str, mark: FileMark, into: Path) -> None:
        def part(start: int) -> bytes:
            end = min(start + PART_BYTES, mark.size_bytes)
            return self._tried(name, lambda: _exactly(end - start, files.read(name, mark, start, end)))

        with open(into / name, "ab") as out:
            starts = range(out.tell(), mark.size_bytes, PART_BYTES)
            if len(starts) > 1:
                self._stream(files, name, mark, out)
                starts = range(out.tell(), mark.size_bytes, PART_BYTES)
            if len(starts) < 2:
                out.write(b"".join(map(part, starts)))
            else:
                with ThreadPoolExecutor(_PARTS_AT_ONCE, thread_name_prefix="part") as pool:
                    try:
                        coming: deque[Future[bytes]] = deque()
                        for start in starts:
                            coming.append(pool.submit(part, start))
                            if len(coming) == _PARTS_AT_ONCE:
                                out.write(coming.popleft().result())
                        while coming:
                            out.write(coming.popleft().result())
                    finally:
                        pool.shutdown(wait=False, cancel_futures=True)
            out.flush()
            os.fsync(out.fileno())

    def _stream(self, files: RemoteFiles, name: str, mark: FileMark, out: BinaryIO) -> None:
        """Append parts from one answer while they come fast, opening another where one fails."""
        size = mark.size_bytes
        stream: RemoteStream | None = None
        body_s, num_read = 0.0, 0

        def part() -> bytes:
            nonlocal stream, body_s, num_read
            start = out.tell()
            stream = stream or files.stream(name, mark, start, size)
            if stream is None:
                return b""
            began_s = time.monotonic()  # What a server takes before it begins is not the way's speed.
            try:
                content = stream.read(min(PART_BYTES, size - start))
            except BaseException:
                stream.close()
                stream = None
                raise
            body_s += time.monotonic() - began_s
            num_read += len(content)
            return content

        try:
            while out.tell() < size:
                content = self._tried(name, part)
                out.write(content)
                if stream is None or (num_read >= _JUDGED_PARTS * PART_BYTES and num_read <= body_s * _FAST_BYTES_S):
                    return
        finally:
            if stream is not None:
                stream.close()

    def _tried(self, name: str, work: Callable[[], _T]) -> _T:
        """What ``work`` returns, after up to ``attempts``. Only an error's kind gets into messages and logs: its text
        is the server's, and may repeat what was sent."""
        for attempt in range(1, self.attempts + 1):
            try:
                return work()
            except AdapterError:
                raise
            except FileNotFoundError:
                if name == WEIGHTS_FILE:
                    raise AdapterInvalidError(
                        f"{self.uri!r}: there is no {name}; only safetensors is accepted, no pickles"
                    ) from None
                raise AdapterNotFoundError(f"{self.uri!r}: there is no {name or 'such adapter'}") from None
            except PermissionError:
                raise AdapterDeniedError(
                    f"{self.uri!r}: the source refused the credentials: check the rule's entry of adapters.credentials"
                ) from None
            except Exception as error:
                kind = type(error).__name__
                logger.info("%s %s, attempt %d of %d: %s", self.uri, name, attempt, self.attempts, kind)
            if attempt < self.attempts:
                self.sleep(min(_FIRST_PAUSE_S * 2 ** (attempt - 1), _LONGEST_PAUSE_S) * (0.5 + self.rng() / 2))
        raise AdapterSourceError(f"{self.uri!r} cannot be read after {self.attempts} attempts: {kind}")


def _of_both(config: Callable[[], _T], weights: Callable[[], _T]) -> tuple[_T, _T]:
    """What each returns, done at the same time. Errors of the configuration come first."""
    with ThreadPoolExecutor(1, thread_name_prefix="weights") as other:
        coming = other.submit(weights)
        return config(), coming.result()


def _mark_of(config: FileMark, weights: FileMark) -> str:
    return ":".join(f"{mark.size_bytes}-{mark.tag}" for mark in (config, weights))


def _go_on_or_begin(into: Path, mark: str) -> None:
    """Partial files stay only if they are of the same version."""
    note = into / _MARK_FILE
    if not note.exists() or note.read_text() != mark:
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            (into / name).unlink(missing_ok=True)
        note.write_text(mark)


def _exactly(num_bytes: int, content: bytes) -> bytes:
    if len(content) != num_bytes:
        raise EOFError(f"{len(content)} bytes instead of {num_bytes}")
    return content
