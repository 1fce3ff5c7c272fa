"""Redis clients as this package uses them: every wait bounded, no hidden retries.

``redis.url`` names a server (``redis://``, ``rediss://`` with TLS) or, for one behind Sentinel, the sentinels and the
service: ``redis+sentinel://[user:password@]host[:port],host[:port]/service[/db]``, with TLS ``rediss+sentinel://``. The
sentinels are asked without user and password. Parameters behind ``?``, such as ``ssl_ca_certs``, are redis-py's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from chameleon_ray.config import RedisConfig

SENTINEL_PORT = 26379


@dataclass(frozen=True, slots=True)
class SentinelUrl:
    """A service behind Sentinel. options: of a connection to it; tls: of a connection to it or to a sentinel."""

    sentinels: tuple[tuple[str, int], ...]
    service: str
    options: Mapping[str, Any]
    tls: Mapping[str, Any]

    @staticmethod
    def parse(url: str) -> "SentinelUrl | None":
        """None for the URL of a server. ValueError for one that names sentinels in no way that we know."""
        parts = urlsplit(url)
        scheme, _, kind = parts.scheme.partition("+")
        if kind != "sentinel":
            return None
        access, _, hosts = parts.netloc.rpartition("@")
        username, _, password = access.partition(":")
        service, _, db = parts.path.removeprefix("/").partition("/")
        sentinels = tuple(map(_address, hosts.split(",")))
        if scheme not in ("redis", "rediss") or not all(sentinels) or not service or (db and not db.isdecimal()):
            raise ValueError("redis.url: write redis+sentinel://host[:port],host[:port]/service[/db]")
        options = {"db": int(db or 0), "username": unquote(username) or None, "password": unquote(password) or None}
        tls = {"ssl": scheme == "rediss"} | dict(parse_qsl(parts.query))
        return SentinelUrl(tuple(filter(None, sentinels)), service, options, tls)


def sync_client(config: RedisConfig) -> redis.Redis:
    """A blocking client, not connected yet. ValueError when ``config.url`` is missing or malformed."""
    url = _url(config)
    options = {"retry": Retry(NoBackoff(), 0), "socket_timeout": config.timeout_s} | _options(config)
    if (place := SentinelUrl.parse(url)) is None:
        return redis.Redis.from_url(url, **options)
    sentinels = redis.sentinel.Sentinel(  # type: ignore[no-untyped-call]
        place.sentinels, sentinel_kwargs={**options, **place.tls}
    )
    client: redis.Redis = sentinels.master_for(  # type: ignore[no-untyped-call]
        place.service, **options, **place.options, **place.tls
    )
    return client


def async_client(config: RedisConfig) -> "redis.asyncio.Redis":
    """An asyncio client, not connected yet; callers bound each call by ``asyncio.timeout``.

    ValueError when ``config.url`` is missing or malformed.
    """
    url = _url(config)
    # socket_timeout None: redis-py would send inside asyncio.wait_for, which on Python 3.11 swallows a cancellation
    # that arrives as the sending ends, and the cancelled task would run on.
    options = {"retry": AsyncRetry(NoBackoff(), 0), "socket_timeout": None} | _options(config)
    if (place := SentinelUrl.parse(url)) is None:
        return redis.asyncio.Redis.from_url(url, **options)
    sentinels = redis.asyncio.sentinel.Sentinel(  # type: ignore[no-untyped-call]
        place.sentinels, sentinel_kwargs={**options, **place.tls}
    )
    client: redis.asyncio.Redis = sentinels.master_for(place.service, **options, **place.options, **place.tls)
    return client


def _address(text: str) -> tuple[str, int] | None:
    """Host and port; None for what is neither."""
    try:
        parts = urlsplit(f"//{text}")
        return (parts.hostname, parts.port or SENTINEL_PORT) if parts.hostname else None
    except ValueError:  # a port that is no number
        return None


def _url(config: RedisConfig) -> str:
    if config.url is None:
        raise ValueError("redis.url is not set: set it to a server's URL, for example that of a BundledRedis")
    return config.url


def _options(config: RedisConfig) -> dict[str, Any]:
    # Without retries a subscription that broke raises instead of quietly subscribing again with a hole in between.
    # RESP2: no push messages between replies, and every Redis since 3.2 speaks it.
    return {"socket_connect_timeout": config.timeout_s, "protocol": 2}
