"""An adapter that no name stands for any more is forgotten, everywhere; without an engine."""

import asyncio
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from memory_driver import MAX_RANK, RETRY_S, EngineFront, MemoryDriver, sizes
from operations import Operations
from vllm.lora.request import LoRARequest

from chameleon_ray.adapters.catalog import AdapterLibrary
from chameleon_ray.adapters.fetch_pool import FetchPool
from chameleon_ray.adapters.identity import AdapterId
from chameleon_ray.adapters.local import UNUSED_S, LocalAdapters
from chameleon_ray.adapters.modules import ModuleTable
from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.config import AdaptersConfig, ModelConfig
from chameleon_ray.policy.adapter import Tier
from chameleon_ray.policy.records import State
from deployments.tiers import CatalogDigests, let_go, merge_tiers

WriteAdapter = Callable[..., Path]
NAMES = st.sampled_from(["a", "b", "c"])
NOT_FINITE = {"base_model.model.model.layers.0.mlp.down_proj.lora_A.weight": np.full((4, 24), np.nan, np.float32)}


def _lora(digit: int, folder: Path) -> LoRARequest:
    return LoRARequest(AdapterId(f"{digit:064x}").lora_name("name"), digit + 1, str(folder))


@pytest.fixture
def driver(tiny_table: ModuleTable) -> Iterator[MemoryDriver]:
    driver = MemoryDriver(tiny_table, lambda: 0.0)
    yield driver
    driver.check()
    driver.close()


@pytest.fixture
def folder(write_adapter: WriteAdapter, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


def test_an_idle_adapter_leaves_blocks_host_memory_and_all_books(driver: MemoryDriver, folder: Path) -> None:
    lora, other = _lora(1, folder), _lora(2, folder)
    free = driver.pool.get_num_free_blocks()
    driver.serve(lora)
    driver.serve(other)
    memory, (digest, kept) = driver.memory, list(driver.memory._known)
    for _ in range(5):
        driver.serve(lora)  # enough for a history of its own
    groups = memory._predictor.num_groups
    assert memory.retire([digest]) == [digest], "workers have not heard of it yet"
    assert memory.is_busy, "so a step has to come, also without requests"
    driver.settle()
    assert memory.retire([digest]) == []
    assert list(memory._known) == [kept] and len(driver.host.resident) == len(driver.host._copies) == 1
    assert memory._predictor.num_groups == groups - 2
    memory.retire([kept])
    driver.settle()
    assert driver.pool.get_num_free_blocks() == free and not driver.host.resident and not driver.host._copies
    assert memory.retire([digest, kept, "f" * 64]) == []
    assert len(memory._numbers) == 0 and not memory.cache.tiers()


def test_asking_for_work_costs_the_same_however_many_adapters_are_known(driver: MemoryDriver, folder: Path) -> None:
    def num_calls() -> int:
        calls: list[object] = []
        sys.setprofile(lambda frame, event, what: calls.append(what) if event.endswith("call") else None)
        busy = driver.memory.is_busy
        sys.setprofile(None)
        assert not busy
        return len(calls)

    loras = [_lora(digit, folder) for digit in range(1, 10)]
    driver.serve(loras[0])
    driver.settle()
    before = num_calls()
    for lora in loras:
        driver.serve(lora)
    driver.settle()
    waiting = [driver.add(lora) for lora in loras]
    driver.memory.retire(list(driver.memory._known))
    assert num_calls() == before, "adapters that are retired, but wanted, are not looked at one by one either"
    for request_id in waiting:
        driver.end(request_id)


def test_requests_end_on_the_adapter_that_they_began_with(driver: MemoryDriver, folder: Path) -> None:
    lora = _lora(1, folder)
    running = driver.add(lora)
    while running not in driver.memory.running:
        driver.settle()
    waiting = driver.add(lora)
    [digest] = driver.memory._known
    assert driver.memory.retire([digest]) == [digest]
    driver.settle()
    assert driver.memory.running == {running, waiting}
    driver.end(running)
    driver.settle()
    assert driver.memory.cache.state(digest) is State.RESIDENT
    driver.end(waiting)
    driver.settle()
    assert not driver.memory._known and not driver.host.resident


def test_a_new_request_takes_the_retirement_back(driver: MemoryDriver, folder: Path) -> None:
    lora = _lora(1, folder)
    driver.serve(lora)
    [digest] = driver.memory._known
    driver.memory.retire([digest])
    driver.serve(lora)
    driver.settle()
    assert driver.memory.cache.state(digest) is State.RESIDENT


@pytest.mark.parametrize("stage", ["inspection", "fetch", "load"])
def test_an_adapter_on_its_way_is_forgotten_when_it_has_come(driver: MemoryDriver, folder: Path, stage: str) -> None:
    request = driver.add(_lora(1, folder))
    [digest] = driver.memory._known
    for _ in range(("inspection", "fetch", "load").index(stage)):
        driver.work()
        driver.read_headers()
        driver.step()
    assert driver.memory.waiting()[stage] == 1
    driver.end(request)
    assert driver.memory.retire([digest]) == [digest]
    driver.settle()
    assert not driver.memory._known and not driver.host.resident and not driver.host._copies


def test_a_request_that_leaves_before_anything_was_read_leaves_nothing(driver: MemoryDriver, folder: Path) -> None:
    request = driver.add(_lora(1, folder))
    [digest] = driver.memory._known
    driver.read_headers()
    driver.memory.begin_step()
    assert driver.memory.cache.state(digest) is State.ABSENT
    assert driver.memory.retire([digest]) == [digest]
    driver.end(request)
    assert not driver.memory._known


def test_a_retired_adapter_that_cannot_be_read_is_forgotten(
    driver: MemoryDriver, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    request = driver.add(_lora(1, write_adapter(tmp_path / "broken", tensors=NOT_FINITE)))
    driver.read_headers()
    driver.step()
    driver.end(request)
    assert driver.memory.retire(list(driver.memory._known)), "it is being read"
    driver.work()
    assert not driver.memory._known


def test_an_adapter_that_was_refused_is_forgotten_at_once(
    driver: MemoryDriver, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    driver.add(_lora(1, write_adapter(tmp_path / "large", rank=2 * MAX_RANK)))
    driver.settle()
    assert not driver.requests and not driver.memory._known and not len(driver.memory._numbers)


def test_an_adapter_evicted_for_others_while_it_is_retired_is_forgotten(driver: MemoryDriver, folder: Path) -> None:
    driver.serve(_lora(1, folder))
    [digest] = driver.memory._known
    driver.memory.retire([digest])
    assert driver.memory.reclaim(1, "", or_nothing=False)
    driver.check()
    driver.settle()
    assert not driver.memory._known


def test_thousands_of_replacements_leave_every_count_and_the_reports_cost_as_they_were(
    driver: MemoryDriver, tiny_table: ModuleTable, folder: Path
) -> None:
    front = EngineFront(driver, tiny_table, lambda: 0.0)
    costs: dict[int, int] = {}
    counts: dict[int, dict[str, int]] = {}
    runner = asyncio.Runner()
    for version in range(3_000):
        record = AdapterRecord(name="name", digest=f"{version:064x}", uri="/", rank=4, size_bytes=1)
        driver.serve(front.server._lora_request(record, folder))
        front.server._rates.record(record.digest, 0.0)
        if version in (1_050, 2_999):
            with Operations() as operations:
                front.report()
            costs[version] = operations.count
        else:
            front.report()
        assert front.server.tiers == {record.digest: Tier.GPU}
        runner.run(front.server.retire([record.digest]))
        driver.settle()
        front.report()
        runner.run(front.server.retire([*front.server.known]))
        assert not front.server.known and not front.stats.adapter_tiers
        front.server.take_policy_events()
        if version in (1_050, 2_999):  # Rings of the latest 1,000 requests are full.
            counts[version] = sizes([driver.memory, driver.host, front])
    runner.close()
    assert costs[2_999] <= 1.01 * costs[1_050], costs
    grown = {path: (counts[1_050].get(path, 0), number) for path, number in counts[2_999].items()}
    assert {path: pair for path, pair in grown.items() if pair[1] > pair[0]} == {}
    assert driver.memory.cache.stats().adapters_known == 0


class Node:
    """What outlives a replica: the catalog, the store, and the adapters' files, some of which the engine refuses."""

    def __init__(self, table: ModuleTable, write_adapter: WriteAdapter, folder: Path) -> None:
        versions: list[dict[str, Any]] = [{"rank": rank} for rank in (1, 4, 4, 8)]
        versions += [{"rank": 2 * MAX_RANK}, {"tensors": NOT_FINITE}]
        source = folder / "adapters"
        future: Future[ModuleTable] = Future()
        future.set_result(table)
        config = AdaptersConfig(folder=str(source), store_dir=str(folder / "store"), check_finite=False)
        self.table = table
        paths = [write_adapter(source / str(seed), seed=seed, **given) for seed, given in enumerate(versions)]
        self.library = AdapterLibrary(config, ModelConfig(source="base"), future)
        self.records = [self.library.inspect("any", str(path)) for path in paths]


class Replicas(RuleBasedStateMachine):
    """Names that come, change and go while requests use them, on a replica that now and then is started anew."""

    node: Node

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.now_s = 0.0
        self.catalog: dict[str, AdapterRecord] = {}
        self.once_named: list[AdapterRecord] = []
        self.start()

    def start(self) -> None:
        self.driver = MemoryDriver(self.node.table, lambda: self.now_s)
        self.front = EngineFront(self.driver, self.node.table, lambda: self.now_s)
        self.live: dict[str, tuple[str, AsyncExitStack]] = {}
        self.local = LocalAdapters(self.node.library, self.accept, RETRY_S, FetchPool(1), lambda: self.now_s)
        self.digests = CatalogDigests()

    async def accept(self, record: AdapterRecord, folder: Path) -> None:
        pass

    @rule(name=NAMES, version=st.integers(0, 5))
    def load_or_replace(self, name: str, version: int) -> None:
        record = self.node.records[version].model_copy(update={"name": name})
        self.catalog = self.catalog | {name: record}
        self.once_named.append(record)

    @precondition(lambda self: self.catalog)
    @rule(data=st.data())
    def unload(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.catalog)))
        self.catalog = {other: record for other, record in self.catalog.items() if other != name}

    @precondition(lambda self: self.catalog)
    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        self.begin(self.catalog[data.draw(st.sampled_from(sorted(self.catalog)))])

    @precondition(lambda self: self.once_named)
    @rule(data=st.data())
    def use_late(self, data: st.DataObject) -> None:
        """By an ingress whose copy of the catalog is an old one, or for a request that another replica had begun."""
        self.begin(data.draw(st.sampled_from(self.once_named[-4:])))

    def begin(self, record: AdapterRecord) -> None:
        async def begin() -> None:
            stack = AsyncExitStack()
            folder = await stack.enter_async_context(self.local.use(record))
            request_id = self.driver.add(self.front.server._lora_request(record, folder))
            self.front.server._rates.record(record.digest, self.now_s)
            self.live[request_id] = record.digest, stack

        self.runner.run(begin())

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.live))))

    def end(self, request_id: str) -> None:
        if request_id in self.driver.requests:
            self.driver.end(request_id)
        self.runner.run(self.live.pop(request_id)[1].aclose())

    @precondition(lambda self: self.driver.memory.running)
    @rule(data=st.data(), again=st.booleans())
    def finish_or_preempt(self, data: st.DataObject, again: bool) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.driver.memory.running)))
        self.driver.preempt(request_id) if again else self.end(request_id)

    @rule(headers=st.booleans(), work=st.booleans())
    def step(self, headers: bool, work: bool) -> None:
        if headers:
            self.driver.read_headers()
        if work:
            self.driver.work()
        for request_id in self.driver.step():
            self.end(request_id)
        self.front.report()

    @rule(seconds=st.sampled_from([0.5, UNUSED_S, RETRY_S]))
    def heartbeat(self, seconds: float) -> None:
        self.now_s += seconds
        named = self.digests.of(self.catalog)
        self.runner.run(let_go(self.local, self.front.server, named))

    @rule()
    def restart(self) -> None:
        for _, stack in self.live.values():
            self.runner.run(stack.aclose())
        self.runner.run(self.local.close())
        self.driver.close()
        self.start()

    @rule()
    def nothing_is_known_but_what_the_catalog_names_and_what_runs(self) -> None:
        for _ in range(4):
            self.heartbeat(UNUSED_S)
            while True:
                self.step(headers=True, work=True)
                if not self.driver.memory.is_busy:
                    break
        named = {record.digest for record in self.catalog.values()}
        expected = named | {digest for digest, _ in self.live.values()}
        memory, server = self.driver.memory, self.front.server
        assert memory._known.keys() <= server.known <= expected
        assert len(server._numbers) == len(server.known)
        assert self.front.stats.adapter_tiers.keys() <= expected and server._rates._arrivals.keys() <= expected
        assert self.local.held <= expected and self.node.library._validated <= expected
        groups = {key[1] for key in memory._predictor._groups if key[0] in ("adapter", "both")}  # type: ignore[index]
        assert groups <= expected
        in_memory = {digest for digest, tier in memory.cache.tiers().items() if tier > Tier.DISK}
        placed = merge_tiers(server.tiers, self.node.library.stored(), self.digests.of(self.catalog))
        assert placed.keys() == named | in_memory <= expected

    @invariant()
    def books_balance(self) -> None:
        self.driver.check()

    def teardown(self) -> None:
        self.nothing_is_known_but_what_the_catalog_names_and_what_runs()
        self.restart()
        self.driver.close()
        self.runner.run(self.local.close())
        self.runner.close()


def test_after_any_history_nothing_is_known_but_what_the_catalog_names_and_what_runs(
    tiny_table: ModuleTable, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    machine = type("Machine", (Replicas,), {"node": Node(tiny_table, write_adapter, tmp_path)})
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=checks),
    )
