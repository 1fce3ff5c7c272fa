"""What a node takes from other nodes' stores."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from chameleon_ray.adapters.catalog import AdapterLibrary
from chameleon_ray.adapters.errors import (
    AdapterChangedError,
    AdapterNotFoundError,
    AdapterSourceError,
    AdapterTooLargeError,
)
from chameleon_ray.adapters.modules import ModuleTable
from chameleon_ray.adapters.peers import Peers, unpack
from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.adapters.sources import FILES
from chameleon_ray.adapters.store import content_digest, packed
from chameleon_ray.config import AdaptersConfig, ModelConfig

NO_LIMIT = 1 << 40


@pytest.fixture
def adapter(tmp_path: Path, write_adapter: Callable[..., Path]) -> Path:
    return write_adapter(tmp_path / "source/a")


@pytest.mark.parametrize("chunk_bytes", [1, 7, 8, 9, 4096, NO_LIMIT])
def test_what_is_packed_is_unpacked(adapter: Path, tmp_path: Path, chunk_bytes: int) -> None:
    whole, into = b"".join(packed(adapter)), tmp_path / "copy"
    into.mkdir()
    step = min(chunk_bytes, len(whole))
    chunks = (whole[begin : begin + step] for begin in range(0, len(whole), step))
    assert unpack(chunks, into, "a", NO_LIMIT) == content_digest(adapter) == content_digest(into)
    assert all((into / name).read_bytes() == (adapter / name).read_bytes() for name in FILES)


@pytest.mark.parametrize("kept_bytes", [0, 5, 8, 9, -1])
def test_content_that_is_cut_off_or_goes_on_is_an_error(adapter: Path, tmp_path: Path, kept_bytes: int) -> None:
    whole = b"".join(packed(adapter))
    for number, content in enumerate((whole[:kept_bytes], whole + b"x")):
        into = tmp_path / str(number)
        into.mkdir()
        with pytest.raises(AdapterSourceError):
            unpack(iter([content]), into, "a", NO_LIMIT)


def test_weights_over_the_bound_are_refused_before_they_are_read(adapter: Path, tmp_path: Path) -> None:
    size = (adapter / FILES[1]).stat().st_size
    into = tmp_path / "copy"
    into.mkdir()
    with pytest.raises(AdapterTooLargeError):
        unpack(packed(adapter), into, "a", size - 1)
    assert not (into / FILES[1]).exists()


class Node:
    """A node with a store of its own and, as far as it knows, these peers."""

    def __init__(self, folder: Path, root: Path, table: Future[ModuleTable], peers: Peers | None = None) -> None:
        config = AdaptersConfig(store_dir=str(folder), allowed_roots=[str(root)])
        self.folder = folder
        self.library = AdapterLibrary(config, ModelConfig(source="base"), table, peers)

    def content(self, record: AdapterRecord) -> Iterator[bytes]:
        return packed(self.folder / record.digest)


def test_peers_come_before_the_source_and_wrong_ones_are_passed_over(
    adapter: Path, tmp_path: Path, tiny_table: ModuleTable, as_future: Callable[[ModuleTable], Future[ModuleTable]]
) -> None:
    table, root = as_future(tiny_table), adapter.parent
    first = Node(tmp_path / "first", root, table)
    record = first.library.inspect("a", str(adapter))
    other = first.library.inspect("b", str(adapter)).model_copy(update={"digest": "0" * 64})
    asked: list[str] = []

    def lost() -> Iterator[bytes]:
        asked.append("lost")
        yield next(first.content(record))
        raise AdapterSourceError("the node is gone")

    def damaged() -> Iterator[bytes]:
        asked.append("damaged")
        *begin, last = first.content(record)
        yield from (*begin, bytes([last[0] ^ 1]) + last[1:])

    def whole() -> Iterator[bytes]:
        asked.append("whole")
        yield from first.content(record)

    second = Node(tmp_path / "second", root, table, lambda _: [("one", lost()), ("two", damaged()), ("three", whole())])
    adapter.rename(tmp_path / "away")  # from its source it cannot be had
    assert content_digest(second.library.ensure(record)) == record.digest
    assert asked == ["lost", "damaged", "whole"]
    assert content_digest(second.library.ensure(record)) == record.digest
    assert len(asked) == 3, "what is here is not fetched again"

    third = Node(tmp_path / "third", root, table, lambda _: [("one", lost())])
    with pytest.raises(AdapterNotFoundError, match="no such folder"):
        third.library.ensure(record)
    (tmp_path / "away").rename(adapter)
    assert content_digest(third.library.ensure(record)) == record.digest, "the source is there for the rest"
    with pytest.raises(AdapterChangedError):
        third.library.ensure(other)
