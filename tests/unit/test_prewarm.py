"""What a new replica fetches ahead: which adapters, in which order, and past what cannot be had."""

import asyncio
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from chameleon_ray.adapters.catalog import AdapterLibrary
from chameleon_ray.adapters.fetch_pool import FetchPool
from chameleon_ray.adapters.local import LocalAdapters
from chameleon_ray.adapters.modules import ModuleTable
from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.config import AdaptersConfig, ModelConfig
from deployments.prewarm import prewarm, prewarm_order


def record(name: str, digest: str = "", size_bytes: int = 10) -> AdapterRecord:
    return AdapterRecord(name=name, digest=digest or f"of {name}", uri=f"/{name}", rank=1, size_bytes=size_bytes)


def names(order: list[AdapterRecord]) -> list[str]:
    return [one.name for one in order]


def test_patterns_order_first_and_uses_within_a_pattern() -> None:
    records = [record(name) for name in ("b", "acme/x", "a", "acme/y", "other")]
    uses = {"of b": 2.0, "of acme/y": 1.5, "of other": 100.0}
    assert names(prewarm_order(records, ["acme/*", "?", "*"], uses, 100)) == ["acme/y", "acme/x", "other", "b", "a"]
    assert names(prewarm_order(records, ["a"], uses, 100)) == ["a"], "a pattern is about whole names"
    assert prewarm_order(records, ["[ab]", "a?me/*"], uses, 100) == [] == prewarm_order(records, [], uses, 100)


def test_no_more_than_the_store_holds_and_each_content_once() -> None:
    records = [record("a", size_bytes=60), record("b", size_bytes=30), record("c", size_bytes=30)]
    uses = {"of a": 3.0, "of b": 2.0, "of c": 1.0}
    assert names(prewarm_order(records, ["*"], uses, 90)) == ["a", "b"]
    assert names(prewarm_order(records, ["*"], uses, 50)) == []
    twice = [record("old", "d"), record("new", "d")]
    assert names(prewarm_order(twice, ["new", "*"], {}, 10)) == ["new"]


def test_they_are_fetched_in_that_order_and_a_broken_one_is_passed_over(
    tiny_table: ModuleTable, write_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    table: Future[ModuleTable] = Future()
    table.set_result(tiny_table)

    def library(store: str) -> AdapterLibrary:
        config = AdaptersConfig(folder=str(tmp_path / "folder"), store_dir=str(tmp_path / store))
        return AdapterLibrary(config, ModelConfig(source="base"), table)

    for seed, name in enumerate("abcd"):
        write_adapter(tmp_path / "folder" / name, seed=seed)
    records = library("old node").scan({}).records
    shutil.rmtree(tmp_path / "folder" / "b")
    accepted: list[str] = []

    async def accept(record: AdapterRecord, folder: Path) -> None:
        accepted.append(record.name)

    new_node = library("new node")
    uses = {records["c"].digest: 1.0, records["b"].digest: 2.0}
    order = prewarm_order(records.values(), ["*"], uses, 1 << 20)

    async def whole() -> int:
        local = LocalAdapters(new_node, accept, 5.0, FetchPool(1), lambda: 0.0)
        try:
            return await prewarm(local, order, {records["d"].digest})
        finally:
            await local.close()

    assert names(order) == ["b", "c", "a", "d"]
    assert asyncio.run(whole()) == 2 and accepted == ["c", "a"]
    assert {name for name, one in records.items() if new_node.holds(one.digest)} == {"a", "c"}
