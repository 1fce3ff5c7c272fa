"""Threads that fetch for several tenants: whose fetch begins next, without clocks."""

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from chameleon_ray.adapters.fetch_pool import FetchPool


class Fetches:
    """Work that begins when a thread is free and ends when it is told to."""

    def __init__(self, num_threads: int) -> None:
        self.pool = FetchPool(num_threads)
        self.begun: list[str] = []
        self._gates: dict[str, threading.Event] = {}
        self._tasks: dict[str, asyncio.Task[str]] = {}
        self._changed = threading.Semaphore(0)

    def ask(self, name: str) -> "asyncio.Task[str]":
        """One fetch; its tenant is the first letter of its name."""
        gate = self._gates[name] = threading.Event()

        def work() -> str:
            self.begun.append(name)
            self._changed.release()
            gate.wait()
            return name

        task = self._tasks[name] = asyncio.create_task(self.pool.run(name[0], work))
        return task

    async def has_begun(self, number: int) -> list[str]:
        """The fetches that have begun, once there are so many."""
        while len(self.begun) < number:
            await asyncio.to_thread(self._changed.acquire)
        await asyncio.sleep(0)
        return self.begun

    async def end(self, name: str) -> None:
        self._gates[name].set()
        assert await self._tasks[name] == name

    def end_all(self) -> None:
        for gate in self._gates.values():
            gate.set()


def run(num_threads: int, test: Callable[[Fetches], Awaitable[None]]) -> None:
    async def whole() -> None:
        fetches = Fetches(num_threads)
        try:
            await test(fetches)
        finally:
            fetches.end_all()
            fetches.pool.close()

    asyncio.run(whole())


def test_tenants_take_turns_however_much_one_asks_for() -> None:
    async def test(fetches: Fetches) -> None:
        for number in range(5):
            fetches.ask(f"a{number}")
        for name in ("b0", "c0", "b1"):
            fetches.ask(name)
        order = []
        for number in range(8):
            order.append((await fetches.has_begun(number + 1))[-1])
            await fetches.end(order[-1])
        assert order == ["a0", "b0", "c0", "a1", "b1", "a2", "a3", "a4"]

    run(1, test)


def test_a_tenant_alone_has_all_threads_and_then_leaves_one() -> None:
    async def test(fetches: Fetches) -> None:
        for number in range(6):
            fetches.ask(f"a{number}")
        assert await fetches.has_begun(3) == ["a0", "a1", "a2"]
        fetches.ask("b0")
        await fetches.end("a0")
        assert (await fetches.has_begun(4))[3] == "b0"
        await fetches.end("a1")
        fetches.ask("c0")
        assert (await fetches.has_begun(5))[4] == "c0", "a's source may hang: what it has left is for others"
        await fetches.end("c0")
        await fetches.end("b0")
        assert (await fetches.has_begun(6))[5] == "a3", "there are two free threads now"
        assert not {"a4", "a5"} & set(fetches.begun)

    run(3, test)


def test_who_stops_waiting_leaves_the_line_and_errors_reach_who_asked() -> None:
    async def test(fetches: Fetches) -> None:
        fetches.ask("a0")
        await fetches.has_begun(1)
        gone, stays = fetches.ask("a1"), fetches.ask("a2")
        await asyncio.sleep(0)
        gone.cancel()
        await fetches.end("a0")
        assert await fetches.has_begun(2) == ["a0", "a2"]

        def fails() -> None:
            raise ValueError("broken")

        failing = asyncio.create_task(fetches.pool.run("b", fails))
        await fetches.end("a2")
        with pytest.raises(ValueError, match="broken"):
            await failing
        assert stays.done()

    run(1, test)


def test_closing_cancels_what_has_not_begun() -> None:
    async def test(fetches: Fetches) -> None:
        fetches.ask("a0")
        await fetches.has_begun(1)
        waiting = fetches.ask("b0")
        await asyncio.sleep(0)
        fetches.pool.close()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await fetches.end("a0")
        assert fetches.begun == ["a0"]

    run(1, test)
