"""An application on two Ray nodes, and what happens to it. The tests share the nodes and run in this order."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from adapter_files import scaled_adapter, widened_adapter
from live.calls import Load, Stream, completion, error_of, stream, text_of
from live.service import test_config, wait_for
from paced_engines import answer_of
from ray_nodes import HEAD, WORKER, Front, RayNodes, running_nodes

from chameleon_ray.demo import DemoPaths
from chameleon_ray.redis_server import BundledRedis

START_LIMIT_S = 300.0
NUM_LONG = 400
"""Tokens of an answer that takes eight seconds."""
CLIENTS = 4
TTL_S = 1.25
"""A quarter of the default, as are the other times around Redis."""
HANG_S = 12 * TTL_S
"""A minute at the defaults."""
WIDE_RANK = 256
INGRESS = "ServeReplica:chameleon:Ingress"
FILE_SERVER = "StoredFiles"
"""In the titles of a node's ingress, and of the process that gives its adapters to others."""


class Application:
    """The application on two nodes: ``front`` is the head's proxy, ``other`` the worker's."""

    def __init__(self, nodes: RayNodes, redis: BundledRedis, config: dict[str, Any]) -> None:
        self.nodes, self.redis, self.config = nodes, redis, config
        self.front, self.other = Front(nodes.port), Front(nodes.worker_port)
        arguments = config["applications"][0]["args"]
        self.base: str = arguments["model"]["name"]
        self.demo_adapters = Path(arguments["adapters"]["folder"])
        self.uploads = Path(arguments["adapters"]["allowed_roots"][1])
        self.store = Path(arguments["adapters"]["store_dir"])

    def is_whole(self) -> bool:
        """Whether both nodes have a replica, an ingress and a proxy, all of them agree, and Serve has no more to do."""
        whole = {"status": "ok", "redis": "connected", "replicas": 2}
        if not self.front.health() == whole == self.other.health() or len(self.placed_nodes()) != 2:
            return False
        return all(self.nodes.processes(name, INGRESS) for name in (HEAD, WORKER)) and self.nodes.is_running()

    def placed_nodes(self) -> set[str]:
        """The nodes of the replicas that placement knows."""
        return {one["node"] for one in self.front.placement()}

    def held(self) -> dict[str, set[str]]:
        """What placement says of each node: the adapters that its replica has."""
        return {one["node"]: set(one["adapters"]) for one in self.front.placement()}

    def load(self, name: str, folder: Path) -> httpx.Response:
        """POST /v1/load_lora_adapter."""
        return self.front.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder)})

    def bodies(self, num_tokens: int) -> list[dict[str, Any]]:
        """Requests for the base model and for adapters."""
        return [completion(model, max_tokens=num_tokens) for model in (self.base, "demo-r8-00", "demo-r16-01")]


def expected(body: dict[str, Any]) -> str:
    return answer_of(body["model"], body["max_tokens"])


def assert_whole(load: Load, bodies: list[dict[str, Any]]) -> None:
    """Every request got the answer to one of ``bodies``."""
    texts = {expected(body) for body in bodies}
    assert {text_of(one) for one in load.responses} <= texts
    assert {one.text for one in load.streams} <= texts and {one.ended for one in load.streams} <= {"done"}


@pytest.fixture(scope="module")
def application(demo: DemoPaths, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    folder = tmp_path_factory.mktemp("nodes")
    with BundledRedis(directory=folder / "redis") as redis, running_nodes(folder) as nodes:
        config = test_config(demo, redis.url, folder, nodes.port)
        config["proxy_location"] = "EveryNode"
        config["applications"][0]["import_path"] = "paced_engines:build"
        arguments = config["applications"][0]["args"]
        arguments["replicas"] |= {"num_cpus": 2}
        arguments["redis"] |= {"heartbeat_s": 0.125, "heartbeat_ttl_s": TTL_S, "timeout_s": 0.5}
        arguments["adapters"] |= {"prewarm": ["*"], "peer_fetch": True}
        arguments["ingress"] = {"num_cpus": 1, "num_replicas": 2, "max_per_node": 1}
        running = Application(nodes, redis, config)
        try:
            nodes.deploy(config)
            wait_for(running.is_whole, "both nodes serve", START_LIMIT_S, 0.25)
        except BaseException:
            print(nodes.application(), nodes.logs())
            raise
        yield running


def test_a_node_that_dies_costs_no_request_of_another_one_and_a_new_one_takes_its_place(
    application: Application,
) -> None:
    nodes, front = application.nodes, application.front
    [lost] = {one["node"] for one in front.placement()} - {nodes.node_id(HEAD)}
    long = 2 * application.bodies(NUM_LONG)
    seen = [Stream() for _ in long]
    with ThreadPoolExecutor(2 * len(long)) as pool:
        streams = [pool.submit(stream, front, *one) for one in zip(long, seen, strict=True)]
        wholes = [pool.submit(front.http.post, "/v1/completions", json=body) for body in long]
        wait_for(lambda: all(one.texts for one in seen), "all streams have begun", 60.0, 0.01)
        wait_for(lambda: all(one["load"]["num_running"] for one in front.placement()), "work on both nodes", 60.0)
        with Load(front, application.bodies(4), CLIENTS) as load:
            wait_for(load.more(1), "an answer under load", 60.0, 0.01)
            assert not any(one.done() for one in streams)
            nodes.kill(WORKER)
            wait_for(load.more(4 * CLIENTS), "answers after the death", 120.0)
            wait_for(lambda: application.placed_nodes() == {nodes.node_id(HEAD)}, "placement forgets it", 60.0)
        for one in streams:
            one.result()
    for one, whole, body in zip(seen, wholes, long, strict=True):
        assert (one.text, one.reasons, one.ended) == (expected(body), ["length"], "done")
        assert text_of(whole.result()) == expected(body)
    assert_whole(load, application.bodies(4))
    with pytest.raises(httpx.TransportError):
        application.other.http.get("/health")

    nodes.start(WORKER)
    wait_for(application.is_whole, "a replica and a proxy on a new node", START_LIMIT_S, 0.25)
    assert application.placed_nodes() == {nodes.node_id(HEAD), nodes.node_id(WORKER)} and lost != nodes.node_id(WORKER)
    for body in application.bodies(4):
        assert text_of(application.other.http.post("/v1/completions", json=body)) == expected(body)


def test_a_changed_option_is_deployed_under_load_and_costs_no_request(application: Application) -> None:
    nodes, front = application.nodes, application.front
    arguments = application.config["applications"][0]["args"]
    before = {one["replica"] for one in front.placement()}
    wide = widened_adapter(application.demo_adapters / "demo-r8-00", application.uploads / "wide", WIDE_RANK // 8)
    assert str(WIDE_RANK) in error_of(application.load("wide", wide), 413)["message"]

    short, long = application.bodies(8), application.bodies(NUM_LONG)
    seen = [Stream() for _ in long]
    with ThreadPoolExecutor(len(long)) as pool:
        running = [pool.submit(stream, front, *one) for one in zip(long, seen, strict=True)]
        wait_for(lambda: all(one.texts for one in seen), "all streams have begun", 60.0, 0.01)
        with Load(front, [*short, *(body | {"stream": True} for body in short)], CLIENTS) as load:
            wait_for(load.more(1), "an answer under load", 60.0, 0.01)
            arguments["adapters"]["max_rank"] = WIDE_RANK
            nodes.deploy(application.config)

            def is_new() -> bool:
                now = {one["replica"] for one in front.placement()}
                return not now & before and application.is_whole()

            wait_for(is_new, "new replicas on both nodes", START_LIMIT_S, 0.25)
            wait_for(load.more(2 * CLIENTS), "answers by them", 60.0)
        for one in running:
            one.result()
    for one, body in zip(seen, long, strict=True):
        assert (one.text, one.reasons, one.ended) == (expected(body), ["length"], "done")
    assert_whole(load, short)
    response = application.load("wide", wide)
    assert response.status_code == 200, response.text


def test_a_redis_that_hangs_stops_nothing_but_catalog_writes(application: Application) -> None:
    front, pid = application.front, application.redis.pid
    assert pid is not None
    late = scaled_adapter(application.demo_adapters / "demo-r8-00", application.uploads / "late", 0.5)
    wait_for(lambda: all(len(names) > 20 for names in application.held().values()), "adapters fetched ahead", 60.0)
    held, bodies = application.held(), application.bodies(4)
    with Load(front, bodies, CLIENTS) as load:
        wait_for(load.more(1), "an answer under load", 60.0, 0.01)
        os.kill(pid, signal.SIGSTOP)
        began_s = time.monotonic()
        try:
            wait_for(lambda: front.health()["status"] == "degraded", "degraded health")
            unload = front.http.post("/v1/unload_lora_adapter", json={"lora_name": "demo-r8-00"})
            for response in (application.load("late", late), unload):
                assert error_of(response, 503)["type"] == "catalog_unavailable"
                assert int(response.headers["Retry-After"]) >= 1
            wait_for(lambda: time.monotonic() > began_s + HANG_S, "far more than the time to live", HANG_S + 30.0)
            wait_for(load.more(2 * CLIENTS), "answers without Redis", 60.0)
            assert front.health()["replicas"] == 2
            assert application.held().keys() == held.keys()
        finally:
            os.kill(pid, signal.SIGCONT)
        wait_for(lambda: application.is_whole() and application.held() == held, "placement as it was", 60.0)
        wait_for(load.more(2 * CLIENTS), "answers with Redis", 60.0)
    assert_whole(load, bodies)
    models = {card["id"] for card in front.http.get("/v1/models").json()["data"]}
    assert "demo-r8-00" in models and "late" not in models, "what was answered with an error was not done later"
    response = application.load("late", late)
    assert response.status_code == 200, response.text


def test_a_new_node_fetches_ahead_from_another_one_whose_file_server_had_died(application: Application) -> None:
    nodes = application.nodes
    folder = scaled_adapter(application.demo_adapters / "demo-r8-00", application.uploads / "moved", 0.25)
    response = application.load("moved", folder)
    assert response.status_code == 200, response.text
    folder.rename(folder.with_name("away"))

    wait_for(lambda: len(nodes.processes(HEAD, FILE_SERVER)) == 1, "the end of those of earlier replicas", 60.0)
    [server] = nodes.processes(HEAD, FILE_SERVER)
    server.kill()
    wait_for(lambda: {one.pid for one in nodes.processes(HEAD, FILE_SERVER)} - {server.pid}, "its successor", 60.0)
    nodes.kill(WORKER)
    shutil.rmtree(application.store / WORKER)
    nodes.start(WORKER)
    wait_for(application.is_whole, "a new node", START_LIMIT_S, 0.25)
    new = nodes.node_id(WORKER)
    catalog = {card["id"] for card in application.front.http.get("/v1/models").json()["data"]} - {application.base}
    assert "moved" in catalog
    wait_for(lambda: application.held().get(new, set()) >= catalog, "all adapters on the new node", 60.0)


def test_the_application_outlives_its_head_and_a_new_head_takes_it_up(application: Application) -> None:
    nodes, other = application.nodes, application.other
    long, short = application.bodies(NUM_LONG), application.bodies(4)
    seen = [Stream() for _ in long]
    with ThreadPoolExecutor(len(long)) as pool:
        running = [pool.submit(stream, other, *one) for one in zip(long, seen, strict=True)]
        wait_for(lambda: all(one.texts for one in seen), "all streams have begun", 60.0, 0.01)
        with Load(other, short, CLIENTS) as load:
            wait_for(load.more(1), "an answer under load", 60.0, 0.01)
            nodes.kill(HEAD)
            wait_for(load.more(4 * CLIENTS), "answers without a head", 120.0)
            wait_for(lambda: other.health().get("replicas") == 1, "placement forgets its replica", 60.0)
            nodes.start(HEAD)
            wait_for(application.is_whole, "the controller, a replica and a proxy on the new head", START_LIMIT_S, 0.25)
            wait_for(load.more(2 * CLIENTS), "answers with the new head", 60.0)
        for one in running:
            one.result()
    for one, body in zip(seen, long, strict=True):
        assert (one.text, one.reasons, one.ended) == (expected(body), ["length"], "done")
    assert_whole(load, short)
    for body in short:
        assert text_of(application.front.http.post("/v1/completions", json=body)) == expected(body)
