"""Redis clients as this package uses them: every wait bounded, no hidden retries."""

from typing import Any

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from chameleon_ray.config import RedisConfig


def sync_client(config: RedisConfig) -> redis.Redis:
    """A blocking client, not connected yet. ValueError when ``config.url`` is missing or malformed."""
    retry = Retry(NoBackoff(), 0)
    return redis.Redis.from_url(_url(config), retry=retry, socket_timeout=config.timeout_s, **_options(config))


def async_client(config: RedisConfig) -> "redis.asyncio.Redis":
    """An asyncio client, not connected yet; callers bound each call by ``asyncio.timeout``.

    ValueError when ``config.url`` is missing or malformed.
    """
    # socket_timeout None: redis-py would send inside asyncio.wait_for, which on Python 3.11 swallows a cancellation
    # that arrives as the sending ends, and the cancelled task would run on.
    retry = AsyncRetry(NoBackoff(), 0)
    return redis.asyncio.Redis.from_url(_url(config), retry=retry, socket_timeout=None, **_options(config))


def _url(config: RedisConfig) -> str:
    if config.url is None:
        raise ValueError("redis.url is not set: set it to a server's URL, for example that of a BundledRedis")
    return config.url


def _options(config: RedisConfig) -> dict[str, Any]:
    # Without retries a subscription that broke raises instead of quietly subscribing again with a hole in between.
    # RESP2: no push messages between replies, and every Redis since 3.2 speaks it.
    return {"socket_connect_timeout": config.timeout_s, "protocol": 2}
