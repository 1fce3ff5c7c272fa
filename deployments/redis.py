"""The bundled Redis server as part of the application, where no ``redis.url`` is given."""

import asyncio
import logging

from chameleon_ray.redis_server import BundledRedis

logger = logging.getLogger("ray.serve")


class Redis:
    """Runs the server on the head's loopback and starts it again, empty, should it die."""

    def __init__(self, port: int):
        self._server = BundledRedis(port).start()
        logger.warning(
            "no redis.url is configured: using the bundled Redis server at %s (one machine, local development only)",
            self._server.url,
        )

    async def check_health(self) -> None:
        if not self._server.is_alive():
            logger.error("the bundled Redis server died; starting it again, empty")
            await asyncio.to_thread(self._server.start)

    async def __del__(self) -> None:
        await asyncio.to_thread(self._server.stop)
