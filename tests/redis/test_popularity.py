"""How often adapters are asked for, counted in a real server."""

from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio

from chameleon_ray.config import RedisConfig
from chameleon_ray.placement import Popularity
from chameleon_ray.redis_server import BundledRedis

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def make_popularity() -> AsyncIterator[Callable[..., Popularity]]:
    made: list[Popularity] = []

    def make(config: RedisConfig, **bounds: int) -> Popularity:
        made.append(Popularity(config, **bounds))
        return made[-1]

    yield make
    for one in made:
        await one.close()


async def test_all_replicas_count_together(config, make_popularity) -> None:
    one, other = make_popularity(config), make_popularity(config)
    assert await one.counts() == {}
    await one.add({"a": 3, "b": 1})
    await other.add({"a": 2})
    await other.add({})
    assert await one.counts() == await other.counts() == {"a": 5.0, "b": 1.0}


async def test_what_was_popular_long_ago_gives_way(config, make_popularity) -> None:
    counts = make_popularity(config, halved_at=16)
    await counts.add({"old": 8, "rare": 1})
    for _ in range(4):
        await counts.add({"new": 8})
    found = await counts.counts()
    assert found.keys() == {"new", "old"} and found["new"] > 8 * found["old"]
    assert sum(found.values()) < 16


async def test_only_so_many_are_remembered(config, make_popularity) -> None:
    counts = make_popularity(config, max_adapters=3)
    await counts.add({f"d{number}": number + 1 for number in range(9)})
    assert (await counts.counts()).keys() == {"d6", "d7", "d8"}


async def test_uses_are_counted_when_redis_is_back(make_config, make_server, make_popularity, kill) -> None:
    server: BundledRedis = make_server()
    counts = make_popularity(make_config(server))
    kill(server)
    await counts.add({"a": 3})
    assert await counts.counts() == {}
    server.start()
    await counts.add({"a": 1})
    assert await counts.counts() == {"a": 4.0}
