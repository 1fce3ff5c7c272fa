"""A small OpenAI-compatible server whose timing and faults a test chooses; it runs in the test's own event loop."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

Body = dict[str, Any]


@dataclass
class StreamServer:
    """Streams ``max_tokens`` events: the first after first_token_s, each further one gap_s later.

    Models with a meaning: ``busy`` gets a 503, ``broken`` an error after the first token, ``cut`` a connection that
    closes after it, ``endless`` no [DONE], ``empty`` no token, ``stuck`` never the second. hold_until: answer nothing
    before so many requests have come. queued_ms: what it says of its queue, as vLLM does. requests: all bodies, in
    order of arrival; arrived_s, sent_s: when they and the events came and went.
    """

    first_token_s: float = 0.02
    gap_s: float = 0.01
    usage: bool = True
    hold_until: int = 0
    queued_ms: float | None = None
    models: list[Body] = field(default_factory=list)
    requests: list[Body] = field(default_factory=list)
    arrived_s: list[float] = field(default_factory=list)
    sent_s: list[float] = field(default_factory=list)
    url: str = ""

    def __post_init__(self) -> None:
        self._enough = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().lower().split("\r\n")
                length = next((int(line.split(":")[1]) for line in lines if line.startswith("content-length:")), 0)
                content = await reader.readexactly(length)
                if lines[0].startswith("get /v1/models"):
                    await self._whole(writer, 200, {"data": self.models})
                else:
                    await self._complete(writer, json.loads(content))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _complete(self, writer: asyncio.StreamWriter, body: Body) -> None:
        self.requests.append(body)
        self.arrived_s.append(perf_counter())
        if len(self.requests) >= self.hold_until:
            self._enough.set()
        await self._enough.wait()
        model = body["model"]
        if model == "busy":
            return await self._whole(writer, 503, {"error": {"message": "overloaded"}})
        count = {"prompt_tokens": len(body["prompt"].split()), "completion_tokens": body["max_tokens"]}
        if not body.get("stream"):
            return await self._whole(writer, 200, {"choices": [{"text": "a"}], "usage": count})
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        await asyncio.sleep(self.first_token_s)
        for number in range(0 if model == "empty" else body["max_tokens"]):
            if number:
                await asyncio.sleep(3600 if model == "stuck" else self.gap_s)
                if model == "broken":
                    self._event(writer, {"error": {"message": "engine died"}})
                    break
                if model == "cut":
                    raise ConnectionError
            self.sent_s.append(perf_counter())
            self._event(writer, {"choices": [{"text": ' "error" '}], "usage": None})
        if self.usage:
            metrics = {} if self.queued_ms is None else {"metrics": {"queue_time_ms": self.queued_ms}}
            self._event(writer, {"choices": [], "usage": count, **metrics})
        if model != "endless":
            self._chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    async def _whole(self, writer: asyncio.StreamWriter, status: int, fields: Body) -> None:
        content = json.dumps(fields).encode()
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(content), content))
        await writer.drain()

    def _event(self, writer: asyncio.StreamWriter, fields: Body) -> None:
        self._chunk(writer, b"data: " + json.dumps(fields).encode() + b"\n\n")

    def _chunk(self, writer: asyncio.StreamWriter, content: bytes) -> None:
        writer.write(b"%x\r\n%b\r\n" % (len(content), content))


@asynccontextmanager
async def serving(server: StreamServer) -> AsyncIterator[StreamServer]:
    """The server on a free port of loopback."""
    listening = await asyncio.start_server(server, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    server.url = f"http://127.0.0.1:{port}"
    try:
        yield server
    finally:
        listening.close()


def bounded(test: Callable[[], Any], limit_s: float = 120.0) -> None:
    """Run a coroutine function to its end or fail."""

    async def run() -> None:
        async with asyncio.timeout(limit_s):
            await test()

    asyncio.run(run())
