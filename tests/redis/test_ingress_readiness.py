"""The ingress's HTTP routes before it has read the catalog, when Redis comes, and while Redis is away."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fastapi.routing import APIRoute

from chameleon_ray.adapters.record import AdapterRecord, Refusal
from chameleon_ray.config import AppConfig
from chameleon_ray.placement import ClusterFollower, ReplicaPublisher, ReplicaReport, shared_follower
from chameleon_ray.progress import Progress
from chameleon_ray.redis_server import BundledRedis
from chameleon_ray.routing.replica_load import ReplicaLoad
from deployments import ingress
from deployments.parts import AnswerHead, Part, RelayedRequest

pytestmark = pytest.mark.asyncio

LIMIT_S = 30.0


class Replicas:
    """Where the replicas' Serve handle stands; answers everything, so that what gets there can be seen."""

    def options(self, **_: Any) -> "Replicas":
        return self

    def remote(self, request: RelayedRequest, _: Progress) -> "Answer":
        return Answer(request.model)


class Answer:
    """A replica's answer, as a Serve handle returns it: one part."""

    def __init__(self, model: str) -> None:
        self._model = model

    async def _fetch_future_result_async(self) -> None:
        """A replica takes the request at once."""

    async def __aiter__(self) -> AsyncIterator[Part]:
        yield Part(f'{{"model": "{self._model}"}}'.encode(), head=AnswerHead(200, "application/json"))


@pytest_asyncio.fixture
async def start(
    monkeypatch: pytest.MonkeyPatch, make_config: Callable[..., Any]
) -> AsyncIterator[Callable[[BundledRedis], tuple[httpx.AsyncClient, ClusterFollower]]]:
    """Starts an ingress that uses a Redis server; returns its HTTP client and its follower."""
    configs, clients = [], []
    # Serve hands its replica to every route as a dependency.
    routes = [route for route in ingress.app.routes if isinstance(route, APIRoute)]
    (servable,) = {one.call for route in routes for one in route.dependant.dependencies}
    inner = ingress.Ingress.__mro__[1]  # what Serve's wrapper wraps
    monkeypatch.setitem(inner.__init__.__globals__, "_http_host", lambda: "127.0.0.1")

    def make(server: BundledRedis) -> tuple[httpx.AsyncClient, ClusterFollower]:
        config = AppConfig.from_args({"model": {"source": "base"}, "redis": make_config(server).model_dump()})
        configs.append(config.redis)
        served = inner(config.model_dump(mode="json", exclude_unset=True), Replicas())
        monkeypatch.setitem(ingress.app.dependency_overrides, servable, lambda: served)
        clients.append((httpx.AsyncClient(transport=httpx.ASGITransport(ingress.app), base_url="http://x"), served))
        return clients[-1][0], served._follower

    yield make
    for client, served in clients:
        await client.aclose()
        await served._models._store.close()
    for config in configs:
        shared_follower(config).close()


async def complete(client: httpx.AsyncClient, model: str) -> httpx.Response:
    return await client.post("/v1/completions", json={"model": model, "prompt": "x"})


def assert_not_read_yet(response: httpx.Response) -> None:
    assert response.status_code == 503, response.text
    assert int(response.headers["Retry-After"]) >= 1
    error = response.json()["error"]
    assert error["type"] == "catalog_unavailable" and error["code"] == 503
    assert "has not been read yet" in error["message"] and "Redis cannot be used: " in error["message"]


async def test_until_the_catalog_is_read_only_the_base_model_is_served(start, make_server, make_store, kill) -> None:
    server = make_server()
    kill(server)
    client, follower = start(server)
    await wait_until(lambda: "cannot be used" in str(follower.problem))
    for response in (
        await client.get("/v1/models"),
        await client.get("/v1/models/sql"),
        await complete(client, "sql"),
        await complete(client, "base:sql"),
    ):
        assert_not_read_yet(response)
    assert (await complete(client, "base")).json() == {"model": "base"}
    assert (await client.get("/v1/models/base")).json()["id"] == "base"
    health = await client.get("/health")
    assert health.status_code == 503 and int(health.headers["Retry-After"]) >= 1
    assert health.json()["status"] == "starting" and health.json()["redis"] == "disconnected"
    assert "Redis cannot be used: " in health.json()["reason"]

    server.start()
    record = AdapterRecord(name="sql", digest="d0", uri="/sql", rank=8, size_bytes=1, origin="runtime")
    written = await make_store(follower._config).put(record, replace=False)
    await wait_until(lambda: follower.view().catalog.get("sql") == written)
    assert [card["id"] for card in (await client.get("/v1/models")).json()["data"]] == ["base", "sql"]
    assert (await complete(client, "sql")).json() == {"model": "sql"}
    missing = await complete(client, "no-such")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "NotFoundError")

    kill(server)
    await wait_until(lambda: not follower.view().connected)
    assert (await complete(client, "sql")).status_code == 200, "what was read once serves on"
    assert (await complete(client, "no-such")).status_code == 404


async def test_a_configured_adapter_that_is_refused_says_why(start, make_server, make_store) -> None:
    client, follower = start(make_server())
    store = make_store(follower._config)
    for name, status in (("huge", 413), ("away", 502)):
        refusal = Refusal(status=status, code="adapter_x", reason="it takes 9 blocks", is_permanent=status < 500)
        record = AdapterRecord(name=name, digest="", uri="/x", rank=0, size_bytes=0, deleted=True, refusal=refusal)
        await store.put_refused(record)
    await wait_until(lambda: len(follower.view().tombstones) == 2)
    for response in (await complete(client, "huge"), await complete(client, "base:huge")):
        error = response.json()["error"]
        assert (response.status_code, error["type"], error["param"]) == (413, "adapter_x", "model")
        assert error["message"] == "The adapter 'huge' is not served: it takes 9 blocks"
        assert "Retry-After" not in response.headers
    away = await complete(client, "away")
    assert away.status_code == 502 and int(away.headers["Retry-After"]) >= 1
    assert (await client.get("/v1/models/huge")).status_code == 413
    assert [card["id"] for card in (await client.get("/v1/models")).json()["data"]] == ["base"]
    placement = (await client.get("/v1/chameleon/placement")).json()
    assert placement["refused"] == dict.fromkeys(("huge", "away"), "it takes 9 blocks")


async def test_health_says_what_is_missing(start, make_server, make_publisher, kill) -> None:
    server = make_server()
    client, follower = start(server)
    await wait_until(lambda: follower.view().is_known)
    health = await client.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "unavailable")
    assert "no replica" in health.json()["reason"]
    publisher: ReplicaPublisher = make_publisher("r1", follower._config)
    await publisher.publish(ReplicaReport("r1", "node-1", ReplicaLoad()), time.monotonic())
    await wait_until(lambda: len(follower.view().replicas) == 1)
    health = await client.get("/health")
    assert (health.status_code, health.json()) == (200, {"status": "ok", "redis": "connected", "replicas": 1})
    kill(server)
    await wait_until(lambda: not follower.view().connected)
    health = await client.get("/health")
    assert (health.status_code, health.json()["status"]) == (200, "degraded")
    assert "Redis cannot be used: " in health.json()["reason"]


async def test_unknown_routes_answer_in_openais_shape(start, make_server) -> None:
    client, _ = start(make_server())
    for method, path, status in (
        ("GET", "/", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models/sql", 405),
    ):
        response = await client.request(method, path)
        assert response.status_code == status, (path, response.text)
        assert response.headers["content-type"] == "application/json"
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"} and error["code"] == status
        assert f"{method} {path}" in error["message"]
    assert response.headers["Allow"] == "GET"


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 (what is waited for happens in the follower's thread)
            await asyncio.sleep(0.02)
