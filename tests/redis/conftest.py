"""A real redis-server, a prefix per test, and nothing left behind."""

import asyncio
import os
import secrets
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import pytest_asyncio

from chameleon_ray.config import RedisConfig
from chameleon_ray.placement import CatalogStore, ClusterFollower, ReplicaPublisher
from chameleon_ray.redis_server import BundledRedis

LIMIT_S = 30.0
"""After this a test that waits for something fails. Shorter than ``make_config``'s time to live, so that what is seen
within it did not merely expire."""


@pytest.fixture(scope="session")
def redis_server() -> Iterator[BundledRedis]:
    """A server that all tests share: nobody kills or empties it."""
    with BundledRedis() as server:
        yield server


@pytest.fixture(autouse=True)
def no_leaked_threads(redis_server: BundledRedis) -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    deadline_s = time.monotonic() + LIMIT_S
    while leaked := [t for t in set(threading.enumerate()) - before if not t.name.startswith("asyncio_")]:
        assert time.monotonic() < deadline_s, f"threads left behind: {leaked}"
        time.sleep(0.01)


@pytest.fixture
def make_server(no_leaked_threads: None) -> Iterator[Callable[[], BundledRedis]]:
    """Servers of this test's own, to be killed at will."""
    servers: list[BundledRedis] = []

    def make() -> BundledRedis:
        servers.append(BundledRedis().start())
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


@pytest.fixture
def kill() -> Callable[[BundledRedis], None]:
    """SIGKILL a server and wait for its end."""

    def kill_server(server: BundledRedis) -> None:
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        deadline_s = time.monotonic() + LIMIT_S
        while server.is_alive():
            assert time.monotonic() < deadline_s
            time.sleep(0.005)

    return kill_server


@pytest.fixture
def make_config() -> Callable[[BundledRedis], RedisConfig]:
    """Settings with a prefix that nobody else has; nothing expires and no call is given up while a test runs."""

    def make(server: BundledRedis) -> RedisConfig:
        prefix = f"test-{secrets.token_hex(6)}"
        return RedisConfig(url=server.url, key_prefix=prefix, heartbeat_s=0.1, heartbeat_ttl_s=60.0, timeout_s=20.0)

    return make


@pytest.fixture
def config(redis_server: BundledRedis, make_config: Callable[[BundledRedis], RedisConfig]) -> RedisConfig:
    return make_config(redis_server)


@pytest.fixture
def follow(no_leaked_threads: None) -> Iterator[Callable[..., ClusterFollower]]:
    followers: list[ClusterFollower] = []

    def make(config: RedisConfig, *, wait: bool = True) -> ClusterFollower:
        followers.append(ClusterFollower(config))
        if wait:
            assert followers[-1].wait_ready(LIMIT_S), f"no snapshot within {LIMIT_S} s"
        return followers[-1]

    yield make
    for follower in followers:
        follower.close()


@pytest_asyncio.fixture
async def make_store() -> AsyncIterator[Callable[..., CatalogStore]]:
    stores: list[CatalogStore] = []

    def make(config: RedisConfig, follower: ClusterFollower | None = None) -> CatalogStore:
        stores.append(CatalogStore(config) if follower is None else CatalogStore(config, follower.view))
        return stores[-1]

    yield make
    for store in stores:
        await store.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}, "tasks left behind"


@pytest_asyncio.fixture
async def make_publisher() -> AsyncIterator[Callable[[str, RedisConfig], ReplicaPublisher]]:
    publishers: list[ReplicaPublisher] = []

    def make(replica_id: str, config: RedisConfig) -> ReplicaPublisher:
        publishers.append(ReplicaPublisher(replica_id, "node-1", config))
        return publishers[-1]

    yield make
    for publisher in publishers:
        await publisher.withdraw()
    assert asyncio.all_tasks() == {asyncio.current_task()}, "tasks left behind"
