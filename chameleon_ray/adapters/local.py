"""The adapters of one replica: brought here once for all who wait, held while in use, refused after failing."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from chameleon_ray.adapters.catalog import AdapterLibrary
from chameleon_ray.adapters.errors import AdapterError, AdapterRetryLaterError
from chameleon_ray.adapters.record import AdapterRecord

logger = logging.getLogger(__name__)

Accept = Callable[[AdapterRecord, Path], Awaitable[None]]
"""Has the engine try the adapter's files; raises AdapterError when it cannot serve them."""


@dataclass(slots=True)
class _Entry:
    bringing: asyncio.Task[Path]
    hold: ExitStack
    users: int = 0
    used_since_sweep: bool = True


@dataclass(frozen=True, slots=True)
class _Failure:
    error: AdapterError
    retry_at_s: float


@dataclass(slots=True)
class LocalAdapters:
    """Use from one event loop.

    library: does the blocking work, in threads: ``fetches`` for what is not on this node yet, so that slow sources
    never delay adapters that are. accept: the engine's say. retry_after_s: pause after a failure. clock: seconds.
    """

    library: AdapterLibrary
    accept: Accept
    retry_after_s: float
    fetches: ThreadPoolExecutor
    clock: Callable[[], float]
    _entries: dict[str, _Entry] = field(default_factory=dict)
    _failures: dict[str, _Failure] = field(default_factory=dict)

    @asynccontextmanager
    async def use(self, record: AdapterRecord) -> AsyncIterator[Path]:
        """The adapter's folder, which stays in place until the block ends.

        Raises AdapterError; an adapter that failed is refused with AdapterRetryLaterError for ``retry_after_s``.
        """
        entry = self._entries.get(record.digest)
        if entry is None:
            self._refuse_failed(record)
            hold = ExitStack()
            entry = _Entry(asyncio.create_task(self._bring(record, hold)), hold)
            self._entries[record.digest] = entry
        entry.users += 1
        entry.used_since_sweep = True
        try:
            yield await asyncio.shield(entry.bringing)
        finally:
            entry.users -= 1

    def forget_failure(self, digest: str) -> None:
        """Let the adapter be tried again at once (somebody asked for just that)."""
        self._failures.pop(digest, None)

    def failures(self) -> Mapping[str, str]:
        """Adapter digest -> why it is refused at the moment."""
        now_s = self.clock()
        self._failures = {digest: one for digest, one in self._failures.items() if one.retry_at_s > now_s}
        return {digest: str(one.error) for digest, one in self._failures.items()}

    def sweep(self) -> None:
        """Let go of adapters that nobody has used since the last sweep, so that the store may evict their files."""
        for digest, entry in list(self._entries.items()):
            if entry.users == 0 and not entry.used_since_sweep and entry.bringing.done():
                del self._entries[digest]
                entry.hold.close()
            entry.used_since_sweep = False

    async def close(self) -> None:
        """Let go of everything."""
        for entry in self._entries.values():
            entry.bringing.cancel()
        await asyncio.gather(*(entry.bringing for entry in self._entries.values()), return_exceptions=True)
        for entry in self._entries.values():
            entry.hold.close()
        self._entries.clear()
        self.fetches.shutdown(wait=False, cancel_futures=True)

    def _refuse_failed(self, record: AdapterRecord) -> None:
        failure = self._failures.get(record.digest)
        if failure is None:
            return
        left_s = failure.retry_at_s - self.clock()
        if left_s > 0:
            raise AdapterRetryLaterError(failure.error, left_s)
        del self._failures[record.digest]

    async def _bring(self, record: AdapterRecord, hold: ExitStack) -> Path:
        loop = asyncio.get_running_loop()
        try:
            here = await loop.run_in_executor(None, self.library.holds, record.digest)
            threads = None if here else self.fetches
            folder = await loop.run_in_executor(threads, hold.enter_context, self.library.use(record))
            await self.accept(record, folder)
            return folder
        except BaseException as error:
            self._entries.pop(record.digest, None)
            hold.close()
            if isinstance(error, AdapterError):
                self._failures[record.digest] = _Failure(error, self.clock() + self.retry_after_s)
                logger.warning("Adapter %s (%s) cannot be served here: %s", record.name, record.id.short, error)
            raise
