"""A real S3 server on loopback, a proxy before it that does what networks do, and a double of the hub."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import boto3
from moto.moto_server.threaded_moto_server import ThreadedMotoServer

BUCKET = "acme-models"
FILES = ("adapter_config.json", "adapter_model.safetensors")


class S3:
    """moto's server with a client that may do everything."""

    def __init__(self) -> None:
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        self.address: tuple[str, int] = self._server.get_host_and_port()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self.client = self.boto("s3", "root-key", "root-secret")

    def boto(self, service: str, key_id: str, secret: str) -> Any:
        keys = {"aws_access_key_id": key_id, "aws_secret_access_key": secret, "region_name": "us-east-1"}
        return boto3.client(service, endpoint_url=self.url, **keys)

    def put(self, folder: Path, bucket: str, key: str, acl: str = "private") -> str:
        """Uploads an adapter's files; its URI."""
        for name in FILES:
            self.client.put_object(Bucket=bucket, Key=f"{key}/{name}", Body=(folder / name).read_bytes(), ACL=acl)
        return f"s3://{bucket}/{key}"

    def ask_who_it_is(self, ask: bool) -> None:
        """Whether requests need the key of a user who may do that."""
        count = b"0" if ask else b"inf"
        headers = {"Content-Type": "text/plain"}
        urlopen(Request(f"{self.url}/moto-api/reset-auth", count, headers, method="POST")).close()

    def stop(self) -> None:
        self._server.stop()


@contextmanager
def running_s3() -> Iterator[S3]:
    """A server with one bucket."""
    server = S3()
    try:
        server.client.create_bucket(Bucket=BUCKET)
        yield server
    finally:
        server.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go are none."""


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler], port: int = 0) -> Iterator[_Server]:
    """An HTTP server on loopback with that handler."""
    server = _Server(("127.0.0.1", port), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Proxy:
    """Hands requests to an S3 server, or does to them what ``fault`` says: given (method, path, range), one of
    "slow_down", "truncate", "stall", "drop", "flood", or None. ``seen``: all requests."""

    def __init__(self, target: tuple[str, int]):
        self.fault: Callable[[str, str, str], str | None] = lambda *_: None
        self.seen: list[tuple[str, str, str]] = []
        self.release = threading.Event()
        self._target = target
        self._running: Any = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Also after ``stop``, at the same port."""
        self._running = serving(self._handler(), self.port)
        self.port = self._running.__enter__().server_address[1]

    def stop(self) -> None:
        self.release.set()
        self._running.__exit__(None, None, None)

    def parts(self) -> list[str]:
        """The ranges of weights that were asked for."""
        return [span for method, path, span in self.seen if method == "GET" and path.endswith(".safetensors")]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                what = (self.command, self.path.partition("?")[0], self.headers.get("Range", ""))
                proxy.seen.append(what)
                fault = proxy.fault(*what)
                if fault == "drop":
                    return
                if fault == "slow_down":
                    body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
                    return self._send(503, {"Content-Type": "application/xml"}, body)
                connection = HTTPConnection(*proxy._target)
                connection.request(self.command, self.path, headers=dict(self.headers))
                answer = connection.getresponse()
                body = answer.read()
                connection.close()
                headers = {k: v for k, v in answer.getheaders() if k not in ("Connection", "Transfer-Encoding")}
                if fault == "flood":
                    headers["Content-Length"] = str(2 * len(body))
                    body += body
                self._send(answer.status, headers, body, fault)

            def _send(self, status: int, headers: dict[str, str], body: bytes, fault: str | None = None) -> None:
                self.send_response(status)
                headers = {"Content-Length": str(len(body))} | headers
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if fault in ("truncate", "stall") else body)
                if fault == "stall":
                    proxy.release.wait()

            do_GET = do_HEAD = _answer

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


class Hub:
    """What of the hub's protocol a download needs. repositories: "org/name" -> folder of its files; ``token``: asked
    for, if set; ``redirect``: sends GETs and HEADs of weights there, as the hub does with large files."""

    def __init__(self) -> None:
        self.repositories: dict[str, Path] = {}
        self.token: str | None = None
        self.redirect: str | None = None
        self.tokens_at_redirect: list[str | None] = []
        self.seen: list[tuple[str, str]] = []
        self.url = ""

    def handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                hub.seen.append((self.command, self.path))
                if self.path.startswith("/blob/"):
                    hub.tokens_at_redirect.append(self.headers.get("Authorization"))
                    _, _, org, name, file = self.path.split("/")
                else:
                    _, org, name, _, revision, file = self.path.split("/")
                    if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
                        return self._send(401, {"X-Error-Code": "GatedRepo"}, b"")
                    if revision not in ("main", "v1", "c" * 40):
                        return self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"")
                folder = hub.repositories.get(f"{org}/{name}")
                if folder is None:
                    return self._send(404, {"X-Error-Code": "RepoNotFound"}, b"")
                if not (folder / file).is_file():
                    return self._send(404, {"X-Error-Code": "EntryNotFound"}, b"")
                body = (folder / file).read_bytes()
                commit = hashlib.sha1(b"".join((folder / name).read_bytes() for name in FILES)).hexdigest()
                tags = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
                if hub.redirect is not None and file.endswith(".safetensors") and not self.path.startswith("/blob/"):
                    link = {"Location": f"{hub.redirect}/blob/{org}/{name}/{file}"}
                    linked = {"X-Linked-Size": str(len(body)), "X-Linked-Etag": tags["ETag"]}
                    return self._send(302, tags | link | linked, b"")
                span = self.headers.get("Range")
                if span is None:
                    return self._send(200, tags, body)
                start, _, end = span.removeprefix("bytes=").partition("-")
                self._send(206, tags, body[int(start) : int(end) + 1])

            def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(body))}).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_GET = do_HEAD = _answer

            def log_message(self, *_: Any) -> None:
                pass

        return Handler
