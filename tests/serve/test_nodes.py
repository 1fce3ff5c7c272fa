"""An application on two Ray nodes, and what happens to it. The tests share the nodes and run in this order."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from live.calls import Load, Stream, completion, stream, text_of
from live.service import test_config, wait_for
from paced_engines import answer_of
from ray_nodes import HEAD, WORKER, Front, RayNodes, running_nodes

from chameleon_ray.demo import DemoPaths
from chameleon_ray.redis_server import BundledRedis

START_LIMIT_S = 300.0
NUM_LONG = 250
"""Tokens of an answer that takes five seconds."""
CLIENTS = 4


class Application:
    """The application on two nodes: ``front`` is the head's proxy, ``other`` the worker's."""

    def __init__(self, nodes: RayNodes, redis: BundledRedis, config: dict[str, Any]) -> None:
        self.nodes, self.redis, self.config = nodes, redis, config
        self.front, self.other = Front(nodes.port), Front(nodes.worker_port)
        arguments = config["applications"][0]["args"]
        self.base: str = arguments["model"]["name"]

    def is_whole(self) -> bool:
        """Whether both nodes have a replica and a proxy, and all of them agree."""
        whole = {"status": "ok", "redis": "connected", "replicas": 2}
        return self.front.health() == whole == self.other.health() and len(self.placed_nodes()) == 2

    def placed_nodes(self) -> set[str]:
        """The nodes of the replicas that placement knows."""
        return {one["node"] for one in self.front.placement()}

    def bodies(self, num_tokens: int) -> list[dict[str, Any]]:
        """Requests for the base model and for adapters."""
        return [completion(model, max_tokens=num_tokens) for model in (self.base, "demo-r8-00", "demo-r16-01")]


def expected(body: dict[str, Any]) -> str:
    return answer_of(body["model"], body["max_tokens"])


@pytest.fixture(scope="module")
def application(demo: DemoPaths, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    folder = tmp_path_factory.mktemp("nodes")
    with BundledRedis(directory=folder / "redis") as redis, running_nodes(folder) as nodes:
        config = test_config(demo, redis.url, folder, nodes.port)
        config["proxy_location"] = "EveryNode"
        config["applications"][0]["import_path"] = "paced_engines:build"
        arguments = config["applications"][0]["args"]
        arguments["replicas"] |= {"num_cpus": 2}
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
    assert {text_of(one) for one in load.responses} == {expected(body) for body in application.bodies(4)}
    with pytest.raises(httpx.TransportError):
        application.other.http.get("/health")

    nodes.start(WORKER)
    wait_for(application.is_whole, "a replica and a proxy on a new node", START_LIMIT_S, 0.25)
    assert application.placed_nodes() == {nodes.node_id(HEAD), nodes.node_id(WORKER)} and lost != nodes.node_id(WORKER)
    for body in application.bodies(4):
        assert text_of(application.other.http.post("/v1/completions", json=body)) == expected(body)
