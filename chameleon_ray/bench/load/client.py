"""Sending requests when they are due, whatever the server does, and timing the streams that come back.

All times count from when a request was due, not from when it was sent: a client that falls behind makes a server look
slower, never faster. How far it fell behind is recorded as well.
"""

import asyncio
import json
import time
from array import array
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import Any

import aiohttp

from chameleon_ray.bench.load.prompts import Prompts
from chameleon_ray.bench.load.workload import PlannedRequest

KEEP_ALIVE_S = 2.0
"""Idle connections close before the server's side would (uvicorn: 5 s), so that no request meets a closing one."""
UNFINISHED = "unfinished"
SETTLE_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Prepared:
    """A planned request and its HTTP body, made before the clock starts."""

    plan: PlannedRequest
    body: bytes


@dataclass(slots=True)
class Outcome:
    """What became of one request; seconds since it was due.

    late_s: until it was sent. ttft_s: first token. e2e_s: end of the answer, only when that was complete.
    gaps_s: between the events that carry tokens. error: a short kind, None for a complete answer; message: its text.
    num_prompt_tokens, num_output_tokens: the server's count, else as asked and the number of events.
    queued_s: until the engine admitted it, by the engine's own clock; None where the server does not tell (vLLM does
    with ``--enable-per-request-metrics``). What a preempted request waits again is not in it.
    """

    plan: PlannedRequest
    late_s: float = 0.0
    ttft_s: float | None = None
    e2e_s: float | None = None
    gaps_s: "array[float]" = field(default_factory=lambda: array("d"))
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    queued_s: float | None = None
    error: str | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class Window:
    """Outcomes of a stretch of time; elapsed_s: from its start to the last answer; client_cpu_s: this process's."""

    outcomes: list[Outcome]
    elapsed_s: float
    client_cpu_s: float


class _AnswerError(Exception):
    """The answer is no complete stream of tokens."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def prepare(plans: Sequence[PlannedRequest], prompts: Prompts) -> list[Prepared]:
    """The bodies of streamed completions that run to their full length."""
    return [Prepared(plan, _body(plan, prompts)) for plan in plans]


def _body(plan: PlannedRequest, prompts: Prompts) -> bytes:
    fields: dict[str, Any] = {
        "model": plan.model,
        "prompt": prompts.text(plan.num_prompt_tokens),
        "max_tokens": plan.num_output_tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(fields).encode()


class Client:
    """Sends to one server."""

    def __init__(self, session: aiohttp.ClientSession, url: str):
        self._session = session
        self._url = f"{url}/v1/completions"

    async def open_loop(
        self, requests: Sequence[Prepared], drain_limit_s: float, done: Callable[[Outcome], None]
    ) -> Window:
        """Send each request when it is due, then wait for the answers.

        What is not answered ``drain_limit_s`` after the last was sent is cancelled and counts as UNFINISHED.
        """
        began_s, cpu_s = perf_counter(), time.process_time()
        tasks = {}
        try:
            for request in requests:
                due_s = began_s + request.plan.at_s
                if (wait_s := due_s - perf_counter()) > 0:
                    await asyncio.sleep(wait_s)
                outcome = Outcome(request.plan)
                tasks[asyncio.create_task(self._send(request.body, outcome, due_s, done))] = outcome
            if tasks:
                await asyncio.wait(tasks, timeout=drain_limit_s)
            elapsed_s, cpu_s = perf_counter() - began_s, time.process_time() - cpu_s
            was_cut = [task for task in tasks if not task.done()]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in was_cut:
            tasks[task].error, tasks[task].message = UNFINISHED, f"no end {drain_limit_s:.0f} s after the last request"
        for task, outcome in tasks.items():
            if not task.cancelled():
                task.result()  # a bug of ours must not pass for a slow server
            if task in was_cut:
                done(outcome)
        return Window(list(tasks.values()), elapsed_s, cpu_s)

    async def send_one(self, request: Prepared, done: Callable[[Outcome], None]) -> Outcome:
        """Send a request now and wait for its answer."""
        outcome = Outcome(request.plan)
        await self._send(request.body, outcome, perf_counter(), done)
        return outcome

    async def settle(self, request: Prepared) -> None:
        """Wait until the server answers a single request again, after others were cancelled."""
        async with asyncio.timeout(SETTLE_LIMIT_S):
            await self.send_one(request, lambda _: None)

    async def _send(self, body: bytes, outcome: Outcome, due_s: float, done: Callable[[Outcome], None]) -> None:
        outcome.late_s = perf_counter() - due_s
        try:
            async with self._session.post(self._url, data=body) as answer:
                if answer.status != 200:
                    raise _AnswerError(f"http_{answer.status}", (await answer.text())[:300])
                await self._read(answer, outcome, due_s)
        except _AnswerError as error:
            outcome.error, outcome.message = error.kind, str(error)
        except TimeoutError as error:
            outcome.error, outcome.message = "timeout", str(error)
        except aiohttp.ClientPayloadError as error:
            outcome.error, outcome.message = "truncated", str(error)
        except (aiohttp.ClientError, OSError) as error:
            outcome.error, outcome.message = "connection", repr(error)
        done(outcome)

    async def _read(self, answer: aiohttp.ClientResponse, outcome: Outcome, due_s: float) -> None:
        """Note when each event comes; look into the last only, the one that may carry the usage."""
        times_s = array("d")
        last, ended = b"", False
        async for event in _events(answer):
            if event == b"[DONE]":
                ended = True
                break
            if b'"error"' in event and (error := _fields(event).get("error")):
                raise _AnswerError("stream_error", str(error)[:300])
            times_s.append(perf_counter() - due_s)
            if len(times_s) == 1:
                outcome.ttft_s = times_s[0]
            last = event
        end_s = perf_counter() - due_s
        if not ended:
            raise _AnswerError("truncated", f"the stream ended without [DONE] after {len(times_s)} events")
        fields = _fields(last) if last else {}
        if fields.get("usage") and not fields.get("choices"):
            times_s.pop()
        if not times_s:
            outcome.ttft_s = None
            raise _AnswerError("empty", "the stream held no tokens")
        usage = fields.get("usage") or {}
        queued_ms = (fields.get("metrics") or {}).get("queue_time_ms")
        outcome.queued_s = None if queued_ms is None else queued_ms / 1e3
        outcome.num_prompt_tokens = usage.get("prompt_tokens", outcome.plan.num_prompt_tokens)
        outcome.num_output_tokens = usage.get("completion_tokens", len(times_s))
        outcome.gaps_s = array("d", (after - before for before, after in pairwise(times_s)))
        outcome.e2e_s = end_s


def _fields(event: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(event)
    except ValueError as error:
        raise _AnswerError("malformed", f"{error}: {event[:200]!r}") from error
    if not isinstance(fields, dict):
        raise _AnswerError("malformed", f"not a JSON object: {event[:200]!r}")
    return fields


async def _events(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The data of server-sent events, one line each."""
    rest = b""
    async for chunk in answer.content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


@asynccontextmanager
async def session(headers: Mapping[str, str], request_limit_s: float) -> AsyncIterator[aiohttp.ClientSession]:
    """Connections without a limit on their number: an open loop must never wait for one."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
    limit = aiohttp.ClientTimeout(total=request_limit_s)
    all_headers = {"Content-Type": "application/json", **headers}
    async with aiohttp.ClientSession(connector=connector, timeout=limit, headers=all_headers) as opened:
        yield opened
