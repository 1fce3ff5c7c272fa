"""Calling an ASGI application in process: one request in, its status and body events out."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from chameleon_ray.progress import NO_PROGRESS, Progress

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]

LEAVE_LIMIT_S = 1.0
"""An application that has been told of the disconnect may take this long to end by itself."""


@dataclass(frozen=True, slots=True)
class Head:
    """Status line and media type of a response."""

    status: int
    media_type: str


class AsgiCall:
    """One request running in ``app``. Use as an async context manager: leaving it early is a client disconnect."""

    def __init__(self, app: AsgiApp, path: str, body: bytes, headers: dict[str, str] | None = None):
        self._app = app
        self._body: bytes | None = body
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [
                (name.lower().encode(), value.encode())
                for name, value in ({"content-type": "application/json"} | (headers or {})).items()
            ],
            "client": ("127.0.0.1", 0),
            "server": ("127.0.0.1", 80),
        }
        self._gone = asyncio.Event()
        self._head: asyncio.Future[Head] = asyncio.get_running_loop().create_future()
        self._pending: list[bytes] = []
        self._news = asyncio.Event()
        self._ended = False

    @property
    def age_s(self) -> float:
        """Seconds since the call began."""
        return time.perf_counter() - self._began_s

    async def __aenter__(self) -> "AsgiCall":
        self._began_s = time.perf_counter()
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        # First told, then cancelled: vLLM's handlers work in a task of their own, which a disconnect ends, whereas
        # cancelling whoever waits for it would leave it, and the request in the engine, running to the end.
        self._gone.set()
        try:
            await asyncio.wait({self._task}, timeout=LEAVE_LIMIT_S)
        finally:
            self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self._head.done() and not self._head.cancelled():
            self._head.exception()  # retrieved, so that asyncio does not report it once more

    def take_progress(self) -> Progress:
        """What has been made of the answer since this was last called, where the application says so."""
        return NO_PROGRESS

    async def head(self) -> Head:
        """Status and media type, as soon as the application has sent them."""
        return await self._head

    async def chunks(self, pause_s: Callable[[], float], max_silence_s: float | None = None) -> AsyncIterator[bytes]:
        """The body. Parts that the application sends within ``pause_s()`` seconds of each other come as one chunk.

        max_silence_s: an empty chunk comes when for so long there was none. Raises whatever the application raised.
        """
        loop = asyncio.get_running_loop()
        while True:
            alarm = None if max_silence_s is None else loop.call_later(max_silence_s, self._news.set)
            try:
                await self._news.wait()
            finally:
                if alarm is not None:
                    alarm.cancel()
            self._news.clear()
            if not self._pending and not self._ended:
                yield b""
                continue
            if self._pending:
                chunk = b"".join(self._pending)
                self._pending.clear()
                yield chunk
            if self._ended and not self._pending:
                await self._task
                return
            if not self._ended and (pause := pause_s()) > 0:
                await asyncio.sleep(pause)

    async def body(self) -> bytes:
        """The whole body."""
        return b"".join([chunk async for chunk in self.chunks(lambda: 0.0)])

    async def _run(self) -> None:
        try:
            await self._app(self._scope, self._receive, self._send)
            if not self._head.done():
                raise RuntimeError("the application ended without a response")
        except BaseException as error:
            if not self._head.done():
                self._head.set_exception(
                    error if isinstance(error, Exception) else RuntimeError("the request was cancelled")
                )
            raise
        finally:
            self._ended = True
            self._news.set()

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = {name.decode().lower(): value.decode() for name, value in message.get("headers", ())}
            if not self._head.done():
                self._head.set_result(Head(int(message["status"]), headers.get("content-type", "application/json")))
        elif message["type"] == "http.response.body" and message.get("body"):
            self._pending.append(message["body"])
            self._news.set()
