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


def narrow(config: Any) -> None:
    """One replica that takes one request at a time, and a queue of two."""
    (application,) = config["applications"]
    application["import_path"] = "deployments.instant:build"
    application["args"]["replicas"] = {
        "num_replicas": 1,
        "max_ongoing_requests": 1,
        "max_queued_requests": 2,
        "retry_after_s": RETRY_AFTER_S,
        "num_cpus": 0.5,
    }


@pytest.fixture(scope="module")
def narrow_service(demo: DemoPaths, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("narrow")
    with BundledRedis(directory=folder / "redis") as redis:
        running = Service(demo, redis, folder, narrow)
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
