"""Clients that go away."""

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx

from live.calls import completion
from live.service import Service, wait_for

ADAPTER = "demo-r8-00"


@contextmanager
def begun_stream(service: Service, body: Any) -> Iterator[Iterator[str]]:
    """A stream's lines, after the first; leaving disconnects the client."""
    with (
        httpx.Client(base_url=service.url, timeout=60.0) as http,
        http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response,
    ):
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        yield lines


def as_long_as_possible(service: Service) -> Any:
    """A request that runs for about half a minute: the demo never ends an answer by itself.

    One that is kept and still runs shows that those begun with it have not just come to their end.
    """
    return completion(ADAPTER, prompt="Hello", max_tokens=service.max_model_len - 50)


def test_a_client_that_disconnects_frees_its_stream(service: Service) -> None:
    body = as_long_as_possible(service)
    wait_for(lambda: service.num_running() == 0, "idle engines")
    with begun_stream(service, body) as kept:
        with ExitStack() as others:
            for _ in range(3):
                others.enter_context(begun_stream(service, body))
            wait_for(lambda: service.num_running() == 4, "four running requests")
        wait_for(lambda: service.num_running() == 1, "the three are gone")
        next(kept)  # while the one that is still wanted, and is as long, runs on
        assert service.num_running() == 1
    wait_for(lambda: service.num_running() == 0, "the last is gone")


def test_a_client_that_disconnects_before_its_answer_frees_its_request(service: Service) -> None:
    body = as_long_as_possible(service)
    wait_for(lambda: service.num_running() == 0, "idle engines")
    cancelled = service.metric("ray_chameleon_requests_total", outcome="cancelled")
    with begun_stream(service, body) as kept:
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {service.http.base_url.netloc.decode()}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        address = (service.http.base_url.host, service.http.base_url.port)
        with socket.create_connection(address) as connection:
            connection.sendall(head.encode() + content)
            wait_for(lambda: service.num_running() == 2, "the request runs")
        wait_for(lambda: service.num_running() == 1, "it is gone")
        next(kept)
    wait_for(lambda: service.num_running() == 0, "the last is gone")
    wait_for(
        lambda: service.metric("ray_chameleon_requests_total", outcome="cancelled") > cancelled, "it is counted", 30.0
    )
