"""More requests than are let in, on an application whose engines answer at once: the rest of it is real."""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from live.calls import complete, completion, concurrently, error_of, stream
from live.service import Service

from chameleon_ray.demo import DemoPaths
from chameleon_ray.redis_server import BundledRedis

CLIENTS = 48
RETRY_AFTER_S = 7
KEY = "of-this-test"


def narrow(config: Any) -> None:
    """One replica that takes one request at a time, and a queue of two; closed to whoever has no key."""
    (application,) = config["applications"]
    application["import_path"] = "deployments.instant:build"
    application["args"]["replicas"] = {
        "num_replicas": 1,
        "max_ongoing_requests": 1,
        "max_queued_requests": 2,
        "retry_after_s": RETRY_AFTER_S,
        "num_cpus": 0.5,
    }
    application["args"]["api"] |= {"api_keys": [KEY]}


@pytest.fixture(scope="module")
def narrow_service(demo: DemoPaths, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("narrow")
    with BundledRedis(directory=folder / "redis") as redis:
        running = Service(demo, redis, folder, narrow)
        running.http.headers["Authorization"] = f"Bearer {KEY}"
        try:
            running.start()
            yield running
        finally:
            running.stop()


@pytest.mark.parametrize("streamed", [False, True])
def test_too_many_requests_are_told_to_come_back(narrow_service: Service, streamed: bool) -> None:
    body = completion("demo-r8-00", max_tokens=20_000) | {"stream": streamed}
    send = partial(narrow_service.http.post, "/v1/completions", json=body)
    responses = concurrently([send] * CLIENTS, clients=CLIENTS)
    counts = Counter(response.status_code for response in responses)
    assert counts.keys() == {200, 503}, counts
    for response in responses:
        if response.status_code == 503:
            assert error_of(response, 503)["type"] == "overloaded"
            assert response.headers["Retry-After"] == str(RETRY_AFTER_S)
        elif streamed:
            assert response.text.endswith("data: [DONE]\n\n")

    assert complete(narrow_service, "demo-r8-00").status_code == 200
    assert stream(narrow_service, completion("demo-r8-00")).ended == "done"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chameleon/placement", "/v1/chameleon/queues"])
def test_without_the_key_nothing_is_told(narrow_service: Service, path: str) -> None:
    assert narrow_service.http.get(path).status_code == 200
    response = narrow_service.http.get(path, headers={"Authorization": "Bearer another"})
    assert error_of(response, 401)["type"] == "authentication_error"


def test_queues_of_an_engine_without_our_scheduler(narrow_service: Service) -> None:
    [replica] = narrow_service.http.get("/v1/chameleon/queues").json()["replicas"]
    assert replica.keys() == {
        *("replica", "adapter_memory", "running", "waiting", "kv_shares", "recent", "latest_evictions")
    }
    assert replica["adapter_memory"] == "stock"
