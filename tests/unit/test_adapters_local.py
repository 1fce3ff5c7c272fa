"""The adapters of one replica: brought once, held while in use, refused for a while after failing."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from chameleon_ray.adapters.catalog import AdapterLibrary
from chameleon_ray.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterLoadError,
    AdapterNoRoomError,
    AdapterRetryLaterError,
)
from chameleon_ray.adapters.fetch_pool import FetchPool
from chameleon_ray.adapters.local import UNUSED_S, LocalAdapters
from chameleon_ray.adapters.modules import ModuleTable
from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.adapters.sources import LocalSource
from chameleon_ray.config import AdaptersConfig, ModelConfig

WriteAdapter = Callable[..., Path]
AsFuture = Callable[[ModuleTable], Future[ModuleTable]]
RETRY_AFTER_S = 5.0
MIB = 2**20


class Setup:
    """A library over a folder of tiny adapters, a clock that stands still, an engine that can be told to refuse."""

    def __init__(self, table: Future[ModuleTable], folder: Path, write_adapter: WriteAdapter, store_bytes: int):
        self._write, self._folder = write_adapter, folder / "adapters"
        self._folder.mkdir()
        config = AdaptersConfig(
            folder=str(self._folder), store_dir=str(folder / "store"), store_max_gib=store_bytes / 2**30
        )
        self.library = AdapterLibrary(config, ModelConfig(source="base"), table)
        self.now_s = 0.0
        self.accepted: list[str] = []
        self.refusal: AdapterError | None = None

    def record(self, name: str, seed: int = 0) -> AdapterRecord:
        return self.library.inspect(name, str(self._write(self._folder / name, seed=seed)))

    async def accept(self, record: AdapterRecord, folder: Path) -> None:
        await asyncio.sleep(0)
        if self.refusal is not None:
            raise self.refusal
        assert (folder / "adapter_model.safetensors").is_file()
        self.accepted.append(record.name)

    def local(self) -> LocalAdapters:
        return LocalAdapters(self.library, self.accept, RETRY_AFTER_S, FetchPool(1), lambda: self.now_s)


@pytest.fixture
def setup(tiny_table: ModuleTable, as_future: AsFuture, tmp_path: Path, write_adapter: WriteAdapter) -> Setup:
    return Setup(as_future(tiny_table), tmp_path, write_adapter, store_bytes=100 * MIB)


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
        setup.refusal = AdapterLoadError("the engine says no")

        async def use() -> None:
            async with local.use(record):
                pass

        errors = await asyncio.gather(*(use() for _ in range(3)), return_exceptions=True)
        assert [str(error) for error in errors] == ["the engine says no"] * 3
        assert local.failures() == {record.digest: "the engine says no"}

        setup.refusal = None
        setup.now_s = RETRY_AFTER_S - 1
        with pytest.raises(AdapterRetryLaterError, match="the engine says no") as refused:
            await use()
        assert refused.value.retry_after_s == pytest.approx(1)
        assert refused.value.http_status == AdapterLoadError.http_status
        setup.now_s = RETRY_AFTER_S
        await use()
        assert setup.accepted == ["a"] and local.failures() == {}

    run(test, setup)


def test_what_time_cannot_change_is_refused_for_good(setup: Setup) -> None:
    record = setup.record("a")

    async def test(local: LocalAdapters) -> None:
        setup.refusal = AdapterInvalidError("made for another model")
        for setup.now_s in (0.0, 1.0, 1000 * RETRY_AFTER_S):
            with pytest.raises(AdapterInvalidError, match=r"^made for another model$"):
                async with local.use(record):
                    pass
            setup.refusal = None  # The engine would take it now, and is not asked.
        assert setup.accepted == [] and local.failures() == {record.digest: "made for another model"}

    run(test, setup)


def test_what_the_engine_refuses_later_is_refused_until_its_time(setup: Setup) -> None:
    record = setup.record("a")

    async def test(local: LocalAdapters) -> None:
        async def use() -> None:
            async with local.use(record):
                pass

        await use()
        local.note_failure(record, AdapterNoRoomError("with so long a prompt"))
        await use()
        local.note_failure(record, AdapterRetryLaterError(AdapterLoadError("no memory"), 3.0))
        assert local.failures() == {record.digest: "no memory"}
        setup.now_s = 2.0
        with pytest.raises(AdapterRetryLaterError, match="no memory") as refused:
            await use()
        assert (refused.value.retry_after_s, refused.value.http_status) == (pytest.approx(1.0), 503)
        local.note_failure(record, refused.value)  # As a replica does with all that ``use`` raises.
        setup.now_s = 3.0
        await use()
        assert local.failures() == {}
        local.note_failure(record, AdapterInvalidError("not finite"))
        setup.now_s = 1000 * RETRY_AFTER_S
        with pytest.raises(AdapterInvalidError, match="not finite"):
            await use()

    run(test, setup)


def test_an_explicit_load_tries_a_failed_adapter_again_at_once(setup: Setup) -> None:
    record = setup.record("a")

    async def test(local: LocalAdapters) -> None:
        setup.refusal = AdapterInvalidError("the engine says no")
        with pytest.raises(AdapterError):
            async with local.use(record):
                pass
        setup.refusal = None
        local.forget_failure(record.digest)
        async with local.use(record):
            pass

    run(test, setup)


def test_one_broken_adapter_does_not_harm_another(setup: Setup) -> None:
    good, broken = setup.record("good"), setup.record("broken", seed=1)

    async def test(local: LocalAdapters) -> None:
        setup.refusal = AdapterLoadError("the engine says no")
        with pytest.raises(AdapterError):
            async with local.use(broken):
                pass
        setup.refusal = None
        async with local.use(good):
            assert setup.accepted == ["good"]

    run(test, setup)


def test_an_adapter_on_this_node_does_not_wait_for_slow_fetches(setup: Setup) -> None:
    record = setup.record("a")

    async def test(local: LocalAdapters) -> None:
        release = threading.Event()
        blocked = asyncio.create_task(local.fetches.run("other", release.wait))  # the only fetch thread
        await asyncio.sleep(0)
        try:
            async with asyncio.timeout(60), local.use(record):
                assert not blocked.done()
        finally:
            release.set()
            await blocked

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


@pytest.fixture
def small(tiny_table: ModuleTable, as_future: AsFuture, tmp_path: Path, write_adapter: WriteAdapter) -> Setup:
    """Its store has room for one of these adapters."""
    return Setup(as_future(tiny_table), tmp_path, write_adapter, store_bytes=7000)


def test_files_stay_while_used_and_may_go_a_while_later(small: Setup) -> None:
    record = small.record("a")

    async def test(local: LocalAdapters) -> None:
        async with local.use(record) as folder:
            small.now_s += UNUSED_S
            local.sweep({record.digest}, set())
            small.record("b", seed=1)  # makes the store evict what it may
            assert folder.is_dir() and local.held == {record.digest}
        local.sweep({record.digest}, set())
        assert local.held, "it was in use a moment ago"
        small.now_s += UNUSED_S
        local.sweep({record.digest}, set())
        small.record("c", seed=2)
        assert not folder.exists() and not local.held
        async with local.use(record) as folder:  # fetched again
            assert folder.is_dir()

    run(test, small)


def test_nothing_is_fetched_for_an_adapter_that_the_engine_has_in_memory(
    small: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = small.record("a")
    fetched: list[str] = []
    fetch = LocalSource.fetch

    def counting(source: LocalSource, uri: str, into: Path, *, max_bytes: int) -> str:
        fetched.append(uri)
        return fetch(source, uri, into, max_bytes=max_bytes)

    async def use(local: LocalAdapters) -> None:
        async with local.use(record) as folder:
            assert folder.is_dir()
        small.now_s += UNUSED_S

    async def test(local: LocalAdapters) -> None:
        await use(local)
        monkeypatch.setattr(LocalSource, "fetch", counting)
        for seed in range(1, 4):  # The store evicts whatever it may for each of them.
            local.sweep({record.digest}, {record.digest})
            other = small.record(f"other-{seed}", seed=seed)
            await use(local)
            assert fetched == [other.uri]
            fetched.clear()
        local.sweep({record.digest}, set())  # It has left the engine's memory.
        small.record("last", seed=4)
        await use(local)
        assert fetched[1:] == [record.uri]

    run(test, small)


def test_what_nobody_names_is_held_for_its_users_only_and_then_forgotten(setup: Setup) -> None:
    record, broken = setup.record("a"), setup.record("broken", seed=1)

    async def test(local: LocalAdapters) -> None:
        setup.refusal = AdapterLoadError("the engine says no")
        with pytest.raises(AdapterError):
            async with local.use(broken):
                pass
        setup.refusal = None
        async with local.use(record):
            local.sweep({broken.digest}, {record.digest})
            assert local.failures().keys() == {broken.digest} and local.held == {record.digest}
        setup.now_s += UNUSED_S
        local.sweep(set(), {record.digest})
        assert not local.failures() and not local.held
        assert not setup.library._validated

    run(test, setup)


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
