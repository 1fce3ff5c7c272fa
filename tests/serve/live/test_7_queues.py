"""What can be seen of scheduler and adapter cache while the application runs: metrics, the endpoint, its view."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from live.calls import Load, complete, completion, text_of
from live.service import Metrics, Service, wait_for

CLIENTS = 12
METRICS_LIMIT_S = 60.0
ANSWER_LIMIT_S = 30.0
"""The endpoint gives replicas 2 s to be reached and 2 s to answer; a frozen one would take for ever."""


@pytest.fixture
def load(service: Service) -> Iterator[Load]:
    """Requests for the base and all adapters, which outlast what is looked at."""
    models = [service.base, *service.demo.adapter_names()]
    bodies = [completion(model, prompt=f"{model}: Once", max_tokens=40) for model in models]
    with Load(service, [body | {"stream": True} for body in bodies], CLIENTS) as running:
        wait_for(running.more(CLIENTS), "answers under load", 60.0)
        yield running
    assert {one.ended for one in running.streams} == {"done"}


def listed(service: Service) -> list[dict[str, Any]]:
    """The replicas as ``/v1/chameleon/queues`` lists them, also those that do not answer in time."""
    answer = service.http.get("/v1/chameleon/queues")
    assert answer.status_code == 200, answer.text
    return list(answer.json()["replicas"])


def queues(service: Service) -> list[dict[str, Any]]:
    """What all replicas say of themselves; on a busy machine one may need to be asked twice."""

    def all_answer() -> list[dict[str, Any]]:
        replicas = listed(service)
        return [] if any("error" in one for one in replicas) else replicas

    return wait_for(all_answer, "all replicas answer")


@pytest.mark.usefixtures("load")
def test_queues_of_all_replicas_show_what_runs(service: Service) -> None:
    ids = {one["replica"] for one in service.placement()}

    def all_run() -> bool:
        return all(sum(queue["running"] for queue in one["queues"]) > 0 for one in queues(service))

    wait_for(all_run, "every replica has running requests in its queues", 30.0)
    for one in queues(service):
        assert one["replica"] in ids
        assert one["adapter_memory"] == "paged"
        assert 1 <= len(one["queues"]) <= 4
        assert [queue["queue"] for queue in one["queues"]] == list(range(len(one["queues"])))
        assert one["queues"][-1]["max_size"] is None
        assert all(queue["quota_tokens"] is None for queue in one["queues"]), "no queue reserves tokens"
        assert 0 <= one["age_s"] < 30 and 0 <= one["oldest_waiting_s"] < 60
        assert one["scheduler"]["admissions"] > 0
        cache = one["cache"]
        assert 0 < cache["blocks_held"] <= cache["max_blocks"] < cache["num_blocks"]
        assert 0 < cache["adapters_resident"] <= cache["adapters_known"] <= len(service.adapter_names())
        assert one["predictions"]["num_requests"] > 0
        assert 0 <= one["predictions"]["right_bucket_share"] <= 1
    assert {one["replica"] for one in queues(service)} == ids

    command = [str(Path(sys.executable).parent / "chameleon"), "queues", "--url", service.url]
    view = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert view.returncode == 0, view.stderr
    assert all(f"replica {replica_id}: " in view.stdout for replica_id in ids), view.stdout
    assert "resident on arrival" in view.stdout and "admissions" in view.stdout


@pytest.fixture
def frozen(service: Service) -> Iterator[psutil.Process]:
    """A replica's process that does nothing for a while, and has done nothing wrong."""
    process = service.replica_processes()[0]
    process.suspend()
    try:
        yield process
    finally:
        process.resume()
        queues(service)


@pytest.mark.usefixtures("frozen")
def test_a_replica_that_does_not_answer_is_listed_and_holds_up_nobody(service: Service) -> None:
    began_s = time.monotonic()
    answers = listed(service)
    assert time.monotonic() - began_s < ANSWER_LIMIT_S
    assert len(answers) == service.num_replicas
    [silent] = [one for one in answers if "error" in one]
    assert "no answer within" in silent["error"]
    assert silent["replica"] in {one["replica"] for one in service.placement()}
    assert "scheduler" in next(one for one in answers if "error" not in one)


def test_metrics_of_cache_and_scheduler(service: Service) -> None:
    def by_metrics() -> dict[str, float]:
        metrics = service.metrics()

        def total(name: str, **labels: str) -> float:
            return metrics.total(f"ray_chameleon_{name}", **labels)

        names = ("admissions", "queue_refreshes", "squashes", "adapter_hits", "adapter_misses", "adapter_evictions")
        return {name: total(f"{name}_total") for name in names} | {
            "waits": total("queue_wait_s_count"),
            "fetches": total("adapter_loads_total", stage="fetch"),
            "loads": total("adapter_loads_total", stage="load"),
            "timed loads": total("adapter_load_s_count", stage="load"),
        }

    def by_replicas() -> dict[str, float]:
        caches, schedulers = ([one[what] for one in queues(service)] for what in ("cache", "scheduler"))

        def added(parts: list[Any], name: str) -> float:
            return float(sum(part[name] for part in parts))

        return {
            "admissions": added(schedulers, "admissions"),
            "queue_refreshes": added(schedulers, "refreshes"),
            "squashes": added(schedulers, "squashes"),
            "adapter_hits": added(caches, "hits"),
            "adapter_misses": added(caches, "misses"),
            "adapter_evictions": float(sum(sum(cache["evictions"].values()) for cache in caches)),
            "waits": added(schedulers, "admissions"),
            "fetches": added(caches, "fetches"),
            "loads": added(caches, "loads"),
            "timed loads": added(caches, "loads"),
        }

    before = by_replicas()
    for name in (service.base, *service.adapter_names()[:5]):
        text_of(complete(service, name))
    after = by_replicas()
    assert after["admissions"] == before["admissions"] + 6
    assert sum(after[name] - before[name] for name in ("adapter_hits", "adapter_misses")) == 5
    assert after["loads"] > 0 and after["fetches"] > 0 and after["queue_refreshes"] > 0
    wait_for(lambda: by_metrics() == by_replicas(), "the replicas' own counts", METRICS_LIMIT_S, 0.5)

    def gauges() -> dict[str, float]:
        metrics = service.metrics()
        names = ("adapter_blocks", "adapter_blocks_limit", "adapter_bytes", "adapter_host_bytes", "queues")
        names += ("quota_minima_scale", "length_accuracy", "adapters")
        found = {name: metrics.total(f"ray_chameleon_{name}") for name in names}
        return found if all(found.values()) else {}

    found = wait_for(gauges, "gauges", METRICS_LIMIT_S, 0.5)
    assert found["adapter_blocks"] <= found["adapter_blocks_limit"]

    def idle() -> Metrics | None:
        """A look that finds all gauges: Ray shows one for a while after it was set."""
        metrics, replicas = service.metrics(), {one["replica"] for one in service.placement()}
        zero = ("queue_waiting", "queue_running", "queue_used_tokens", "adapter_loads_in_flight", "queue_quota_tokens")
        for name in (*zero, "length_error_tokens", "waiting_requests", "queue_cutoff", "queues"):
            if {labels["replica"] for labels, _ in metrics.samples(f"ray_chameleon_{name}")} != replicas:
                return None
        return metrics if not any(metrics.total(f"ray_chameleon_{name}") for name in zero) else None

    metrics = wait_for(idle, "gauges of an idle service whose default scheduler has no quotas", METRICS_LIMIT_S, 0.5)
    errors = [value for _, value in metrics.samples("ray_chameleon_length_error_tokens")]
    assert min(errors) >= 0, "the demo's answers end at max_tokens, so that lengths can all be right"
    assert {labels["reason"] for labels, _ in metrics.samples("ray_chameleon_waiting_requests")} == {
        *("inspection", "fetch", "room", "load", "turn")
    }
    for name in ("queue_waiting", "queue_wait_s_count", "queue_cutoff"):
        assert {labels["queue"] for labels, _ in metrics.samples(f"ray_chameleon_{name}")} <= {"0", "1", "2", "3"}


@pytest.mark.usefixtures("load")
def test_vllms_metric_names_the_running_adapters_as_clients_do(service: Service) -> None:
    def states() -> list[Any]:
        return [labels for labels, _ in service.samples("ray_vllm_lora_requests_info")]

    def named() -> set[str]:
        return {name for labels in states() for name in labels["running_lora_adapters"].split(",") if name}

    wait_for(named, "running adapters", METRICS_LIMIT_S, 0.5)
    assert named() <= set(service.adapter_names())
    most = "as many adapters as requests run at once"
    wait_for(lambda: {labels["max_lora"] for labels in states()} == {"64"}, most, METRICS_LIMIT_S, 0.5)
