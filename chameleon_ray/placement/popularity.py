"""How often each adapter is asked for, over all replicas, as replicas to come are to know it."""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import redis

from chameleon_ray.config import RedisConfig
from chameleon_ray.placement.connection import async_client
from chameleon_ray.placement.keys import Keys
from chameleon_ray.placement.scripts import COUNT_USES

logger = logging.getLogger(__name__)

HALVED_AT = 100_000
"""After so many uses all counts are halved: what was popular long ago gives way, as fast as there is traffic."""
MAX_ADAPTERS = 10_000
"""So many are remembered, those asked for most."""


class Popularity:
    """Asyncio client of the counts; use each from one event loop. Redis gone is logged and never raised."""

    def __init__(self, config: RedisConfig, *, halved_at: int = HALVED_AT, max_adapters: int = MAX_ADAPTERS) -> None:
        """config: ``url`` must be set (ValueError)."""
        keys = Keys(config.key_prefix)
        self._keys = [keys.popularity, keys.popularity_total]
        self._bounds = [halved_at, max_adapters]
        self._timeout_s = config.timeout_s
        self._client = async_client(config)
        self._count_script = self._client.register_script(COUNT_USES)
        self._pending: Counter[str] = Counter()

    async def add(self, uses: Mapping[str, int]) -> None:
        """Count requests by adapter digest; what Redis did not take goes with the next call that has any."""
        if not uses:
            return
        self._pending.update(uses)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._count_script(keys=self._keys, args=[json.dumps(self._pending), *self._bounds])
            self._pending.clear()
        except (redis.RedisError, OSError) as error:  # asyncio's TimeoutError is an OSError
            logger.info(
                "uses of %d adapters are not counted yet: %s", len(self._pending), error or type(error).__name__
            )

    async def counts(self) -> dict[str, float]:
        """Adapter digest -> uses, the older ones by a part only; nothing while Redis is away."""
        try:
            async with asyncio.timeout(self._timeout_s):
                stored: Any = await self._client.zrange(self._keys[0], 0, -1, withscores=True)
        except (redis.RedisError, OSError) as error:
            logger.warning("which adapters are popular is not known: %s", error or type(error).__name__)
            return {}
        return {digest.decode(): uses for digest, uses in stored}

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()
