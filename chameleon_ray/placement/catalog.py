"""Writes to the catalog: which content each adapter name stands for."""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Literal

import redis

from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.config import RedisConfig
from chameleon_ray.placement.connection import async_client
from chameleon_ray.placement.errors import AdapterUnknownError, CatalogConflictError, PlacementUnavailableError
from chameleon_ray.placement.keys import Keys
from chameleon_ray.placement.messages import GarbageError, decode_record
from chameleon_ray.placement.scripts import RESTORE_CATALOG, RESTORE_CHUNK, WRITE_CATALOG, restore_arguments
from chameleon_ray.placement.view import ClusterView

logger = logging.getLogger(__name__)

_Mode = Literal["add", "replace", "config", "refuse", "remove", "withdraw"]


class CatalogStore:
    """Asyncio client of the catalog; use each from one event loop.

    Versions grow over the whole catalog, so that the highest one tells how new a copy of it is. Every write is one
    atomic step in Redis together with its announcement. A Redis call takes at most ``timeout_s``; every method raises
    PlacementUnavailableError when Redis cannot be reached in that time or refuses.
    """

    def __init__(self, config: RedisConfig, memory: Callable[[], ClusterView] = ClusterView) -> None:
        """config: ``url`` must be set (ValueError). memory: the ``view`` of this process's follower; with it, a write
        that meets a store that lost records puts them back first, so that they cannot come back over it later."""
        self._keys = Keys(config.key_prefix)
        self._timeout_s = config.timeout_s
        self._memory = memory
        self._seen_version = 0
        self._client = async_client(config)
        self._write_script = self._client.register_script(WRITE_CATALOG)
        self._restore_script = self._client.register_script(RESTORE_CATALOG)

    async def put(self, record: AdapterRecord, *, replace: bool) -> AdapterRecord:
        """Write ``record`` under the next version and return it as written; its own ``version`` is ignored.

        Without ``replace``: CatalogConflictError when a live record of that name exists (whatever its content).
        A tombstone is no obstacle. ValueError for a tombstone: that is ``remove``.
        """
        return await self._put("replace" if replace else "add", record)

    async def put_config(self, record: AdapterRecord) -> AdapterRecord:
        """Offer a record found in the configured folder or list; returns what holds for the name afterwards.

        Written when the name is new, or when its record is a live one of origin "config" with another digest or uri, or
        checked against other rules. Not written, so that any number of processes may offer the same again and again:
        when these are the same (a different ``fingerprint`` alone changes nothing: nodes differ in it), when the name
        was loaded at run time, and when it was unloaded (the result is its tombstone, ``deleted``): the last word of an
        operator at run time holds until the next one. What was only withdrawn or refused comes back. ValueError unless
        ``record.origin`` is "config".
        """
        if record.origin != "config":
            raise ValueError(
                f"{record.name}: put_config takes records of origin 'config'; use put for {record.origin!r}"
            )
        return await self._put("config", record)

    async def remove(self, name: str) -> AdapterRecord:
        """Unload: replace the live record by a tombstone under the next version and return the tombstone.

        AdapterUnknownError when there is no live record of that name.
        """
        outcome, record = await self._write("remove", name, "")
        if outcome == "unknown" or record is None:
            raise AdapterUnknownError(f"no adapter is named {name!r}")
        return record

    async def withdraw(self, name: str) -> None:
        """Take a record of origin "config" out because its source has no such adapter any more; no other is touched.
        What was refused is just unknown then."""
        await self._write("withdraw", name, "")

    async def put_refused(self, record: AdapterRecord) -> None:
        """Say that a configured adapter is not served, and why. record: a tombstone with a ``refusal``.

        Not written when an operator's word at run time holds for the name, or while something is served under it,
        unless just that content is refused for good.
        """
        if record.refusal is None or not record.deleted or record.origin != "config":
            raise ValueError(f"{record.name}: put_refused takes tombstones of origin 'config' with a refusal")
        await self._write("refuse", record.name, record.model_dump_json())

    async def restore(self, records: Iterable[AdapterRecord]) -> int:
        """Put back each record (tombstones too) that the store lacks or has in a lower version; how many it took."""
        waiting = list(records)
        taken = 0
        for start in range(0, len(waiting), RESTORE_CHUNK):
            arguments = restore_arguments(self._keys, secrets.token_hex(8), waiting[start : start + RESTORE_CHUNK])
            async with self._bounded():
                taken += int(await self._restore_script(keys=self._catalog_keys(), args=arguments))
        return taken

    async def lookup(self, name: str) -> AdapterRecord | None:
        """The live record of that name straight from Redis (for a name the view does not have yet), or None."""
        async with self._bounded():
            stored = await self._client.hget(self._keys.catalog, name)
        if not isinstance(stored, bytes):
            return None
        try:
            record = decode_record(name.encode(), stored)
        except GarbageError as error:
            logger.error("ignored: %s", error)
            return None
        self._seen_version = max(self._seen_version, record.version)
        return None if record.deleted else record

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def _put(self, mode: _Mode, record: AdapterRecord) -> AdapterRecord:
        if record.deleted:
            raise ValueError(f"{record.name}: a tombstone is written by remove(), not put")
        outcome, stored = await self._write(mode, record.name, record.model_dump_json())
        if outcome == "conflict":
            raise CatalogConflictError(f"an adapter named {record.name!r} exists; unload it first or ask to replace it")
        assert stored is not None, outcome
        return stored

    async def _write(self, mode: _Mode, name: str, record_json: str) -> tuple[str, AdapterRecord | None]:
        outcome, stored = await self._run_write(mode, name, record_json, even_if_behind=False)
        if outcome == "behind":
            memory = self._memory()
            taken = await self.restore([*memory.catalog.values(), *memory.tombstones.values()])
            logger.warning("the catalog in Redis was older than ours: put back %d records before a write", taken)
            outcome, stored = await self._run_write(mode, name, record_json, even_if_behind=True)
        if not stored:
            return outcome, None
        try:
            record = decode_record(name.encode(), stored)
        except GarbageError as error:
            raise PlacementUnavailableError(f"Redis holds a catalog entry that is not ours: {error}") from None
        self._seen_version = max(self._seen_version, record.version)
        return outcome, record

    async def _run_write(self, mode: _Mode, name: str, record_json: str, *, even_if_behind: bool) -> tuple[str, bytes]:
        seen = max(self._seen_version, self._memory().catalog_version)
        force = "1" if even_if_behind else "0"
        async with self._bounded():
            # A server that hangs would carry out later what it is sent now, after the caller has heard that it failed.
            await self._client.ping()
            outcome, stored = await self._write_script(
                keys=self._catalog_keys(),
                args=[self._keys.changes, secrets.token_hex(8), mode, name, record_json, seen, force],
            )
        return outcome.decode(), stored

    def _catalog_keys(self) -> list[str]:
        return [self._keys.catalog, self._keys.catalog_head]

    @asynccontextmanager
    async def _bounded(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._timeout_s):
                yield
        except (redis.RedisError, OSError) as error:  # asyncio's TimeoutError is an OSError
            reason = str(error) or f"no answer within {self._timeout_s:g} s"
            raise PlacementUnavailableError(f"Redis is not available: {reason}") from error
