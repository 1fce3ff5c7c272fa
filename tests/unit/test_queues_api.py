"""The answer of ``/v1/chameleon/queues``: who answers, who does not, and what a replica says."""

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from queue_room import queues, request, step
from ray.exceptions import ActorUnavailableError
from ray.serve._private.replica_result import ReplicaResult
from ray.serve.handle import DeploymentBroadcastResponse

from chameleon_ray.engine.report import WAITING_FOR, Activity, MemoryLimits, PolicyReport, RecentEviction
from chameleon_ray.policy.adapter import Adapter
from chameleon_ray.policy.cache import AdapterCache
from chameleon_ray.policy.cache_types import CacheConfig
from chameleon_ray.predictor.lengths import PredictionAccuracy
from chameleon_ray.routing.replica_load import ReplicaLoad
from deployments import queues_api
from deployments.queues_api import all_queues, replica_queues


class Engine:
    """What ``replica_queues`` asks an ``EngineServer``."""

    adapter_memory = "paged"

    def __init__(self, report: PolicyReport | None) -> None:
        self._report = report

    def load(self) -> ReplicaLoad:
        return ReplicaLoad(num_running=3, num_waiting=2, max_num_seqs=8)

    def activity(self) -> Activity:
        return Activity(0.5, 0.125, 2.5, 0.1, 0.4, (RecentEviction("pirate", "load", 1.5),))

    def policy_report(self) -> tuple[PolicyReport, float] | None:
        return None if self._report is None else (self._report, 0.25)


def report(scheduler: str) -> PolicyReport:
    """Two of four requests run, of a cache with one adapter."""
    waiting, cache = queues(scheduler, max_num_seqs=8), AdapterCache(CacheConfig(max_blocks=4, adapter_host_bytes=4000))
    for number, tokens in enumerate((10, 60, 110, 160)):
        waiting.add(request(f"r{number}", tokens), 0.0)
    step(waiting, max_admitted=2)
    cache.add(Adapter("a" * 64, 8, 1000), 2)
    limits = MemoryLimits(block_bytes=500, max_blocks=4, num_blocks=8, adapter_host_bytes=4000)
    kinds = dict.fromkeys(WAITING_FOR, 0) | {"turn": 2}
    return PolicyReport(cache.stats(), waiting.state(), PredictionAccuracy().snapshot(), limits, kinds, 1.5, 0)


def test_a_replicas_answer_is_json_without_infinities() -> None:
    answer = json.loads(json.dumps(replica_queues("r", Engine(report("static"))), allow_nan=False))
    assert (answer["replica"], answer["adapter_memory"], answer["running"], answer["waiting"]) == ("r", "paged", 3, 2)
    assert (answer["age_s"], answer["oldest_waiting_s"]) == (0.25, 1.5)
    assert answer["waiting_for"] == {"inspection": 0, "fetch": 0, "room": 0, "load": 0, "turn": 2}
    assert [queue["queue"] for queue in answer["queues"]] == [0, 1, 2, 3]
    sizes = [queue["max_size"] for queue in answer["queues"]]
    assert sizes[:3] == sorted(sizes[:3]) and sizes[3] is None
    assert sum(queue["running"] for queue in answer["queues"]) == 2 == answer["scheduler"]["admissions"]
    assert sum(queue["waiting"] for queue in answer["queues"]) == 2
    assert all(queue["quota_tokens"] > 0 for queue in answer["queues"])
    assert sum(queue["used_tokens"] for queue in answer["queues"]) > 0
    assert (answer["cache"]["max_blocks"], answer["cache"]["adapters_known"]) == (4, 1)
    assert answer["cache"]["evictions"]["kv_pressure"] == 0
    assert answer["predictions"]["right_bucket_share"] is None


def test_a_queue_without_quota_says_so() -> None:
    [queue] = replica_queues("r", Engine(report("fifo")))["queues"]
    assert (queue["quota_tokens"], queue["max_size"]) == (None, None)


def test_without_a_report_what_the_policy_decides_is_left_out() -> None:
    engine = Engine(None)
    engine.adapter_memory = "stock"
    assert replica_queues("r", engine) == {
        "replica": "r",
        "adapter_memory": "stock",
        "running": 3,
        "waiting": 2,
        "kv_shares": {"requests": 0.5, "adapters": 0.125, "free": 0.375},
        "recent": {"window_s": 10.0, "requests_per_s": 2.5, "ttft_p50_s": 0.1, "ttft_p95_s": 0.4},
        "latest_evictions": [{"adapter": "pirate", "reason": "load", "age_s": 1.5}],
    }


def test_what_is_used_of_ray_beyond_its_public_interface() -> None:
    assert inspect.iscoroutinefunction(DeploymentBroadcastResponse._fetch_replica_results_async)
    assert inspect.iscoroutinefunction(ReplicaResult.get_async)


class Asked:
    """A call that a replica was sent, as Serve's ``ReplicaResult``."""

    def __init__(self, answer: Callable[[], Awaitable[Any]]) -> None:
        self._answer = answer

    async def get_async(self) -> Any:
        return await self._answer()


class Handle:
    """A deployment of such replicas; ``found`` replaces the list of them."""

    def __init__(
        self, *answers: Callable[[], Awaitable[Any]], found: Callable[[], Awaitable[Any]] | None = None
    ) -> None:
        self._answers = answers
        self._found = found

    def broadcast(self, method: str) -> "Handle":
        assert method == "queues"
        return self

    async def _fetch_replica_results_async(self) -> Any:
        return await self._found() if self._found else [Asked(answer) for answer in self._answers]


def answers_as(replica_id: str) -> Callable[[], Awaitable[Any]]:
    async def answer() -> Any:
        return {"replica": replica_id}

    return answer


def raises(error: BaseException) -> Callable[[], Awaitable[Any]]:
    async def answer() -> Any:
        raise error

    return answer


async def never() -> Any:
    await asyncio.Event().wait()


@pytest.fixture(autouse=True)
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues_api, "ANSWER_LIMIT_S", 0.3)


def ask(handle: Handle, known: list[str]) -> list[dict[str, Any]]:
    async def bounded() -> list[dict[str, Any]]:
        async with asyncio.timeout(60):
            rows = await all_queues(handle, known)  # type: ignore[arg-type]
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)  # what was given up must end
        return rows

    return asyncio.run(bounded())


def test_all_answer_by_id_also_those_that_redis_does_not_know() -> None:
    assert ask(Handle(answers_as("b"), answers_as("a")), ["a"]) == [{"replica": "a"}, {"replica": "b"}]


def test_who_does_not_answer_in_time_is_listed_with_an_error_and_hides_nobody() -> None:
    rows = ask(Handle(never, answers_as("a")), ["a", "b"])
    assert rows == [{"replica": "a"}, {"replica": "b", "error": "no answer within 0.3 s"}]


def test_a_replica_that_died_is_listed_while_it_counts_as_alive() -> None:
    dead = raises(ActorUnavailableError("gone", b"0" * 16))
    assert ask(Handle(answers_as("a"), dead), ["a", "b"])[1] == {"replica": "b", "error": "it is not there any more"}
    # Serve has taken it out already, Redis has not yet.
    assert ask(Handle(answers_as("a")), ["a", "b"])[1] == {"replica": "b", "error": "it could not be reached"}


def test_a_failure_of_somebody_unknown_is_not_swallowed() -> None:
    rows = ask(Handle(raises(ValueError("bad")), raises(asyncio.CancelledError()), answers_as("a")), ["a"])
    assert [row["replica"] for row in rows] == ["a", None, None]
    assert "ValueError: bad" in rows[1]["error"] and "cancelled" in rows[2]["error"]


def test_serve_that_does_not_answer_at_all() -> None:
    assert ask(Handle(found=never), ["a"]) == [{"replica": "a", "error": "no answer within 0.3 s"}]
    assert ask(Handle(found=never), []) == [{"replica": None, "error": "no answer within 0.3 s"}]
