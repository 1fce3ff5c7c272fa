"""Threads that fetch adapters, shared fairly between those whose adapters they are."""

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

_T = TypeVar("_T")


class FetchPool:
    """Use from one event loop.

    A free thread goes to the tenant with the fewest fetches under way; among equals, to the one that was last given a
    thread the longest ago. A tenant's own come in the order in which they were asked for. Once there is more than one
    tenant, the last free thread is for one that has nothing under way: a tenant whose source hangs cannot hold all.
    """

    def __init__(self, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="fetch")
        self._num_free = num_threads
        self._waiting: dict[str, deque[tuple[Callable[[], Any], asyncio.Future[Any]]]] = {}
        self._running: Counter[str] = Counter()
        self._turns: dict[str, int] = {}
        self._num_turns = 0

    async def run(self, tenant: str, work: Callable[[], _T]) -> _T:
        """What ``work`` returns, from a thread. Who stops waiting for work that has not begun leaves the line."""
        done: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self._turns.setdefault(tenant, -1)
        self._waiting.setdefault(tenant, deque()).append((work, done))
        self._start()
        return await done

    def close(self) -> None:
        """Nothing more begins; who waits for something that has not begun is cancelled."""
        self._num_free = 0
        for line in self._waiting.values():
            for _, done in line:
                done.cancel()
        self._waiting.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _start(self) -> None:
        while self._num_free and (tenant := self._next()) is not None:
            line = self._waiting[tenant]
            work, done = line.popleft()
            if not line:
                del self._waiting[tenant]
            if done.cancelled():
                continue
            self._num_free -= 1
            self._running[tenant] += 1
            self._num_turns += 1
            self._turns[tenant] = self._num_turns
            running = asyncio.get_running_loop().run_in_executor(self._threads, work)
            running.add_done_callback(partial(self._ended, tenant, done))

    def _next(self) -> str | None:
        may_take = list(self._waiting)  # Of two that never had a thread, the one that waits longer comes first.
        if self._num_free == 1 and len(self._turns) > 1:
            may_take = [tenant for tenant in may_take if not self._running[tenant]]
        return min(may_take, key=lambda tenant: (self._running[tenant], self._turns[tenant]), default=None)

    def _ended(self, tenant: str, done: "asyncio.Future[Any]", ended: "asyncio.Future[Any]") -> None:
        self._running[tenant] -= 1
        self._num_free += 1
        if ended.cancelled():
            done.cancel()
        elif not done.done():
            error = ended.exception()
            done.set_result(ended.result()) if error is None else done.set_exception(error)
        self._start()
