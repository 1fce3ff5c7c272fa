"""The store: content-addressed, whole or absent, bounded, and safe between threads and processes."""

import fcntl
import hashlib
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from chameleon_ray.adapters import store as store_module
from chameleon_ray.adapters.errors import (
    AdapterChangedError,
    AdapterError,
    AdapterInvalidError,
    AdapterNotFoundError,
    AdapterSourceError,
    AdapterStoreError,
    AdapterTooLargeError,
)
from chameleon_ray.adapters.sources import LocalSource
from chameleon_ray.adapters.store import AdapterStore, StoredAdapter
from chameleon_ray.adapters.validate import AdapterInfo, Rules, read_info

WriteAdapter = Callable[..., Path]
GIB = 1 << 30
SPAWN = multiprocessing.get_context("spawn")


def _validate(folder: Path) -> AdapterInfo:
    return read_info(folder, Rules(max_rank=64, max_bytes=GIB))


def _add(store: AdapterStore, folder: Path) -> StoredAdapter:
    return store.add(LocalSource([folder]), str(folder), _validate, max_bytes=GIB)


def _ensure(store: AdapterStore, digest: str, folder: Path) -> Path:
    return store.ensure(digest, LocalSource([folder]), str(folder), _validate, max_bytes=GIB)


def _contents(store_dir: Path) -> list[str]:
    return sorted(path.name for path in store_dir.iterdir() if path.name not in (".known", ".locks", ".room"))


@pytest.fixture
def adapters(write_adapter: WriteAdapter, tmp_path: Path) -> list[Path]:
    """Four adapters of the same size."""
    return [write_adapter(tmp_path / "sources" / f"a{seed}", seed=seed) for seed in range(4)]


@pytest.fixture
def size_bytes(adapters: list[Path]) -> int:
    return sum(path.stat().st_size for path in adapters[0].iterdir())


def test_content_decides_the_digest(adapters: list[Path], tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store", GIB)
    stored = _add(store, adapters[0])
    config, weights = (
        (adapters[0] / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    sized = b"".join(len(part).to_bytes(8, "little") + part for part in (config, weights))
    assert stored.digest == hashlib.sha256(sized).hexdigest()
    assert stored.info.rank == 4
    assert (stored.folder / "adapter_model.safetensors").read_bytes() == weights
    assert store.path(stored.digest) == stored.folder == tmp_path / "store" / stored.digest

    renamed = adapters[0].rename(tmp_path / "renamed")
    assert _add(store, renamed) == stored, "the same content is the same adapter"
    assert _add(store, adapters[1]).digest != stored.digest
    assert len(_contents(tmp_path / "store")) == 2
    assert AdapterStore(tmp_path / "store", GIB).path(stored.digest) == stored.folder, "it outlives the process"


def test_nothing_stays_of_a_bad_adapter(adapters: list[Path], tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store", GIB)
    weights = adapters[0] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(AdapterInvalidError):
        _add(store, adapters[0])
    with pytest.raises(AdapterNotFoundError):
        _add(store, tmp_path / "absent")
    assert _contents(tmp_path / "store") == []


def test_ensure_fetches_what_is_absent_and_refuses_other_content(
    write_adapter: WriteAdapter, adapters: list[Path], tmp_path: Path
) -> None:
    digest = _add(AdapterStore(tmp_path / "one", GIB), adapters[0]).digest
    store = AdapterStore(tmp_path / "store", GIB)
    assert store.path(digest) is None
    folder = _ensure(store, digest, adapters[0])
    assert folder == store.path(digest)

    write_adapter(adapters[0], seed=99)
    assert _ensure(store, digest, adapters[0]) == folder, "what is here needs no source"
    fresh = AdapterStore(tmp_path / "fresh", GIB)
    with pytest.raises(AdapterChangedError, match="load_inplace"):
        _ensure(fresh, digest, adapters[0])
    assert _contents(tmp_path / "fresh") == []


def test_digests_are_no_paths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="SHA-256"):
        AdapterStore(tmp_path, GIB).path("../../etc")


def test_least_recently_used_leaves_first(adapters: list[Path], size_bytes: int, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store", 3 * size_bytes)
    stored = [_add(store, folder) for folder in adapters[:3]]
    for age_s, one in zip((300, 200, 100), stored, strict=True):
        os.utime(one.folder, (time.time() - age_s,) * 2)
    with store.use(stored[0].digest):
        pass  # used just now: no longer the oldest
    last = _add(store, adapters[3])
    assert [store.path(one.digest) is not None for one in [*stored, last]] == [True, False, True, True]
    assert store.size_bytes() == 3 * size_bytes
    with pytest.raises(AdapterNotFoundError), store.use(stored[1].digest):
        pass


def test_adapters_in_use_stay_even_if_the_store_outgrows_its_bound(
    adapters: list[Path], size_bytes: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = AdapterStore(tmp_path / "store", size_bytes)
    first = _add(store, adapters[0])
    with store.use(first.digest) as folder, store.use(first.digest):
        second = _add(store, adapters[1])
        assert folder.is_dir() and second.folder.is_dir()
        assert "store_max_gib" in caplog.text
    third = _add(store, adapters[2])
    assert not first.folder.exists() and not second.folder.exists() and third.folder.exists()


def test_an_adapter_larger_than_the_store_is_refused(adapters: list[Path], size_bytes: int, tmp_path: Path) -> None:
    with pytest.raises(AdapterTooLargeError):
        _add(AdapterStore(tmp_path / "store", size_bytes - 1), adapters[0])


def _hold(store_dir: Path, digest: str, pipe: Connection) -> None:
    """Another process that uses an adapter until told to stop."""
    with AdapterStore(store_dir, GIB).use(digest) as folder:
        pipe.send("using")
        pipe.recv()
        pipe.send((folder / "adapter_model.safetensors").read_bytes())


@pytest.mark.parametrize("ending", ["finishes", "is killed"])
def test_a_use_in_another_process_holds_too(adapters: list[Path], size_bytes: int, tmp_path: Path, ending: str) -> None:
    store = AdapterStore(tmp_path / "store", size_bytes)
    held = _add(store, adapters[0])
    mine, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_hold, args=(tmp_path / "store", held.digest, theirs))
    process.start()
    try:
        assert mine.poll(120) and mine.recv() == "using"
        _add(store, adapters[1])
        _add(store, adapters[2])
        if ending == "finishes":
            mine.send("stop")
            assert mine.poll(120) and mine.recv() == (adapters[0] / "adapter_model.safetensors").read_bytes()
        else:
            assert held.folder.is_dir()
            process.kill()
        process.join(120)
    finally:
        process.kill()
    _add(store, adapters[3])
    assert not held.folder.exists()


def test_an_eviction_just_before_the_lock_is_noticed(
    adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AdapterStore(tmp_path / "store", GIB)
    stored = _add(store, adapters[0])
    flock = fcntl.flock

    def evicted_meanwhile(descriptor: int, operation: int) -> None:
        stored.folder.rename(tmp_path / "trash")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", evicted_meanwhile)
    with pytest.raises(AdapterNotFoundError), store.use(stored.digest):
        pytest.fail("it is gone")


class _CountingSource(LocalSource):
    def __init__(self, root: Path) -> None:
        super().__init__([root])
        self.fetches = 0

    def fetch(self, uri: str, into: Path, *, max_bytes: int) -> str:
        self.fetches += 1
        return super().fetch(uri, into, max_bytes=max_bytes)


def test_concurrent_callers_fetch_once(adapters: list[Path], tmp_path: Path) -> None:
    digest = _add(AdapterStore(tmp_path / "one", GIB), adapters[0]).digest
    source = _CountingSource(adapters[0])
    start = threading.Barrier(8)

    def ensure(_: int) -> Path:
        store = AdapterStore(tmp_path / "store", GIB)
        start.wait()
        return store.ensure(digest, source, str(adapters[0]), _validate, max_bytes=GIB)

    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(ensure, range(8)))
    assert folders == {tmp_path / "store" / digest} and source.fetches == 1
    assert _contents(tmp_path / "store") == [digest]


def _churn(store_dir: Path, max_bytes: int, folders: list[Path], digests: list[str], rounds: int) -> None:
    """Uses every adapter in turn through a store that has no room for all, checking the bytes it gets to see."""
    store = AdapterStore(store_dir, max_bytes)
    for turn in range(rounds):
        folder, digest = folders[turn % len(folders)], digests[turn % len(folders)]
        _ensure(store, digest, folder)
        try:
            with store.use(digest) as held:
                read = (held / "adapter_model.safetensors").read_bytes()
                assert read == (folder / "adapter_model.safetensors").read_bytes()
        except AdapterNotFoundError:
            continue  # evicted between ensure and use


def test_processes_and_threads_share_a_store_without_room(
    adapters: list[Path], size_bytes: int, tmp_path: Path
) -> None:
    digests = [_add(AdapterStore(tmp_path / "one", GIB), folder).digest for folder in adapters]
    arguments = (tmp_path / "store", 2 * size_bytes, adapters, digests)
    processes = [SPAWN.Process(target=_churn, args=(*arguments, 150)) for _ in range(2)]
    for process in processes:
        process.start()
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(_churn, *arguments, 150) for _ in range(3)]:
            done.result()
    for process in processes:
        process.join(600)
        assert process.exitcode == 0
    left = _contents(tmp_path / "store")
    assert set(left) <= set(digests), "no temporary folder is left"
    assert AdapterStore(tmp_path / "store", GIB).size_bytes() <= 2 * size_bytes


def _crash_while_fetching(store_dir: Path, folder: Path) -> None:
    class Crash(LocalSource):
        def fetch(self, uri: str, into: Path, *, max_bytes: int) -> str:
            (into / "adapter_model.safetensors").write_bytes(b"half")
            os._exit(1)

    AdapterStore(store_dir, GIB).add(Crash([folder]), str(folder), _validate, max_bytes=GIB)


def test_leftovers_of_crashes_are_removed_at_start(adapters: list[Path], tmp_path: Path) -> None:
    process = SPAWN.Process(target=_crash_while_fetching, args=(tmp_path / "store", adapters[0]))
    process.start()
    process.join(600)
    (left,) = _contents(tmp_path / "store")
    assert left.startswith(".tmp-")
    AdapterStore(tmp_path / "store", GIB)
    assert _contents(tmp_path / "store") == [left], "it is so new that its maker may be about to lock it"

    long_ago = (time.time() - 3600,) * 2
    os.utime(tmp_path / "store" / left, long_ago)

    class Slow(LocalSource):
        """Its temporary folder looks as old, but its maker lives."""

        def fetch(self, uri: str, into: Path, *, max_bytes: int) -> str:
            mark = super().fetch(uri, into, max_bytes=max_bytes)
            os.utime(into, long_ago)
            AdapterStore(tmp_path / "store", GIB)
            return mark

    stored = AdapterStore(tmp_path / "store", GIB).add(Slow([adapters[0]]), str(adapters[0]), _validate, max_bytes=GIB)
    assert _contents(tmp_path / "store") == [stored.digest]


def test_trouble_with_the_disk_is_an_adapter_error(adapters: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterStoreError, match="store_dir"):
        AdapterStore(tmp_path / "file", GIB)

    class Unreachable(LocalSource):
        def fetch(self, uri: str, into: Path, *, max_bytes: int) -> str:
            raise AdapterSourceError("no route")

    store = AdapterStore(tmp_path / "store", GIB)
    with pytest.raises(AdapterError, match="no route"):
        store.add(Unreachable([]), "far", _validate, max_bytes=GIB)
    assert _contents(tmp_path / "store") == []


def test_digests_are_those_in_the_folder_whoever_changed_it(
    tmp_path: Path, adapters: list[Path], size_bytes: int
) -> None:
    store = AdapterStore(tmp_path / "store", 2 * size_bytes)
    neighbour = AdapterStore(tmp_path / "store", 2 * size_bytes)
    assert store.digests() == neighbour.digests() == frozenset()
    added = [_add(neighbour, folder).digest for folder in adapters[:2]]
    assert store.digests() == frozenset(added)
    added.append(_add(neighbour, adapters[2]).digest)  # evicts the first
    assert store.digests() == neighbour.digests() == frozenset(added[1:])


def test_digests_are_read_again_only_after_a_change(
    tmp_path: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "store"
    monkeypatch.setattr(store_module, "_SETTLED_NS", 5 * 10**10)  # no machine takes so long for this test
    store = AdapterStore(folder, GIB)
    first = _add(store, adapters[0]).digest
    listed: list[object] = []
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(path) or listdir(path))
    # A change a moment ago may be followed by another one of the same date.
    dated_ns = folder.stat().st_mtime_ns
    assert store.digests() == {first}
    second = _add(store, adapters[1]).digest
    os.utime(folder, ns=(dated_ns, dated_ns))
    assert store.digests() == {first, second}
    long_ago_ns = dated_ns - 10**11
    os.utime(folder, ns=(long_ago_ns, long_ago_ns))
    before = len(listed)
    assert [store.digests() for _ in range(5)] == [{first, second}] * 5
    assert len(listed) == before + 1
    third = _add(store, adapters[2]).digest
    assert store.digests() == {first, second, third}


def test_digests_of_a_lost_store_are_an_error(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store", GIB)
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(AdapterStoreError, match="store_dir"):
        store.digests()
