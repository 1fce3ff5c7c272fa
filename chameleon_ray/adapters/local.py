"""The adapters of one replica: brought here once for all who wait, held while in use, refused after failing."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Set
from contextlib import ExitStack, asynccontextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from chameleon_ray.adapters.catalog import AdapterLibrary
from chameleon_ray.adapters.errors import AdapterError, AdapterNoRoomError, AdapterRetryLaterError
from chameleon_ray.adapters.fetch_pool import FetchPool
from chameleon_ray.adapters.record import AdapterRecord

logger = logging.getLogger(__name__)

UNUSED_S = 2.0
"""After its last use an adapter is held so long: rarely does it take the catalog longer to name one that was tried."""

Accept = Callable[[AdapterRecord, Path], Awaitable[None]]
"""Has the engine try the adapter's files; raises AdapterError when it cannot serve them."""


@dataclass(slots=True)
class _Entry:
    bringing: asyncio.Task[Path]
    hold: ExitStack
    used_at_s: float
    users: int = 0


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why the node or its engine cannot serve an adapter. retry_at_s: None for what time cannot change."""

    error: AdapterError
    retry_at_s: float | None


@dataclass(slots=True)
class LocalAdapters:
    """Use from one event loop.

    library: does the blocking work, in threads: ``fetches`` for what is not on this node yet, so that slow sources
    never delay adapters that are. accept: the engine's say. retry_after_s: pause after a failure. clock: seconds.
    """

    library: AdapterLibrary
    accept: Accept
    retry_after_s: float
    fetches: FetchPool
    clock: Callable[[], float]
    _entries: dict[str, _Entry] = field(default_factory=dict)
    _failures: dict[str, _Failure] = field(default_factory=dict)

    @asynccontextmanager
    async def use(self, record: AdapterRecord) -> AsyncIterator[Path]:
        """The adapter's folder, which stays in place until the block ends.

        Raises AdapterError. An adapter that failed is refused with AdapterRetryLaterError for ``retry_after_s``; with
        its error, and for good, where time cannot change that.
        """
        self._refuse_failed(record)
        entry = self._entries.get(record.digest)
        if entry is None:
            hold = ExitStack()
            entry = _Entry(asyncio.create_task(self._bring(record, hold)), hold, self.clock())
            self._entries[record.digest] = entry
        entry.users += 1
        try:
            yield await asyncio.shield(entry.bringing)
        finally:
            entry.users -= 1
            entry.used_at_s = self.clock()

    @property
    def held(self) -> Set[str]:
        """Digests of the adapters that are in use, or were a moment ago."""
        return self._entries.keys()

    def note_failure(self, record: AdapterRecord, error: AdapterError) -> None:
        """A request for the adapter was refused with ``error``: of the engine, or of ``use``."""
        if isinstance(error, AdapterNoRoomError):
            return  # It is the request that is too large beside the adapter.
        now_s = self.clock()
        if isinstance(error, AdapterRetryLaterError):
            self._failures[record.digest] = _Failure(error.failure, now_s + error.retry_after_s)
        else:
            self._failures[record.digest] = _Failure(error, None if error.is_permanent else now_s + self.retry_after_s)

    def forget_failure(self, digest: str) -> None:
        """Let the adapter be tried again at once (somebody asked for just that)."""
        self._failures.pop(digest, None)

    def failures(self) -> Mapping[str, str]:
        """Adapter digest -> why it is refused at the moment."""
        now_s = self.clock()
        self._failures = {
            digest: one for digest, one in self._failures.items() if one.retry_at_s is None or one.retry_at_s > now_s
        }
        return {digest: str(one.error) for digest, one in self._failures.items()}

    def sweep(self, named: Set[str], in_memory: Set[str]) -> None:
        """Let go of adapters that nobody has used for ``UNUSED_S``, so that the store may evict their files.

        named: digests in the catalog; what was found of others that are not held is forgotten. in_memory: digests of
        adapters that the engine has in memory: the files of named ones stay, so that no request has to fetch them.
        """
        before_s = self.clock() - UNUSED_S
        for digest, entry in list(self._entries.items()):
            is_idle = entry.users == 0 and entry.used_at_s <= before_s and entry.bringing.done()
            if is_idle and not (digest in named and digest in in_memory):
                del self._entries[digest]
                entry.hold.close()
        self._failures = {digest: one for digest, one in self._failures.items() if digest in named}
        self.library.forget_others(named | self.held)

    async def close(self) -> None:
        """Let go of everything."""
        for entry in self._entries.values():
            entry.bringing.cancel()
        await asyncio.gather(*(entry.bringing for entry in self._entries.values()), return_exceptions=True)
        for entry in self._entries.values():
            entry.hold.close()
        self._entries.clear()
        self.fetches.close()

    def _refuse_failed(self, record: AdapterRecord) -> None:
        failure = self._failures.get(record.digest)
        if failure is None:
            return
        if failure.retry_at_s is None:
            raise copy(failure.error)  # Else each request would add to one error's traceback.
        left_s = failure.retry_at_s - self.clock()
        if left_s > 0:
            raise AdapterRetryLaterError(failure.error, left_s)
        del self._failures[record.digest]

    async def _bring(self, record: AdapterRecord, hold: ExitStack) -> Path:
        loop = asyncio.get_running_loop()
        try:
            bring = partial(hold.enter_context, self.library.use(record))
            if await loop.run_in_executor(None, self.library.holds, record.digest):
                folder = await loop.run_in_executor(None, bring)
            else:
                folder = await self.fetches.run(self.library.tenant(record.uri, record.credentials), bring)
            await self.accept(record, folder)
            return folder
        except BaseException as error:
            self._entries.pop(record.digest, None)
            hold.close()
            if isinstance(error, AdapterError):
                self.note_failure(record, error)
                logger.warning("Adapter %s (%s) cannot be served here: %s", record.name, record.id.short, error)
            raise
