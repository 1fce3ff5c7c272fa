"""Writes to the catalog: which content each adapter name stands for."""

from collections.abc import Callable, Iterable

from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.config import RedisConfig
from chameleon_ray.placement.view import ClusterView


class CatalogStore:
    """Asyncio client of the catalog; use each from one event loop. Every call takes at most ``timeout_s`` per Redis
    call and raises PlacementUnavailableError when Redis cannot be reached or refuses."""

    def __init__(self, config: RedisConfig, memory: Callable[[], ClusterView] | None = None) -> None:
        """config: ``url`` must be set (ValueError). memory: the process's follower's ``view``; with it, a write that
        finds a store that lost records puts them back first, so that it cannot be overtaken by them later."""
        raise NotImplementedError

    async def put(self, record: AdapterRecord, *, replace: bool) -> AdapterRecord:
        """Write ``record`` under the next version and return it as written; its own ``version`` is ignored.

        Without ``replace``: CatalogConflictError when a live record of that name exists (whatever its content).
        """
        raise NotImplementedError

    async def put_config(self, record: AdapterRecord) -> AdapterRecord:
        """Write a record found in the configuration; returns what holds for the name afterwards."""
        raise NotImplementedError

    async def remove(self, name: str) -> AdapterRecord:
        """Unload: replace the live record by a tombstone under the next version and return the tombstone.

        AdapterUnknownError when there is no live record of that name.
        """
        raise NotImplementedError

    async def restore(self, records: Iterable[AdapterRecord]) -> int:
        """Put back each record (tombstones too) that the store lacks or has in a lower version; how many it took."""
        raise NotImplementedError

    async def lookup(self, name: str) -> AdapterRecord | None:
        """The live record of that name straight from Redis (for a name the view does not have yet), or None."""
        raise NotImplementedError

    async def close(self) -> None:
        """Close all connections."""
        raise NotImplementedError
