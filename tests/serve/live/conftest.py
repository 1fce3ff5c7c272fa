"""One running application for all tests of this package, and the Redis server it uses."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from adapter_files import widened_adapter
from object_store import BUCKET, running_s3

from chameleon_ray.demo import DemoPaths
from chameleon_ray.redis_server import BundledRedis
from live.service import OVERSIZED, Service


@pytest.fixture(scope="package")
def shared_service(demo: DemoPaths, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("live")
    (folder / "s3-secret").write_text("any: the server does not ask")
    oversized = widened_adapter(demo.adapters / "demo-r128-04", folder / OVERSIZED, 4)

    def edit(config: Any) -> None:
        _with_bucket(s3.url, folder / "s3-secret", config)
        _with_one_that_is_too_large(oversized, config)

    with BundledRedis(directory=folder / "redis") as redis, running_s3() as s3:
        running = Service(demo, redis, folder, edit)
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
        "prewarm": ["tenant/*", "*"],
        "peer_fetch": True,
    }


def _with_one_that_is_too_large(oversized: Path, config: Any) -> None:
    """Host memory for adapters has room for every one but one, which the configuration names."""
    arguments = config["applications"][0]["args"]
    arguments["engine"]["adapter_host_gib"] = 0.03  # Of 30.7 MiB; at rank 128 an adapter takes 8 MiB, at 512 32 MiB.
    arguments["adapters"] |= {"max_rank": 512, "preload": [{"name": OVERSIZED, "uri": str(oversized)}]}


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
