"""``chameleon queues`` against an HTTP server that answers what replicas do."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from test_queues_api import Engine, report

from chameleon_ray import queues_view
from chameleon_ray.cli import main
from deployments.queues_api import replica_queues


class Server(ThreadingHTTPServer):
    """Answers every GET with ``status`` and ``body``; ``keys``: the Authorization headers it got."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = 200
        self.body: Any = {"replicas": []}
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        assert self.path == "/v1/chameleon/queues"
        self.server.keys.append(self.headers.get("Authorization"))
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(json.dumps(self.server.body).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def shown(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert main(["queues", *arguments]) == status
    printed = capsys.readouterr()
    assert not (printed.out if status else printed.err)
    return printed.err if status else printed.out


def test_tables_of_replicas(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    paged = replica_queues("r1", Engine(report("static")))
    stock = replica_queues("r2", Engine(None)) | {"adapter_memory": "stock"}
    server.body = {"replicas": [paged, stock, {"replica": "r3", "error": "no answer within 2 s"}]}
    first, second, third = shown(capsys, "--url", server.url).strip().split("\n\n")
    lines = first.splitlines()
    assert lines[0] == "replica r1: 3 running, 2 waiting (2 for their turn; the oldest for 1.5 s)"
    assert lines[1].split()[:4] == ["queue", "sizes", "up", "to"]
    rows = [line.split() for line in lines[2:6]]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert [row[1] for row in rows] == [*(f"{queue['max_size']:.4g}" for queue in paged["queues"][:3]), "any"]
    assert [int(row[2]) for row in rows] == [queue["waiting"] for queue in paged["queues"]]
    assert [int(row[4]) for row in rows] == [queue["running"] for queue in paged["queues"]]
    assert [int(row[7].replace(",", "")) for row in rows] == [queue["used_tokens"] for queue in paged["queues"]]
    assert "0 resident, 0 in host memory, 1 known; 0 of at most 4 blocks" in lines[6]
    assert "admissions 2, bypasses 0" in lines[8] and len(lines) == 9, "no line on lengths before there are any"
    assert second.splitlines() == [
        "replica r2: 3 running, 2 waiting",
        "  vLLM queues requests itself: adapters are in its slots",
    ]
    assert third == "replica r3: no answer within 2 s"


def test_lengths_and_a_scale_below_one_show_where_they_are_known() -> None:
    answer = replica_queues("r1", Engine(report("static")))
    answer["predictions"] |= {
        "num_requests": 40,
        "right_bucket_share": 0.75,
        "mean_absolute_error_tokens": 12.4,
    }
    answer["scheduler"]["minima_scale"] = 0.5
    lines = queues_view.tables([answer]).splitlines()
    assert "the quotas cannot hold the SLO: scaled by 0.50" in lines[-2]
    assert lines[-1].strip() == "output lengths: 75% of the latest 40 in the right class, off by 12 tokens on average"


def test_the_key_goes_along(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shown(capsys, "--url", server.url) == "no replica is there\n"
    shown(capsys, "--url", server.url, "--api-key", "one")
    monkeypatch.setenv("OPENAI_API_KEY", "two")
    shown(capsys, "--url", server.url)
    assert server.keys == [None, "Bearer one", "Bearer two"]


def test_what_is_no_answer_is_an_error_that_says_so(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.status, server.body = 401, {"error": {"message": "Missing or unknown API key."}}
    assert shown(capsys, "--url", server.url, status=1) == "error: 401: Missing or unknown API key.\n"
    server.status, server.body = 404, {"detail": "Not Found"}
    assert "is not this application" in shown(capsys, "--url", server.url, status=1)
    nowhere = "http://127.0.0.1:1"
    assert f"{nowhere} does not answer" in shown(capsys, "--url", nowhere, status=1)


def test_watching_goes_on_after_an_error_until_it_is_stopped(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    def sleep(pause_s: float) -> None:
        pauses.append(pause_s)
        server.status = 500 if len(pauses) == 1 else 200
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(queues_view.time, "sleep", sleep)
    server.body = {"replicas": [], "error": {"message": "broken"}}
    printed = shown(capsys, "--url", server.url, "--watch", "0.5")
    assert printed == "no replica is there\nerror: 500: broken\nno replica is there\n"
    assert pauses == [0.5] * 3
