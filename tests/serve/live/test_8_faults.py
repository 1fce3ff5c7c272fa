"""Processes that die while the application is under load. Last of all files: here the application gets harmed."""

import os
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import psutil
import pytest
import redis
from adapter_files import scaled_adapter

from chameleon_ray.adapters.record import AdapterRecord
from live.browser import Page, browser_page
from live.calls import Load, Stream, complete, completion, concurrently, error_of, stream, text_of
from live.service import WHOLE_LIMIT_S, Service, assert_gone, wait_for

CLIENTS = 8
NUM_LONG = 450
RESYNC_LIMIT_S = 60.0
UPLOADED, UNLOADED = "uploaded-before", "demo-r32-22"


def mixed(service: Service) -> list[dict[str, object]]:
    """Requests for the base and several adapters, streamed and not."""
    models = [service.base, *service.demo.adapter_names()[:6]]
    bodies = [completion(model, prompt=f"{model}: Once upon a time", max_tokens=24) for model in models]
    return [body | {"stream": streamed} for body in bodies for streamed in (True, False)]


def long(service: Service) -> list[dict[str, object]]:
    """Greedy requests that run for seconds, for the base and for adapters."""
    models = [service.base, *service.demo.adapter_names()[:3]]
    more = {"ignore_eos": True, "stream_options": {"include_usage": True}}
    return [completion(model, prompt=f"{model}: The old captain", max_tokens=NUM_LONG) | more for model in models]


def whole_of(body: dict[str, object]) -> dict[str, object]:
    """The same request, not streamed."""
    return {name: value for name, value in body.items() if name != "stream_options"}


def wait_idle(service: Service) -> None:
    """Until replicas report, after this call, that they run nothing: what they report to run later is later's."""
    began_s = time.monotonic()

    def is_idle() -> bool:
        since_s = time.monotonic() - began_s
        return all(one["age_s"] < since_s and not one["load"]["num_running"] for one in service.placement())

    wait_for(is_idle, "idle replicas", 60.0)


def busiest(service: Service) -> str:
    """Id of the replica that reports to run most requests; empty while none reports any."""
    one = max(service.placement(), key=lambda replica: int(replica["load"]["num_running"]))
    return str(one["replica"]) if one["load"]["num_running"] else ""


def id_of(replica: psutil.Process) -> str:
    """Its id in placement, from the name of the log that it writes."""
    names = (re.search(r"replica_chameleon_Replica_(\w+)\.log$", file.path) for file in replica.open_files())
    return next(name[1] for name in names if name)


def actor(_: Service, replica: psutil.Process) -> psutil.Process:
    return replica


def engine_core(service: Service, replica: psutil.Process) -> psutil.Process:
    return service.engine_processes(replica)[0]


@pytest.fixture
def page() -> Iterator[Page]:
    with browser_page() as page:
        yield page


def test_a_replica_that_stands_still_keeps_no_answer(service: Service) -> None:
    undisturbed = concurrently([partial(stream, service, body) for body in long(service)], clients=CLIENTS)
    replica = service.replica_processes()[0]
    seen = [Stream() for _ in range(2 * len(undisturbed))]
    with ThreadPoolExecutor(len(seen)) as pool:
        streams = [pool.submit(stream, service, *one) for one in zip(2 * long(service), seen, strict=True)]
        wait_for(lambda: all(len(one.texts) > 5 for one in seen), "all streams have begun", 60.0, 0.01)
        replica.suspend()
        try:
            wait_for(lambda: all(one.done() for one in streams), "all answers", 60.0)
        finally:
            replica.resume()
    for one, reference in zip(seen, 2 * undisturbed, strict=True):
        assert (one.text, one.reasons, one.usage, one.ended) == (reference.text, ["length"], reference.usage, "done")


@pytest.mark.parametrize("victim", [actor, engine_core])
def test_a_replica_that_dies_costs_no_answer_and_comes_back(
    service: Service, page: Page, victim: Callable[[Service, psutil.Process], psutil.Process]
) -> None:
    before = {replica["replica"] for replica in service.placement()}
    expected = {body["prompt"]: text_of(complete(service, **(body | {"stream": False}))) for body in mixed(service)}
    undisturbed = concurrently([partial(stream, service, body) for body in long(service)], clients=CLIENTS)
    resumed = service.metric("ray_chameleon_migrations_total", outcome="resumed")

    def families() -> list[list[psutil.Process]]:
        """Actor, engine core and worker of each replica; none unless all are there. Forks share an actor's name."""
        found = [[replica, *service.engine_processes(replica)] for replica in service.replica_processes()]
        whole = [family for family in found if len(family) >= 3]
        return whole if len(whole) == service.num_replicas else []

    page.open(f"{service.url}/chameleon/")
    wait_for(lambda: page.text("#status").startswith("2 of 2 replicas answer"), "both replicas on the page")
    found = wait_for(families, "as many replicas with engines as there should be", WHOLE_LIMIT_S, 1.0)
    wait_idle(service)
    families_of = {id_of(family[0]): family for family in found}
    seen = [Stream() for _ in undisturbed]
    streams = []
    with ExitStack() as clients:
        pool = clients.enter_context(ThreadPoolExecutor(2 * len(seen) + 1))
        for body, one in zip(long(service), seen, strict=True):
            streams.append(pool.submit(stream, service, body, one))
        wholes = [pool.submit(service.http.post, "/v1/completions", json=whole_of(body)) for body in long(service)]
        body = completion(service.base, max_tokens=NUM_LONG, temperature=1.0, ignore_eos=True)
        sampled = pool.submit(stream, service, body)
        wait_for(lambda: all(len(one.texts) > 5 for one in seen), "all streams have begun", 60.0, 0.01)
        family = families_of[wait_for(partial(busiest, service), "a replica reports that it runs them")]
        load = clients.enter_context(Load(service, mixed(service), CLIENTS))
        wait_for(load.more(1), "an answer under load", 60.0, 0.01)
        assert not any(one.done() for one in streams)
        victim(service, family[0]).send_signal(signal.SIGKILL)
        assert_gone(family)
        wait_for(lambda: "left: it reports no more" in page.text("#log"), "the death on the page")
        wait_for(lambda: len(page.table("#adapters")[0]) == 2, "one replica on the page")
        wait_for(load.more(4 * CLIENTS), "answers after the death", 120.0)

    for one, reference in zip(seen, undisturbed, strict=True):
        assert (one.text, one.reasons, one.usage, one.ended) == (reference.text, ["length"], reference.usage, "done")
        assert one.usage["completion_tokens"] == NUM_LONG
    for whole, reference in zip(wholes, undisturbed, strict=True):
        assert text_of(whole.result()) == reference.text
        answer = whole.result().json()
        assert answer["usage"].items() >= reference.usage.items()
        assert answer["choices"][0]["finish_reason"] == "length"
    assert (sampled.result().ended, sampled.result().reasons) == ("done", ["length"])
    assert {one.ended for one in load.streams} == {"done"}, [one for one in load.streams if one.ended != "done"]
    for response in load.responses:
        assert text_of(response) in expected.values()
    assert {one.text for one in load.streams} <= set(expected.values())
    wait_for(
        lambda: service.metric("ray_chameleon_migrations_total", outcome="resumed") > resumed, "it is counted", 60.0
    )

    def is_back() -> bool:
        text_of(complete(service, service.base))
        text_of(complete(service, "demo-r8-00"))
        return service.is_whole() and {one["replica"] for one in service.placement()} != before

    wait_for(is_back, "a new replica", 240.0, 1.0)
    now = {one["replica"] for one in service.placement()}
    wait_for(lambda: set(page.table("#adapters")[0][1:]) == now, "the new replica on the page")
    [new] = now - before
    assert f"replica {new} joined" in page.text("#log")
    wait_for(lambda: page.text("#status").startswith("2 of 2 replicas answer"), "both replicas on the page")
    assert not page.problems
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
        with redis.Redis.from_url(service.redis.url) as store:
            wait_for(lambda: service.http.get("/health").json()["status"] == "ok", "health", RESYNC_LIMIT_S)
            wait_for(lambda: names <= live_records(service, store), "the catalog in Redis", RESYNC_LIMIT_S)
            wait_for(lambda: held <= placed(service), "placement", RESYNC_LIMIT_S)
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
