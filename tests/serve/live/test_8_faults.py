"""Processes that die while the application is under load. Last of all files: here the application gets harmed."""

import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator

import psutil
import pytest
import redis

from chameleon_ray.adapters.record import AdapterRecord
from live.adapters import scaled_adapter
from live.calls import Load, complete, completion, error_of, text_of
from live.service import Service, assert_gone, wait_for

CLIENTS = 8
RESYNC_LIMIT_S = 10.0
UPLOADED, UNLOADED = "uploaded-before", "demo-r32-22"


def mixed(service: Service) -> list[dict[str, object]]:
    """Requests for the base and several adapters, streamed and not."""
    models = [service.base, *service.demo.adapter_names()[:6]]
    bodies = [completion(model, prompt=f"{model}: Once upon a time", max_tokens=24) for model in models]
    return [body | {"stream": streamed} for body in bodies for streamed in (True, False)]


def actor(_: Service, replica: psutil.Process) -> psutil.Process:
    return replica


def engine_core(service: Service, replica: psutil.Process) -> psutil.Process:
    return service.engine_processes(replica)[0]


@pytest.mark.parametrize("victim", [actor, engine_core])
def test_a_replica_that_dies_costs_only_what_it_had_begun_and_comes_back(
    service: Service, victim: Callable[[Service, psutil.Process], psutil.Process]
) -> None:
    before = {replica["replica"] for replica in service.placement()}

    def families() -> list[list[psutil.Process]]:
        """Actor, engine core and worker of each replica; none unless all are there. Forks share an actor's name."""
        found = [[replica, *service.engine_processes(replica)] for replica in service.replica_processes()]
        whole = [family for family in found if len(family) >= 3]
        return whole if len(whole) == service.num_replicas else []

    family = wait_for(families, "as many replicas with engines as there should be", 120.0, 1.0)[0]
    replica = family[0]
    with Load(service, mixed(service), CLIENTS) as load:
        wait_for(load.more(CLIENTS), "answers under load", 60.0)
        wait_for(lambda: all(one["load"]["num_running"] for one in service.placement()), "both replicas are busy")
        victim(service, replica).send_signal(signal.SIGKILL)
        assert_gone(family)
        wait_for(load.more(4 * CLIENTS), "answers after the death", 120.0)

    assert Counter(response.status_code for response in load.responses) == {200: len(load.responses)}, [
        response.text for response in load.responses if response.status_code != 200
    ]
    assert not [one for one in load.streams if one.ended == "cut"], "a stream was truncated without a word"
    failed = [one for one in load.streams if one.ended == "error"]
    assert len(failed) <= CLIENTS
    for one in failed:
        assert one.status == 200 and one.texts, f"not begun, but not tried elsewhere: {one}"
        assert (one.error["code"], one.error["type"]) == (502, "replica_died"), one.error

    def is_back() -> bool:
        text_of(complete(service, service.base))
        text_of(complete(service, "demo-r8-00"))
        return service.is_whole() and {one["replica"] for one in service.placement()} != before

    wait_for(is_back, "a new replica", 240.0, 1.0)
    assert len({one["replica"] for one in service.placement()} & before) == service.num_replicas - 1
    with Load(service, mixed(service), CLIENTS) as load:
        wait_for(lambda: all(one["load"]["num_running"] for one in service.placement()), "the new one works", 60.0)


@pytest.fixture
def changed_catalog(service: Service) -> Iterator[None]:
    """One adapter loaded, one of the configuration's unloaded."""
    folder = scaled_adapter(service.demo.adapters / "demo-r8-00", service.uploads / UPLOADED, 0.5)
    assert service.load(UPLOADED, folder).status_code == 200
    assert service.unload(UNLOADED).status_code == 200
    yield
    service.unload(UPLOADED)
    shutil.rmtree(folder)
    assert service.load(UNLOADED, service.demo.adapters / UNLOADED).status_code == 200


@pytest.mark.usefixtures("changed_catalog")
def test_nothing_but_catalog_writes_fails_without_redis_and_all_comes_back_after_an_empty_restart(
    service: Service,
) -> None:
    names, answer = set(service.adapter_names()), text_of(complete(service, UPLOADED))
    assert UPLOADED in names and UNLOADED not in names
    with Load(service, [*mixed(service), completion(UPLOADED)], CLIENTS) as load:
        wait_for(load.more(CLIENTS), "answers under load", 60.0)
        wait_for(lambda: len(placed(service)) >= 7, "placement of what is used")
        held = placed(service)
        assert service.redis.pid is not None
        os.kill(service.redis.pid, signal.SIGKILL)
        wait_for(lambda: service.http.get("/health").json()["status"] == "degraded", "degraded health")
        health = service.http.get("/health")
        assert (health.status_code, health.json()["redis"]) == (200, "disconnected")
        for response in (service.load("late", service.uploads / UPLOADED), service.unload(UPLOADED)):
            assert error_of(response, 503)["type"] == "catalog_unavailable"
            assert int(response.headers["Retry-After"]) >= 1
        wait_for(load.more(3 * CLIENTS), "answers without Redis", 60.0)
        assert set(service.adapter_names()) == names

        service.redis.start()
        began_s = time.monotonic()
        with redis.Redis.from_url(service.redis.url) as store:
            wait_for(lambda: service.http.get("/health").json()["status"] == "ok", "health", RESYNC_LIMIT_S)
            wait_for(lambda: names <= live_records(service, store), "the catalog in Redis", RESYNC_LIMIT_S)
            wait_for(lambda: held <= placed(service), "placement", RESYNC_LIMIT_S)
            assert time.monotonic() - began_s < RESYNC_LIMIT_S
            assert UNLOADED not in live_records(service, store)
        wait_for(load.more(2 * CLIENTS), "answers with Redis", 60.0)

    assert Counter(response.status_code for response in load.responses) == {200: len(load.responses)}
    assert {one.ended for one in load.streams} == {"done"}
    assert set(service.adapter_names()) == names
    assert text_of(complete(service, UPLOADED)) == answer
    error_of(complete(service, UNLOADED), 404)


def placed(service: Service) -> set[tuple[str, str]]:
    """(replica id, adapter) pairs of placement."""
    return {(replica["replica"], name) for replica in service.placement() for name in replica["adapters"]}


def live_records(service: Service, store: redis.Redis) -> set[str]:
    """Names of the adapters that Redis' own catalog holds."""
    records: dict[bytes, bytes] = store.hgetall(f"{service.key_prefix}:catalog")  # type: ignore[assignment]
    return {name.decode() for name, record in records.items() if not AdapterRecord.model_validate_json(record).deleted}
