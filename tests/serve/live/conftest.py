"""One running application for all tests of this package, and the Redis server it uses."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from object_store import BUCKET, running_s3

from chameleon_ray.demo import DemoPaths
from chameleon_ray.redis_server import BundledRedis
from live.service import Service


@pytest.fixture(scope="package")
def shared_service(demo: DemoPaths, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("live")
    (folder / "s3-secret").write_text("any: the server does not ask")
    with BundledRedis(directory=folder / "redis") as redis, running_s3() as s3:
        running = Service(demo, redis, folder, partial(_with_bucket, s3.url, folder / "s3-secret"))
        running.s3 = s3
        try:
            running.start()
            yield running
        finally:
            running.stop()


def _with_bucket(url: str, secret: Path, config: Any) -> None:
    """Loads may name a bucket, and names that begin with tenant/ are looked for there."""
    keys = {"type": "s3", "key_id": f"file:{secret}", "secret": f"file:{secret}", "region": "us-east-1"}
    config["applications"][0]["args"]["adapters"] |= {
        "credentials": {"tenant": keys | {"endpoint_url": url}},
        "sources": [{"uri": f"s3://{BUCKET}/loads/", "credentials": "tenant"}],
        "resolve": [{"pattern": "tenant/*", "uri": f"s3://{BUCKET}/tenant/{{name}}", "credentials": "tenant"}],
        "absent_s": 0.5,
        "refresh_s": 2.0,
        "peer_fetch": True,
    }


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
