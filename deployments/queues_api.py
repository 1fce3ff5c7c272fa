"""``/v1/chameleon/queues``: what the scheduler and the adapter cache of every replica hold, asked of the replicas."""

import asyncio
from collections.abc import Awaitable, Collection
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from chameleon_ray.engine.report import RECENT_S, Activity, PolicyReport
from chameleon_ray.policy.disciplines import UNLIMITED
from deployments.engine import EngineReports

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ANSWER_LIMIT_S = 2.0
"""A replica that takes longer is listed with an error instead."""


def replica_queues(replica_id: str, engine: EngineReports) -> dict[str, Any]:
    """One replica's part of the answer, as JSON.

    Without a report (vLLM schedules by itself, or no request so far) what the policy decides is left out.
    """
    load, found = engine.load(), engine.policy_report()
    answer: dict[str, Any] = {
        "replica": replica_id,
        "adapter_memory": engine.adapter_memory,
        "running": load.num_running,
        "waiting": load.num_waiting,
    } | _activity(engine.activity())
    return answer if found is None else answer | _report(*found)


def _activity(activity: Activity) -> dict[str, Any]:
    return {
        "kv_shares": {
            "requests": activity.kv_requests_share,
            "adapters": activity.kv_adapters_share,
            "free": activity.kv_free_share,
        },
        "recent": {
            "window_s": RECENT_S,
            "requests_per_s": activity.requests_per_s,
            "ttft_p50_s": activity.ttft_p50_s,
            "ttft_p95_s": activity.ttft_p95_s,
        },
        "latest_evictions": [asdict(eviction) for eviction in activity.evictions],
    }


def _report(report: PolicyReport, age_s: float) -> dict[str, Any]:
    state = _fields(report.queues)
    del state["running"]  # as in the queues
    return {
        "age_s": round(age_s, 3),
        "waiting_for": dict(report.waiting),
        "oldest_waiting_s": round(report.oldest_waiting_s, 3),
        "queues": [{"queue": index, **_fields(queue)} for index, queue in enumerate(state.pop("queues"))],
        "scheduler": state,
        "cache": _fields(report.cache)
        | {"max_blocks": report.limits.max_blocks, "num_blocks": report.limits.num_blocks},
        "predictions": asdict(report.accuracy),
    }


def _fields(part: "DataclassInstance") -> dict[str, Any]:
    """By name without ``num_``. JSON has no infinity: what has no bound is null."""
    values = {one.name.removeprefix("num_"): getattr(part, one.name) for one in fields(part)}
    return {
        name: None if isinstance(value, float | int) and value >= UNLIMITED else value for name, value in values.items()
    }


async def all_queues(replica: DeploymentHandle[Any], known: Collection[str]) -> list[dict[str, Any]]:
    """Every live replica's answer to ``queues``, by replica id; who does not answer in time is listed with ``error``.

    known: ids of the replicas that report themselves alive.
    """
    # Not ``results_async``: its time limit is for all together, and one silent replica would hide the others.
    found, problems = await _in_time([replica.broadcast("queues")._fetch_replica_results_async()])
    asked = [one for results in found for one in results]
    answers, more = await _in_time([one.get_async() for one in asked])
    problems += more
    silent = sorted(set(known) - {answer["replica"] for answer in answers})
    # A call that failed does not say whose it was.
    ids: list[str | None] = [*silent, *[None] * (len(problems) - len(silent))]
    why = " or ".join(sorted(set(problems))) or "it could not be reached"
    answers.sort(key=lambda answer: str(answer["replica"]))
    return answers + [{"replica": replica_id, "error": why} for replica_id in ids]


async def _in_time(calls: list[Awaitable[Any]]) -> tuple[list[Any], list[str]]:
    """What the calls returned, and what went wrong with the others."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        if tasks:
            await asyncio.wait(tasks, timeout=ANSWER_LIMIT_S)
        errors = [_error(task) for task in tasks]
        results = [task.result() for task, error in zip(tasks, errors, strict=True) if error is None]
        return results, [_said(error) for error in errors if error is not None]
    finally:
        for task in tasks:
            task.cancel()


def _error(task: asyncio.Future[Any]) -> BaseException | None:
    if not task.done():
        return TimeoutError()
    return asyncio.CancelledError("the call was cancelled") if task.cancelled() else task.exception()


def _said(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {ANSWER_LIMIT_S:g} s"
    if isinstance(error, RayActorError | DeploymentUnavailableError):
        return "it is not there any more"
    return f"{type(error).__name__}: {error}"
