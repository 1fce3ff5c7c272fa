"""The affinity router inside a real Ray Serve handle, over replicas that only say who they are; Redis is real."""

import asyncio
import gc
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest

from chameleon_ray.config import RedisConfig, RouterConfig
from chameleon_ray.placement import ReplicaPublisher, ReplicaReport, shared_follower
from chameleon_ray.policy.adapter import Tier
from chameleon_ray.redis_server import BundledRedis, free_port
from chameleon_ray.router import AffinityRouter, request_router_config
from chameleon_ray.routing.replica_load import ReplicaLoad

HEARTBEAT_S = 0.1
MAX_REPORT_AGE_S = 5.0
MAX_RUNNING = 16
MAX_ONGOING = 32
ANSWER_LIMIT_S = 30.0


class Echo:
    """Answers with its replica id; from then on it reports the adapter as resident."""

    def __init__(self, redis: dict[str, Any]) -> None:
        self.replica_id = serve.get_replica_context().replica_id.unique_id
        self.node_id = ray.get_runtime_context().get_node_id()
        self.held: dict[str, Tier] = {}
        self.num_running = 0
        self.publisher = ReplicaPublisher(self.replica_id, self.node_id, RedisConfig.model_validate(redis))
        self.reporting = asyncio.get_running_loop().create_task(self.report())

    async def report(self) -> None:
        while True:
            load = ReplicaLoad(self.num_running, 0, MAX_RUNNING, service_s=0.05, ttft_s=0.02)
            report = ReplicaReport(self.replica_id, self.node_id, load, tiers=dict(self.held))
            await self.publisher.publish(report, time.monotonic())
            await asyncio.sleep(HEARTBEAT_S)

    async def __call__(self, work_s: float = 0.0) -> tuple[str, int]:
        self.num_running += 1
        await asyncio.sleep(work_s)
        self.num_running -= 1
        if digest := serve.get_multiplexed_model_id():
            self.held[digest] = Tier.GPU
        return self.replica_id, os.getpid()


class FailingRouter(AffinityRouter):
    """A router whose ranking is broken."""

    def _rank(self, *_: Any) -> Any:
        raise RuntimeError("broken ranking")


def digest_of(number: int) -> str:
    return f"{number:064x}"


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {limit_s} s: {what}"
        time.sleep(0.05)


def ask(handle: DeploymentHandle, digest: str = "", work_s: float = 0.0) -> Any:
    return handle.options(multiplexed_model_id=digest).remote(work_s)


def who_answers(handle: DeploymentHandle, digest: str = "") -> str:
    return ask(handle, digest).result(timeout_s=ANSWER_LIMIT_S)[0]


@pytest.fixture(scope="module")
def metrics_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def metrics_url(metrics_port: int) -> str:
    return f"http://127.0.0.1:{metrics_port}/metrics"


@pytest.fixture(scope="module")
def ray_cluster(metrics_port: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # Ray takes loopback for the node's address only where it expects no cluster; this is read at import.
        patch.setattr(ray._private.ray_constants, "ENABLE_RAY_CLUSTER", False)
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else a token is written into the home folder
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)]))
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=4,
            object_store_memory=80 * 2**20,
            log_to_driver=False,
            _metrics_export_port=metrics_port,
            _system_config={"metrics_report_interval_ms": 500},
        )
        try:
            serve.start(proxy_location="Disabled")
            yield
            serve.shutdown()
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def redis_server() -> Iterator[BundledRedis]:
    with BundledRedis() as server:
        yield server


@pytest.fixture(scope="module")
def redis(redis_server: BundledRedis) -> RedisConfig:
    return RedisConfig(url=redis_server.url, key_prefix="test-router", heartbeat_s=HEARTBEAT_S, heartbeat_ttl_s=5.0)


def deploy(
    redis: RedisConfig, name: str, router_class: type[AffinityRouter] | None = None, num_replicas: int = 3
) -> DeploymentHandle:
    routing = request_router_config(redis, RouterConfig(max_report_age_s=MAX_REPORT_AGE_S))
    if router_class is not None:
        routing = type(routing)(**{**routing.model_dump(), "request_router_class": router_class})
    deployment = serve.deployment(
        Echo,
        num_replicas=num_replicas,
        max_ongoing_requests=MAX_ONGOING,
        health_check_period_s=1,
        graceful_shutdown_timeout_s=1,
        ray_actor_options={"num_cpus": 0},
        request_router_config=routing,
    )
    return serve.run(deployment.bind(redis.model_dump(mode="json")), name=name, route_prefix=None)


@pytest.fixture(scope="module")
def handle(ray_cluster: None, redis: RedisConfig) -> Iterator[DeploymentHandle]:
    yield deploy(redis, "echo")
    serve.delete("echo")
    shared_follower(redis).close()


def live_replicas(redis: RedisConfig) -> set[str]:
    return set(shared_follower(redis).view().replicas)


def test_requests_for_an_adapter_meet_at_one_replica_and_adapters_spread(
    handle: DeploymentHandle, redis: RedisConfig
) -> None:
    wait_until(lambda: len(live_replicas(redis)) == 3, "three replicas report")
    answered_by = {number: {who_answers(handle, digest_of(number)) for _ in range(5)} for number in range(24)}
    assert all(len(replicas) == 1 for replicas in answered_by.values())
    assert set.union(*answered_by.values()) == live_replicas(redis)

    holders = shared_follower(redis)
    wait_until(lambda: len(holders.view().holders) >= 24, "the replicas report the adapters as resident")
    for number, replicas in answered_by.items():
        assert who_answers(handle, digest_of(number)) in replicas


def test_base_requests_go_to_every_replica(handle: DeploymentHandle) -> None:
    counts = Counter(who_answers(handle) for _ in range(60))
    assert len(counts) == 3 and min(counts.values()) >= 5


def test_a_burst_that_one_replica_could_take_spreads_nevertheless(handle: DeploymentHandle) -> None:
    """All are ranked before the first is sent: only the router's own count of what it decided on tells them apart."""
    burst = [ask(handle, digest_of(100), work_s=0.2) for _ in range(MAX_ONGOING)]
    counts = Counter(response.result(timeout_s=ANSWER_LIMIT_S)[0] for response in burst)
    assert len(counts) == 3 and max(counts.values()) <= MAX_RUNNING


def test_a_burst_over_the_limit_fills_all_replicas(handle: DeploymentHandle) -> None:
    """Three rounds of 0.2 s: refused requests must find the places that become free, at once."""
    start_s = time.monotonic()
    burst = [ask(handle, digest_of(101), work_s=0.2) for _ in range(3 * 3 * MAX_ONGOING)]
    others = [ask(handle, digest_of(number)) for number in range(12)]
    counts = Counter(response.result(timeout_s=ANSWER_LIMIT_S)[0] for response in burst)
    for response in others:
        response.result(timeout_s=ANSWER_LIMIT_S)
    assert time.monotonic() - start_s < ANSWER_LIMIT_S
    assert len(counts) == 3 and min(counts.values()) >= MAX_ONGOING


def test_requests_that_ended_leave_nothing_behind_in_the_router(handle: DeploymentHandle) -> None:
    """Serve indexes requests by model id, and without its multiplex mixin never takes one out."""
    for number in range(50):
        who_answers(handle, digest_of(200 + number))
    gc.collect()
    assert sum(isinstance(thing, PendingRequest) for thing in gc.get_objects()) < 10


def test_decisions_are_on_the_prometheus_endpoint(handle: DeploymentHandle, metrics_url: str) -> None:
    names = ("decisions_total", "lookups_total", "hits_total")
    wanted = {f"ray_chameleon_routing_{name}" for name in names} | {"ray_chameleon_placement_age_s"}

    def exported() -> dict[str, str]:
        with suppress(httpx.HTTPError):
            lines = httpx.get(metrics_url).text.splitlines()
            return {line.partition("{")[0]: line for line in lines if line.startswith("ray_chameleon")}
        return {}

    who_answers(handle, digest_of(0))
    wait_until(lambda: wanted <= exported().keys(), "our metrics are exported")
    assert 'reason="' in exported()["ray_chameleon_routing_decisions_total"]


def test_a_killed_replica_is_routed_around_and_replaced(handle: DeploymentHandle, redis: RedisConfig) -> None:
    victim, pid = ask(handle, digest_of(0)).result(timeout_s=ANSWER_LIMIT_S)
    os.kill(pid, signal.SIGKILL)
    answered_by = [who_answers(handle, digest_of(number)) for number in range(24)]
    assert victim not in answered_by
    wait_until(lambda: victim not in live_replicas(redis), "the dead replica is forgotten")
    wait_until(lambda: len(live_replicas(redis)) == 3, "a replacement reports")
    wait_until(lambda: len({who_answers(handle) for _ in range(12)}) == 3, "the replacement gets requests")


def test_a_burst_while_replicas_die_is_answered_or_fails_clearly(handle: DeploymentHandle, redis: RedisConfig) -> None:
    _, pid = ask(handle, digest_of(1)).result(timeout_s=ANSWER_LIMIT_S)
    burst = [ask(handle, digest_of(number % 24), work_s=0.3) for number in range(48)]
    os.kill(pid, signal.SIGKILL)
    num_failed = 0
    for response in burst:
        try:
            response.result(timeout_s=ANSWER_LIMIT_S)
        except ray.exceptions.RayActorError:
            num_failed += 1
    assert num_failed <= MAX_ONGOING
    wait_until(lambda: len(live_replicas(redis)) == 3, "a replacement reports")


def test_an_error_in_the_ranking_falls_back_to_load_balancing(ray_cluster: None, redis: RedisConfig) -> None:
    own_prefix = redis.model_copy(update={"key_prefix": "test-failing"})
    handle = deploy(own_prefix, "failing", FailingRouter, num_replicas=2)
    try:
        responses = [ask(handle, digest_of(number), work_s=0.05) for number in range(20)]
        answered_by = {response.result(timeout_s=ANSWER_LIMIT_S)[0] for response in responses}
        assert len(answered_by) == 2
    finally:
        serve.delete("failing")
        shared_follower(own_prefix).close()


def test_without_redis_requests_are_routed_and_stay_affine(
    handle: DeploymentHandle, redis: RedisConfig, redis_server: BundledRedis
) -> None:
    follower = shared_follower(redis)
    before = {number: who_answers(handle, digest_of(number)) for number in range(12)}
    redis_server.stop()
    try:
        assert {number: who_answers(handle, digest_of(number)) for number in range(12)} == before
        wait_until(lambda: follower.view().age_s(time.monotonic()) > MAX_REPORT_AGE_S, "what is known gets too old")
        first, second = ({number: who_answers(handle, digest_of(number)) for number in range(12)} for _ in range(2))
        assert first == second and len(set(first.values())) > 1
    finally:
        redis_server.start()
    wait_until(lambda: follower.view().connected and len(live_replicas(redis)) == 3, "placement is whole again")
