"""One running application for all tests of this package, and the Redis server it uses."""

from collections.abc import Iterator

import openai
import pytest

from chameleon_ray.demo import DemoPaths
from chameleon_ray.redis_server import BundledRedis
from live.service import Service


@pytest.fixture(scope="package")
def shared_service(demo: DemoPaths, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("live")
    with BundledRedis(directory=folder / "redis") as redis:
        running = Service(demo, redis, folder)
        try:
            running.start()
            yield running
        finally:
            running.stop()


@pytest.fixture
def service(shared_service: Service, request: pytest.FixtureRequest) -> Iterator[Service]:
    """The application, whole: a test that harms it waits at its end for all to be back."""
    shared_service.wait_whole()
    yield shared_service


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    """OpenAI's own client, which must not need to try anything twice."""
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=120.0) as client:
        yield client
