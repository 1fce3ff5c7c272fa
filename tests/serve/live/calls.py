"""Requests as clients send them, and streams read to the letter."""

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx

from live.service import ANSWER_LIMIT_S


class Served(Protocol):
    """An application that answers over HTTP."""

    url: str
    http: httpx.Client


def completion(model: str, prompt: str | list[int] = "Once upon a time", max_tokens: int = 4, **more: Any) -> Any:
    """The body of a greedy completion request."""
    return {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0} | more


def complete(service: Served, model: str, **fields: Any) -> httpx.Response:
    """A completion that is not streamed."""
    return service.http.post("/v1/completions", json=completion(model, **fields))


def text_of(response: httpx.Response) -> str:
    """The text of a completion; fails when it is an error."""
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The ``error`` of a response in OpenAI's shape; fails when it is something else."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/json")
    body = response.json()
    assert body.keys() == {"error"}, body
    error: dict[str, Any] = body["error"]
    assert error["message"] and isinstance(error["message"], str), error
    assert error["type"] and isinstance(error["type"], str), error
    assert error["code"] == status, error
    assert "param" in error
    return error


@dataclass
class Stream:
    """What a client has of a streamed completion.

    ended: ``done`` after ``[DONE]``; ``error`` after an error event or an error response (then in ``error``); ``cut``
    when the body just stopped. reasons: each ``finish_reason``. usage: of the last event, where it was asked for.
    """

    texts: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    status: int = 0
    ended: str = "cut"
    error: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The whole answer so far."""
        return "".join(self.texts)

    def take(self, line: str) -> None:
        """One line of the body."""
        if not line:
            return
        assert line.startswith("data: "), line
        if line == "data: [DONE]":  # vLLM sends it after its own error events as well
            assert self.ended != "done"
            self.ended = "error" if self.error else "done"
            return
        assert self.ended == "cut", f"after the stream's end: {line}"
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            self.ended, self.error = "error", event["error"]
        else:
            self.texts.extend(choice["text"] for choice in event["choices"])
            self.reasons.extend(choice["finish_reason"] for choice in event["choices"] if choice.get("finish_reason"))
            self.usage = event.get("usage") or self.usage


def stream(service: Served, body: Any, seen: Stream | None = None) -> Stream:
    """A streamed completion, read to its end; ``seen`` grows meanwhile."""
    seen = seen or Stream()
    with service.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        seen.status = response.status_code
        if response.status_code != 200:
            seen.ended, seen.error = "error", json.loads(response.read())["error"]
            return seen
        try:
            for line in response.iter_lines():
                seen.take(line)
        except httpx.RemoteProtocolError:  # the chunked body has no end
            assert seen.ended == "cut"
    return seen


class Load:
    """Requests that keep coming from several clients until ``stop``: ``with Load(service, bodies, clients=8) as load``.

    Each body is sent as it is, streamed or not, in turn. ``responses`` and ``streams`` grow as they end.
    """

    def __init__(self, service: Served, bodies: list[Any], clients: int):
        self._service = service
        self._bodies = bodies
        self._pool = ThreadPoolExecutor(clients)
        self._clients = clients
        self._stopping = False
        self._running: list[Future[None]] = []
        self.responses: list[httpx.Response] = []
        self.streams: list[Stream] = []

    def __enter__(self) -> "Load":
        self._running = [self._pool.submit(self._client, number) for number in range(self._clients)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._pool.shutdown()
        for client in self._running:
            client.result()

    @property
    def num_ended(self) -> int:
        """Requests that have been answered or have failed."""
        return len(self.responses) + len(self.streams)

    def more(self, count: int) -> Callable[[], bool]:
        """Whether ``count`` further requests have ended since this call."""
        target = self.num_ended + count
        return lambda: self.num_ended >= target

    def _client(self, number: int) -> None:
        with httpx.Client(base_url=self._service.url, timeout=ANSWER_LIMIT_S) as http:
            while not self._stopping:
                body = self._bodies[number % len(self._bodies)]
                if body.get("stream"):
                    self.streams.append(stream(self._service, body))
                else:
                    self.responses.append(http.post("/v1/completions", json=body))
                number += self._clients


def concurrently(calls: list[Callable[[], Any]], clients: int) -> list[Any]:
    """The results of ``calls``, in their order, with so many running at a time."""
    with ThreadPoolExecutor(clients) as pool:
        return [running.result() for running in [pool.submit(call) for call in calls]]
