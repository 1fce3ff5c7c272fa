"""``/v1/chameleon/queues``: what the scheduler and the adapter cache of every replica hold, asked of the replicas."""

import asyncio
from collections.abc import Awaitable, Collection
from dataclasses import asdict
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from chameleon_ray.engine.report import PolicyReport
from chameleon_ray.policy.admission import QueueState
from chameleon_ray.policy.disciplines import UNLIMITED

ANSWER_LIMIT_S = 2.0
"""A replica that takes longer is listed with an error instead."""


def replica_queues(replica_id: str, engine: Any) -> dict[str, Any]:
    """One replica's part of the answer, as JSON. engine: an ``EngineServer``.

    Without a report (adapters in vLLM's slots, or no request so far) only ``running`` and ``waiting`` are known.
    """
    load, found = engine.load(), engine.policy_report()
    answer: dict[str, Any] = {
        "replica": replica_id,
        "adapter_memory": engine.adapter_memory,
        "running": load.num_running,
        "waiting": load.num_waiting,
    }
    return answer if found is None else answer | _report(*found)


def _report(report: PolicyReport, age_s: float) -> dict[str, Any]:
    state, cache = report.queues, asdict(report.cache)
    return {
        "age_s": round(age_s, 3),
        "waiting_for": dict(report.waiting),
        "oldest_waiting_s": round(report.oldest_waiting_s, 3),
        "queues": [_queue(index, queue) for index, queue in enumerate(state.queues)],
        "scheduler": {
            "admissions": state.num_admissions,
            "bypasses": state.num_bypasses,
            "squashes": state.num_squashes,
            "refreshes": state.num_refreshes,
            "holds": state.num_holds,
            "minima_scale": state.minima_scale,
        },
        "cache": cache | {"max_blocks": report.limits.max_blocks, "num_blocks": report.limits.num_blocks},
        "predictions": asdict(report.accuracy),
    }


def _queue(index: int, queue: QueueState) -> dict[str, Any]:
    """JSON has no infinity: what has no bound is null."""
    return {
        "queue": index,
        "max_size": None if queue.max_size == float("inf") else queue.max_size,
        "waiting": queue.num_waiting,
        "loading": queue.num_loading,
        "running": queue.num_running,
        "max_running": None if queue.max_running >= UNLIMITED else queue.max_running,
        "quota_tokens": None if queue.quota_tokens >= UNLIMITED else queue.quota_tokens,
        "used_tokens": queue.used_tokens,
    }


async def all_queues(replica: DeploymentHandle, known: Collection[str]) -> list[dict[str, Any]]:
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
