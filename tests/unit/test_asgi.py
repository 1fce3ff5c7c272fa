"""An ASGI application called in process."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from chameleon_ray.engine.asgi import AsgiCall, Receive, Send

START = {"type": "http.response.start", "status": 200, "headers": [(b"Content-Type", b"text/event-stream")]}


def body(content: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": True}


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


def test_the_application_gets_the_request_and_its_answer_comes_back() -> None:
    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        request = await receive()
        await send({**START, "status": 201})
        await send(body(scope["path"].encode() + request["body"]))

    async def test() -> None:
        async with AsgiCall(app, "/path", b" body") as call:
            head = await call.head()
            assert (head.status, head.media_type) == (201, "text/event-stream")
            assert await call.body() == b"/path body"

    run(test)


def test_parts_sent_while_nobody_reads_come_as_one_chunk() -> None:
    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        await send(START)
        for part in (b"a", b"b", b"c"):
            await send(body(part))

    async def test() -> None:
        async with AsgiCall(app, "/", b"") as call:
            assert [chunk async for chunk in call.chunks(lambda: 0.0)] == [b"abc"]

    run(test)


def test_the_first_part_does_not_wait_and_later_ones_are_gathered() -> None:
    go_on = asyncio.Event()

    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        await send(START)
        await send(body(b"first"))
        await go_on.wait()
        for part in (b"a", b"b"):
            await send(body(part))
            await asyncio.sleep(0)

    async def test() -> None:
        async with AsgiCall(app, "/", b"") as call:
            chunks = call.chunks(lambda: 0.05)
            assert await anext(chunks) == b"first"
            go_on.set()
            assert [chunk async for chunk in chunks] == [b"ab"]

    run(test)


def test_leaving_early_is_a_disconnect_and_ends_the_application() -> None:
    ended = asyncio.Event()

    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        await receive()
        await send(START)
        try:
            while True:
                await send(body(b"x"))
                await asyncio.sleep(0)
        finally:
            ended.set()

    async def test() -> None:
        async with AsgiCall(app, "/", b"") as call:
            await anext(call.chunks(lambda: 0.0))
        assert ended.is_set()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(test)


def test_an_error_before_the_answer_is_raised_from_head() -> None:
    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        raise ValueError("broken")

    async def test() -> None:
        async with AsgiCall(app, "/", b"") as call:
            with pytest.raises(ValueError, match="broken"):
                await call.head()

    run(test)


def test_an_error_within_the_answer_is_raised_after_what_was_sent() -> None:
    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        await send(START)
        await send(body(b"half"))
        raise ValueError("broken")

    async def test() -> None:
        async with AsgiCall(app, "/", b"") as call:
            got: list[bytes] = []
            with pytest.raises(ValueError, match="broken"):
                async for chunk in call.chunks(lambda: 0.0):
                    got.append(chunk)
            assert got == [b"half"]

    run(test)


def test_an_application_that_says_nothing_is_an_error() -> None:
    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        pass

    async def test() -> None:
        async with AsgiCall(app, "/", b"") as call:
            with pytest.raises(RuntimeError, match="without a response"):
                await call.head()

    run(test)


def test_leaving_early_reaches_work_that_the_application_does_in_another_task() -> None:
    """As vLLM's ``with_cancellation`` does it: its handler task outlives whoever only waits for it."""
    began, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def disconnect(receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        tasks = [asyncio.create_task(work()), asyncio.create_task(disconnect(receive))]
        _, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()

    async def test() -> None:
        async def use() -> None:
            async with AsgiCall(app, "/", b"") as call:
                await call.head()

        user = asyncio.create_task(use())
        await began.wait()
        user.cancel()
        with pytest.raises(asyncio.CancelledError):
            await user
        await ended.wait()

    run(test)


def test_silence_gives_empty_chunks_until_there_is_something() -> None:
    go_on = asyncio.Event()

    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        await send(START)
        await go_on.wait()
        await send(body(b"a"))

    async def test() -> None:
        async with AsgiCall(app, "/", b"") as call:
            chunks = []
            async for chunk in call.chunks(lambda: 0.0, max_silence_s=0.01):
                chunks.append(chunk)
                if len(chunks) == 2:
                    go_on.set()
            assert chunks[:2] == [b"", b""] and b"".join(chunks) == b"a"

    run(test)
