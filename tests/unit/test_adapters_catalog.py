"""Names, and the library: scan, run-time loads, use."""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chameleon_ray.adapters.catalog import AdapterLibrary, check_name, split_model
from chameleon_ray.adapters.errors import (
    AdapterChangedError,
    AdapterInvalidError,
    AdapterModulesUnknownError,
    AdapterNameError,
    AdapterPathNotAllowedError,
    AdapterSourceError,
    AdapterTooLargeError,
)
from chameleon_ray.adapters.modules import Module, ModuleTable
from chameleon_ray.adapters.sources import LocalSource
from chameleon_ray.config import AdaptersConfig, AdapterSource, ModelConfig

WriteAdapter = Callable[..., Path]
AsFuture = Callable[[ModuleTable], Future[ModuleTable]]
MakeLibrary = Callable[..., AdapterLibrary]


@pytest.fixture
def library(tiny_table: ModuleTable, as_future: AsFuture, tmp_path: Path) -> MakeLibrary:
    (tmp_path / "folder").mkdir()

    def make(
        table: ModuleTable | Future[ModuleTable] = tiny_table, bounds: Mapping[str, Any] | None = None, **options: Any
    ) -> AdapterLibrary:
        answer = as_future(table) if isinstance(table, ModuleTable) else table
        settings = {"folder": str(tmp_path / "folder"), "store_dir": str(tmp_path / "store"), "max_rank": 64} | options
        return AdapterLibrary(AdaptersConfig(**settings), ModelConfig(source="base"), answer, bounds=bounds or {})

    return make


@pytest.mark.parametrize("name", ["sql-v2", "a", "org/adapter_1.5", "0", "x" * 128])
def test_names(name: str) -> None:
    check_name(name, "base")


@pytest.mark.parametrize("name", ["", "base", "base:x", "-x", ".x", "/x", "a b", "a\n", "é", "x" * 129, "a\0"])
def test_no_names(name: str) -> None:
    with pytest.raises(AdapterNameError):
        check_name(name, "base")


def test_model_names_the_base_or_an_adapter() -> None:
    assert split_model("base", "base") is None
    assert split_model("sql", "base") == split_model("base:sql", "base") == "sql"
    assert split_model("org/base:sql", "org/base") == "sql"
    assert split_model("other:sql", "base") == "other:sql"
    assert split_model("base:", "base") == ""


def test_scan_finds_folder_and_list_and_reports_the_broken(
    write_adapter: WriteAdapter, library: MakeLibrary, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    write_adapter(folder / "good", rank=8)
    write_adapter(folder / "twice")
    write_adapter(
        folder / "nan",
        tensors={
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.full((4, 32), np.nan, np.float32)
        },
    )
    write_adapter(folder / "high", rank=65)
    write_adapter(folder / "base")
    (folder / "empty").mkdir()
    (folder / ".hidden").mkdir()
    (folder / "README").write_text("")
    elsewhere = write_adapter(tmp_path / "elsewhere", seed=1)
    (folder / "linked").symlink_to(write_adapter(tmp_path / "not-allowed"))
    listed = [("listed", elsewhere.as_uri()), ("twice", str(elsewhere)), ("remote", "ftp://host/x"), ("a b", "x")]
    preload = [AdapterSource(name=name, uri=uri) for name, uri in listed]

    found = library(preload=preload).scan({})
    assert list(found.records) == ["good", "twice", "listed"]
    good = found.records["good"]
    assert (good.rank, good.base_model, good.origin, good.version) == (8, "tiny", "config", 0)
    assert good.uri == str(folder / "good")
    assert good.size_bytes == (folder / "good" / "adapter_model.safetensors").stat().st_size
    kinds = {name: type(error) for name, error in found.errors.items()}
    assert kinds == {
        "nan": AdapterInvalidError,
        "high": AdapterTooLargeError,
        "base": AdapterNameError,
        "empty": AdapterInvalidError,
        "linked": AdapterPathNotAllowedError,
        "twice": AdapterNameError,
        "remote": AdapterInvalidError,
        "a b": AdapterNameError,
    }
    assert found.records["twice"].uri == str(folder / "twice"), "the first of two stays"


def test_scan_without_adapters_and_without_its_folder(library: MakeLibrary) -> None:
    assert library().scan({}).records == library(folder=None).scan({}).records == {}
    with pytest.raises(AdapterSourceError, match="cannot be read"):
        library(folder="/nowhere").scan({})


def test_scan_reads_while_the_engine_starts_and_compares_once_it_has(
    write_adapter: WriteAdapter, library: MakeLibrary, tiny_table: ModuleTable, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "folder" / "a")
    engine: Future[ModuleTable] = Future()
    shelf = library(engine)
    with ThreadPoolExecutor(1) as thread:
        scan = thread.submit(shelf.scan, {})
        deadline_s = time.monotonic() + 60
        while not any(path.name.isalnum() for path in (tmp_path / "store").iterdir()):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        assert not scan.done(), "in the store, but not compared with a model"
        engine.set_result(tiny_table)
        assert set(scan.result().records) == {"a"}

    failed: Future[ModuleTable] = Future()
    failed.set_exception(RuntimeError("no engine"))
    with pytest.raises(RuntimeError, match="no engine"):
        library(failed).scan({})


def test_records_tell_of_what_is_odd(write_adapter: WriteAdapter, library: MakeLibrary, tmp_path: Path) -> None:
    odd = {"fan_in_fan_out": True, "base_model_name_or_path": "someone/else"}
    folder = write_adapter(tmp_path / "folder" / "a", config=odd)
    of_files, of_base = library().inspect("a", str(folder)).warnings
    assert "fan_in_fan_out" in of_files and "'someone/else', this is 'base'" in of_base
    assert library().scan({}).records["a"].warnings == (of_files, of_base)


def test_where_the_modules_are_not_known_nothing_is_loaded(
    write_adapter: WriteAdapter, library: MakeLibrary, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "folder" / "a")
    shelf = library(ModuleTable(problem="odd layers"))
    assert isinstance(shelf.scan({}).errors["a"], AdapterModulesUnknownError)
    with pytest.raises(AdapterModulesUnknownError, match="odd layers"):
        shelf.inspect("a", str(folder))


def test_scan_reads_only_what_changed(write_adapter: WriteAdapter, library: MakeLibrary, tmp_path: Path) -> None:
    folders = [write_adapter(tmp_path / "folder" / name, seed=seed) for seed, name in enumerate(("a", "b"))]
    first = library().scan({}).records
    marked = {name: record.model_copy(update={"version": 7}) for name, record in first.items()}

    shutil.rmtree(tmp_path / "store")
    again = library()
    assert again.scan(marked).records == marked
    assert not any(again.holds(record.digest) for record in marked.values()), "nothing was read"

    write_adapter(folders[1], seed=9)
    os.utime(folders[1] / "adapter_model.safetensors", ns=(0, 0))
    changed = again.scan(marked).records
    assert changed["a"] == marked["a"]
    assert changed["b"].digest != first["b"].digest and again.holds(changed["b"].digest)


def test_scan_trusts_no_record_made_under_other_rules(
    write_adapter: WriteAdapter, library: MakeLibrary, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "folder" / "a", rank=32)
    known = library().scan({}).records
    assert isinstance(library(max_rank=16).scan(known).errors["a"], AdapterTooLargeError)
    q_proj = "model.layers.0.self_attn.q_proj"
    other_base = ModuleTable({q_proj: Module(q_proj, 8, 8)})
    assert isinstance(library(other_base).scan(known).errors["a"], AdapterInvalidError)
    with pytest.raises(AdapterInvalidError, match="another base model"):
        library(other_base).ensure(known["a"])  # though its files are in the store


def test_a_scan_tells_shapes_once_and_what_is_refused(
    write_adapter: WriteAdapter, library: MakeLibrary, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    for seed, name in enumerate("abc"):
        write_adapter(folder / name, rank=4 if name < "c" else 8, seed=seed)
    write_adapter(folder / "high", rank=65)
    found = library(preload=[AdapterSource(name="a", uri=str(folder / "b"))]).scan({})
    assert found.shapes["a"] is found.shapes["b"] and {rank for _, rank in found.shapes["c"]} == {8}
    [tombstone] = found.refused
    assert (tombstone.name, tombstone.uri, tombstone.deleted) == ("high", str(folder / "high"), True)
    assert tombstone.refusal is not None and tombstone.refusal.status == 413
    assert str(tombstone.refusal.error()) == str(found.errors["high"]) and tombstone.refusal.is_permanent

    shutil.rmtree(folder / "high")
    again = library().scan({**found.records, "high": tombstone})
    assert again.records == found.records and not again.shapes, "the engine has said of these that it can hold them"
    assert (again.refused, again.gone) == ([], ["high"])


def test_an_engine_with_other_bounds_is_asked_again(
    write_adapter: WriteAdapter, library: MakeLibrary, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "folder" / "a")
    known = library(bounds={"adapter_host_gib": 4.0}).scan({}).records
    assert not library(bounds={"adapter_host_gib": 4.0}).scan(known).shapes
    other = library(bounds={"adapter_host_gib": 1.0}).scan(known)
    assert other.shapes.keys() == {"a"} and other.records["a"].checked != known["a"].checked


def test_a_known_content_that_other_rules_refuse_is_named(
    write_adapter: WriteAdapter, library: MakeLibrary, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "folder" / "a", rank=32)
    known = library().scan({}).records
    [refused] = library(max_rank=16).scan(known).refused
    assert refused.digest == known["a"].digest
    write_adapter(folder, rank=32, seed=3)
    os.utime(folder / "adapter_model.safetensors", ns=(0, 0))
    [refused] = library(max_rank=16).scan(known).refused
    assert refused.digest == "", "nobody has said what it is, and the known content may be served on"


def test_a_refresh_reads_what_is_refused_once(
    write_adapter: WriteAdapter, library: MakeLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_adapter(tmp_path / "folder" / "a", rank=65)
    shelf = library()
    [refused] = shelf.refresh({}).refused
    read: list[str] = []
    fetch = LocalSource.fetch
    monkeypatch.setattr(
        LocalSource,
        "fetch",
        lambda source, uri, into, *, max_bytes: read.append(uri) or fetch(source, uri, into, max_bytes=max_bytes),
    )
    assert not shelf.refresh({"a": refused}).refused and not read
    write_adapter(folder, rank=8)
    changes = shelf.refresh({"a": refused})
    assert [record.name for record in changes.changed] == ["a"] and not changes.refused and read == [str(folder)]
    shutil.rmtree(folder)
    assert shelf.refresh({"a": refused}).gone == ["a"]


def test_run_time_loads(write_adapter: WriteAdapter, library: MakeLibrary, tmp_path: Path) -> None:
    allowed = write_adapter(tmp_path / "allowed" / "x", rank=16)
    outside = write_adapter(tmp_path / "outside")
    shelf = library(allowed_roots=[str(tmp_path / "allowed")])
    record = shelf.inspect("new", str(allowed))
    assert (record.name, record.origin, record.rank) == ("new", "runtime", 16)
    assert shelf.holds(record.digest)
    assert shelf.inspect("again", "x").digest == record.digest, "relative to an allowed root"
    for uri in (str(outside), "../outside", f"{allowed}/../../outside"):
        with pytest.raises(AdapterPathNotAllowedError):
            shelf.inspect("new", uri)
    with pytest.raises(AdapterNameError, match="base model's name"):
        shelf.inspect("base", str(allowed))


def test_replicas_fetch_by_record(write_adapter: WriteAdapter, library: MakeLibrary, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "folder" / "a")
    record = library().scan({}).records["a"]
    other_node = library(store_dir=str(tmp_path / "other"))
    assert not other_node.holds(record.digest)
    with other_node.use(record) as folder:
        assert folder == tmp_path / "other" / record.digest
        weights = "adapter_model.safetensors"
        assert (folder / weights).read_bytes() == (source / weights).read_bytes()
    write_adapter(source, seed=5)
    assert other_node.ensure(record) == folder, "running on with what is here"
    with pytest.raises(AdapterChangedError, match="load_inplace"):
        library(store_dir=str(tmp_path / "third")).ensure(record)


def test_use_survives_eviction_pressure(write_adapter: WriteAdapter, library: MakeLibrary, tmp_path: Path) -> None:
    """Two adapters, room for one: whoever is in use stays, whoever is asked for comes back."""
    folders = {name: write_adapter(tmp_path / "folder" / name, seed=seed) for seed, name in enumerate("ab")}
    size_bytes = sum(path.stat().st_size for path in folders["a"].iterdir())
    shelf = library(store_max_gib=1.5 * size_bytes / (1 << 30), fetch_concurrency=1)
    records = shelf.scan({}).records
    assert sum(shelf.holds(record.digest) for record in records.values()) == 1
    for name in "abab":
        with shelf.use(records[name]) as folder:
            shelf.ensure(records["b" if name == "a" else "a"])
            assert folder.is_dir()


def test_files_that_change_while_they_are_read_are_refused(
    write_adapter: WriteAdapter, library: MakeLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_adapter(tmp_path / "folder" / "a")
    read = os.read

    def read_and_touch(descriptor: int, length: int) -> bytes:
        os.utime(folder / "adapter_model.safetensors", (time.time() + 60,) * 2)
        return read(descriptor, length)

    monkeypatch.setattr(os, "read", read_and_touch)
    with pytest.raises(AdapterChangedError, match="while they were read"):
        library().inspect("a", str(folder))
