"""Which places adapters are read from, and above all from which not."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from chameleon_ray.adapters.access import Sources
from chameleon_ray.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterNotFoundError,
    AdapterPathNotAllowedError,
    AdapterTooLargeError,
)
from chameleon_ray.adapters.sources import AdapterSource
from chameleon_ray.config import AdaptersConfig

WriteAdapter = Callable[..., Path]
LIMIT = 1 << 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "allowed"
    root.mkdir()
    return root


def source_for(uri: str, roots: list[Path]) -> AdapterSource:
    return Sources(AdaptersConfig(allowed_roots=[str(root) for root in roots])).find(uri)


def _fetch(uri: str, root: Path, into: Path, max_bytes: int = LIMIT) -> list[str]:
    into.mkdir()
    source_for(uri, [root]).fetch(uri, into, max_bytes=max_bytes)
    return sorted(path.name for path in into.iterdir())


def _refused(uri: str, root: Path, into: Path) -> AdapterError:
    """The error of both methods, which must agree; and nothing was copied."""
    with pytest.raises(AdapterError) as fingerprint:
        source_for(uri, [root]).fingerprint(uri)
    with pytest.raises(AdapterError) as fetch:
        _fetch(uri, root, into)
    assert type(fingerprint.value) is type(fetch.value)
    assert not (into / "adapter_model.safetensors").exists()
    return fetch.value


def test_copies_only_the_two_files(write_adapter: WriteAdapter, root: Path, tmp_path: Path) -> None:
    folder = write_adapter(root / "my adapter")
    (folder / "training_args.bin").write_bytes(b"pickle")
    both = ["adapter_config.json", "adapter_model.safetensors"]
    uris = [
        str(folder),
        folder.as_uri(),
        f"file://localhost{root}/my%20adapter",
        "my adapter",
        f"{folder}/../my adapter",
    ]
    for index, uri in enumerate(uris):
        into = tmp_path / str(index)
        assert _fetch(uri, root, into) == both, uri
        assert all((into / name).read_bytes() == (folder / name).read_bytes() for name in both)


def test_links_inside_the_roots_are_fine(write_adapter: WriteAdapter, root: Path, tmp_path: Path) -> None:
    blobs = write_adapter(root / "blobs")
    (root / "by-name").symlink_to(blobs)
    (root / "files").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (root / "files" / name).symlink_to(f"../blobs/{name}")
    (tmp_path / "root-by-name").symlink_to(root)
    for index, uri in enumerate([f"{root}/by-name", f"{root}/files", f"{tmp_path}/root-by-name/blobs"]):
        assert len(_fetch(uri, root, tmp_path / str(index))) == 2


def test_paths_outside_the_roots_are_refused(write_adapter: WriteAdapter, root: Path, tmp_path: Path) -> None:
    outside = write_adapter(tmp_path / "outside")
    write_adapter(tmp_path / "allowed-not")  # shares the root's beginning
    (root / "link").symlink_to(outside)
    (root / "linked-file").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (root / "linked-file" / name).symlink_to(outside / name)
    uris = [str(outside), outside.as_uri(), f"{root}/../outside", "../outside", f"{root}/link", "link"]
    uris += [f"{root}/linked-file", f"{tmp_path}/allowed-not", f"file://{root}/%2e%2e/outside", "/", "/etc"]
    uris += [f"{tmp_path}/nothing-here", f"/proc/self/root{outside}", f"/proc/self/cwd/{outside}"]
    for index, uri in enumerate(uris):
        error = _refused(uri, root, tmp_path / str(index))
        assert isinstance(error, AdapterPathNotAllowedError), (uri, error)
        assert "allowed_roots" in str(error) and error.http_status == 403


def test_without_roots_nothing_is_readable(write_adapter: WriteAdapter, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter")
    with pytest.raises(AdapterPathNotAllowedError):
        source_for(str(folder), []).fingerprint(str(folder))


def test_a_link_that_changes_meanwhile_leads_nowhere(write_adapter: WriteAdapter, root: Path, tmp_path: Path) -> None:
    """Somebody flips a folder between inside and outside as fast as he can; no outside content is ever copied."""
    inside, outside = write_adapter(root / "inside", seed=1), write_adapter(tmp_path / "outside", seed=2)
    secret = (outside / "adapter_model.safetensors").read_bytes()
    link, spare = root / "link", root / "spare"
    link.symlink_to(inside)
    stop = threading.Event()

    def flip() -> None:
        while not stop.is_set():
            for target in (outside, inside):
                spare.symlink_to(target)
                os.replace(spare, link)

    thread = threading.Thread(target=flip)
    thread.start()
    outcomes = set()
    try:
        for attempt in range(400):
            into = tmp_path / f"into-{attempt}"
            try:
                _fetch(str(link), root, into)
                outcomes.add("copied")
            except AdapterError as error:
                outcomes.add(type(error).__name__)
            copied = into / "adapter_model.safetensors"
            assert not copied.exists() or copied.read_bytes() != secret
    finally:
        stop.set()
        thread.join()
    assert outcomes == {"copied", "AdapterPathNotAllowedError"}


def test_missing_things_are_named(write_adapter: WriteAdapter, root: Path, tmp_path: Path) -> None:
    (root / "empty").mkdir()
    (root / "file").write_text("")
    for index, uri in enumerate([f"{root}/absent", f"{root}/file", "absent", "org/adapter", "~/x", f"{root}/a\0b"]):
        assert isinstance(_refused(uri, root, tmp_path / f"a{index}"), AdapterNotFoundError), uri
    assert "absolute path" in str(_refused("org/adapter", root, tmp_path / "b"))
    assert "no adapter_config.json" in str(_refused(f"{root}/empty", root, tmp_path / "c"))
    folder = write_adapter(root / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    assert "no adapter_model.safetensors" in str(_refused(str(folder), root, tmp_path / "d"))


@pytest.mark.parametrize("pickled", ["adapter_model.bin", "adapter_model.pt"])
def test_pickles_are_refused(write_adapter: WriteAdapter, root: Path, tmp_path: Path, pickled: str) -> None:
    folder = write_adapter(root / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / pickled)
    error = _refused(str(folder), root, tmp_path / "into")
    assert isinstance(error, AdapterInvalidError) and "only safetensors" in str(error) and pickled in str(error)


def test_odd_files_are_refused(write_adapter: WriteAdapter, root: Path, tmp_path: Path) -> None:
    folder = write_adapter(root / "adapter")
    weights = folder / "adapter_model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    assert "regular file" in str(_refused(str(folder), root, tmp_path / "fifo"))
    weights.unlink()
    weights.mkdir()
    assert "regular file" in str(_refused(str(folder), root, tmp_path / "folder"))


def test_size_is_bounded(write_adapter: WriteAdapter, root: Path, tmp_path: Path) -> None:
    folder = write_adapter(root / "adapter")
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert len(_fetch(str(folder), root, tmp_path / "exact", size)) == 2
    with pytest.raises(AdapterTooLargeError, match="max_adapter_mib"):
        _fetch(str(folder), root, tmp_path / "over", size - 1)
    (folder / "adapter_config.json").write_text(" " * (1 << 20) + "{}")
    with pytest.raises(AdapterTooLargeError, match="adapter_config"):
        _fetch(str(folder), root, tmp_path / "config")


def test_fingerprint_changes_with_the_files(write_adapter: WriteAdapter, root: Path) -> None:
    folder = write_adapter(root / "adapter", rank=4)
    source = source_for(str(folder), [root])
    before = source.fingerprint(str(folder))
    assert source.fingerprint(folder.as_uri()) == before
    write_adapter(folder, rank=4, seed=1)
    os.utime(folder / "adapter_model.safetensors", ns=(0, 0))
    assert source.fingerprint(str(folder)) != before


@pytest.mark.parametrize("uri", ["http://host/a", "FTP://host/a", "file://host/a"])
def test_unknown_schemes_are_named(uri: str, root: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalidError, match="file://"):
        source_for(uri, [root]).fingerprint(uri)
