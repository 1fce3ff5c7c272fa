"""The adapters of one replica: brought once, held while in use, refused for a while after failing."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from chameleon_ray.adapters.base_model import BaseModelShapes
from chameleon_ray.adapters.catalog import AdapterLibrary
from chameleon_ray.adapters.errors import AdapterError, AdapterInvalidError, AdapterRetryLaterError
from chameleon_ray.adapters.local import LocalAdapters
from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.config import AdaptersConfig

WriteAdapter = Callable[..., Path]
RETRY_AFTER_S = 5.0
MIB = 2**20


class Setup:
    """A library over a folder of tiny adapters, a clock that stands still, an engine that can be told to refuse."""

    def __init__(self, shapes: BaseModelShapes, folder: Path, write_adapter: WriteAdapter, store_bytes: int):
        self._write, self._folder = write_adapter, folder / "adapters"
        self._folder.mkdir()
        config = AdaptersConfig(
            folder=str(self._folder), store_dir=str(folder / "store"), store_max_gib=store_bytes / 2**30
        )
        self.library = AdapterLibrary(config, shapes, "base")
        self.now_s = 0.0
        self.accepted: list[str] = []
        self.refuse = False

    def record(self, name: str, seed: int = 0) -> AdapterRecord:
        return self.library.inspect(name, str(self._write(self._folder / name, seed=seed)))

    async def accept(self, record: AdapterRecord, folder: Path) -> None:
        await asyncio.sleep(0)
        if self.refuse:
            raise AdapterInvalidError("the engine says no")
        assert (folder / "adapter_model.safetensors").is_file()
        self.accepted.append(record.name)

    def local(self) -> LocalAdapters:
        fetches = ThreadPoolExecutor(1)
        return LocalAdapters(self.library, self.accept, RETRY_AFTER_S, fetches, lambda: self.now_s)


@pytest.fixture
def setup(tiny_shapes: BaseModelShapes, tmp_path: Path, write_adapter: WriteAdapter) -> Setup:
    return Setup(tiny_shapes, tmp_path, write_adapter, store_bytes=100 * MIB)


def run(test: Callable[[LocalAdapters], Awaitable[None]], setup: Setup) -> None:
    async def whole() -> None:
        local = setup.local()
        try:
            await test(local)
        finally:
            await local.close()

    asyncio.run(whole())


def test_the_engine_tries_an_adapter_once_however_many_requests_wait_for_it(setup: Setup) -> None:
    record = setup.record("a")

    async def test(local: LocalAdapters) -> None:
        async def use() -> Path:
            async with local.use(record) as folder:
                return folder

        assert len(set(await asyncio.gather(*(use() for _ in range(20))))) == 1
        assert setup.accepted == ["a"]

    run(test, setup)


def test_a_failure_reaches_all_who_wait_and_is_not_tried_again_too_soon(setup: Setup) -> None:
    record = setup.record("a")

    async def test(local: LocalAdapters) -> None:
        setup.refuse = True

        async def use() -> None:
            async with local.use(record):
                pass

        errors = await asyncio.gather(*(use() for _ in range(3)), return_exceptions=True)
        assert [str(error) for error in errors] == ["the engine says no"] * 3
        assert local.failures() == {record.digest: "the engine says no"}

        setup.refuse = False
        setup.now_s = RETRY_AFTER_S - 1
        with pytest.raises(AdapterRetryLaterError, match="the engine says no") as refused:
            await use()
        assert refused.value.retry_after_s == pytest.approx(1)
        assert refused.value.http_status == AdapterInvalidError.http_status
        setup.now_s = RETRY_AFTER_S
        await use()
        assert setup.accepted == ["a"] and local.failures() == {}

    run(test, setup)


def test_an_explicit_load_tries_a_failed_adapter_again_at_once(setup: Setup) -> None:
    record = setup.record("a")

    async def test(local: LocalAdapters) -> None:
        setup.refuse = True
        with pytest.raises(AdapterError):
            async with local.use(record):
                pass
        setup.refuse = False
        local.forget_failure(record.digest)
        async with local.use(record):
            pass

    run(test, setup)


def test_one_broken_adapter_does_not_harm_another(setup: Setup) -> None:
    good, broken = setup.record("good"), setup.record("broken", seed=1)

    async def test(local: LocalAdapters) -> None:
        setup.refuse = True
        with pytest.raises(AdapterError):
            async with local.use(broken):
                pass
        setup.refuse = False
        async with local.use(good):
            assert setup.accepted == ["good"]

    run(test, setup)


def test_an_adapter_on_this_node_does_not_wait_for_slow_fetches(setup: Setup) -> None:
    record = setup.record("a")

    async def test(local: LocalAdapters) -> None:
        release = threading.Event()
        blocked = local.fetches.submit(release.wait)  # the only fetch thread
        try:
            async with asyncio.timeout(10), local.use(record):
                assert not blocked.done()
        finally:
            release.set()

    run(test, setup)


def test_a_client_that_leaves_does_not_take_the_adapter_from_the_others(setup: Setup) -> None:
    record = setup.record("a")

    async def test(local: LocalAdapters) -> None:
        async def use() -> Path:
            async with local.use(record) as folder:
                return folder

        first, second = asyncio.create_task(use()), asyncio.create_task(use())
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).is_dir()
        with pytest.raises(asyncio.CancelledError):
            await first

    run(test, setup)


def test_files_stay_while_used_and_may_go_two_sweeps_later(
    tiny_shapes: BaseModelShapes, tmp_path: Path, write_adapter: WriteAdapter
) -> None:
    small = Setup(tiny_shapes, tmp_path, write_adapter, store_bytes=7000)  # room for one of these
    record = small.record("a")

    async def test(local: LocalAdapters) -> None:
        async with local.use(record) as folder:
            local.sweep()
            local.sweep()
            small.record("b", seed=1)  # makes the store evict what it may
            assert folder.is_dir()
        local.sweep()
        local.sweep()
        small.record("c", seed=2)
        assert not folder.exists()
        async with local.use(record) as folder:  # fetched again
            assert folder.is_dir()

    run(test, small)


def test_closing_lets_go_of_everything(setup: Setup) -> None:
    record = setup.record("a")

    async def whole() -> Any:
        local = setup.local()
        async with local.use(record):
            pass
        await local.close()
        return asyncio.all_tasks() - {asyncio.current_task()}

    coroutine: Coroutine[Any, Any, Any] = whole()
    assert asyncio.run(coroutine) == set()
