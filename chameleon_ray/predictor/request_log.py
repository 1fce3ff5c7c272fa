"""Requests on record: one JSON line per ended output, written by replicas and read by ``chameleon train-predictor``.

The lines contain prompts. Files and folder are readable by their owner only.
"""

import logging
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from chameleon_ray.predictor.errors import PredictorError

logger = logging.getLogger("ray.serve")

NUM_FILES = 8
"""The bound on the folder is spread over so many files; the oldest leave."""

_QUEUE_LIMIT = 4096


class LoggedRequest(BaseModel):
    """One line. finish_reason ``stop``: it ended by itself; ``length``: max_tokens or the context window ended it."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    time_s: float = Field(description="end, seconds since 1970")
    adapter: str | None = Field(description="adapter's name and digest; null: base model")
    prompt: str = Field(description="the text the engine got; of long ones the first and last 4,096 characters")
    prompt_tokens: int = Field(ge=0)
    max_tokens: int | None = Field(ge=1)
    output_tokens: int = Field(ge=0)
    finish_reason: str | None = Field(description="vLLM's: stop, length, abort, error")


class RequestLogWriter:
    """Appends to ``requests-<name>-<n>.jsonl`` in a folder from a thread of its own; ``write`` never waits.

    max_bytes bounds the ``requests-*.jsonl`` files of the whole folder, which several replicas of a node share.
    """

    def __init__(self, folder: Path, name: str, max_bytes: int) -> None:
        """Raises PredictorError when nothing can be written there."""
        self._folder = folder.expanduser()
        self._name = name
        self._file_bytes = max(1, max_bytes // NUM_FILES)
        self._max_bytes = max_bytes
        self._number = 0
        self._num_dropped = 0
        self._entries: queue.Queue[LoggedRequest | None] = queue.Queue(_QUEUE_LIMIT)
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file = self._open()
        except OSError as error:
            raise PredictorError(f"replicas.request_log: {self._folder} cannot be written: {error}") from error
        self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)
        self._thread.start()

    @property
    def num_dropped(self) -> int:
        """Requests that were not written: the disk was too slow, or refused."""
        return self._num_dropped

    def write(self, entry: LoggedRequest) -> None:
        """Queue one line; it is dropped when the disk is thousands of lines behind."""
        try:
            self._entries.put_nowait(entry)
        except queue.Full:
            self._num_dropped += 1

    def close(self) -> None:
        """Write what is queued and end the thread."""
        self._entries.put(None)
        self._thread.join()
        self._file.close()

    def _run(self) -> None:
        while (entry := self._entries.get()) is not None:
            try:
                self._append(entry.model_dump_json() + "\n")
            except OSError as error:
                if self._num_dropped == 0:
                    logger.warning("the request log loses lines: %s", error)
                self._num_dropped += 1

    def _append(self, line: str) -> None:
        if self._file.tell() >= self._file_bytes:
            self._number += 1
            following = self._open()
            self._file.close()
            self._file = following
        self._file.write(line.encode())
        if self._entries.empty():
            self._file.flush()

    def _open(self) -> IO[bytes]:
        """The next file; makes room for it first."""
        path = self._folder / f"requests-{self._name}-{self._number}.jsonl"
        sizes = {old: _age_and_size(old) for old in self._folder.glob("requests-*.jsonl") if old.is_file()}
        total = sum(size for _, size in sizes.values())
        for old in sorted(sizes, key=lambda old: sizes[old][0]):
            if total + self._file_bytes <= self._max_bytes:
                break
            old.unlink(missing_ok=True)
            total -= sizes[old][1]
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab")


def read_request_logs(paths: Iterable[Path]) -> list[LoggedRequest]:
    """All lines of files, and of the ``*.jsonl`` in folders, by time. Raises PredictorError naming file and line.

    A last line without its end, as a killed replica leaves, is left out.
    """
    entries = [entry for path in paths for file in _files(path) for entry in _read(file)]
    return sorted(entries, key=lambda entry: entry.time_s)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        if not (found := sorted(path.glob("*.jsonl"))):
            raise PredictorError(f"{path}: no *.jsonl files in this folder")
        return found
    if not path.is_file():
        raise PredictorError(f"{path}: no such file; replicas write logs where replicas.request_log says")
    return [path]


def _read(file: Path) -> Iterator[LoggedRequest]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield LoggedRequest.model_validate_json(line)
            except ValidationError as error:
                if not line.endswith(b"\n"):
                    return
                problems = "; ".join(
                    f"{'.'.join(map(str, problem['loc'])) or 'line'}: {problem['msg']}" for problem in error.errors()
                )
                raise PredictorError(f"{file}:{number}: not a logged request: {problems}") from None


def _age_and_size(path: Path) -> tuple[float, int]:
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0.0, 0
    return status.st_mtime, status.st_size
