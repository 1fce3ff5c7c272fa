"""What the scheduler and its workers tell each other, through vLLM's connector channels."""

import contextlib
import functools
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

REASON_FILE_ENV = "CHAMELEON_UNSUPPORTED_REASON_FILE"
"""Environment variable with the file in which an engine's processes say why they refused: vLLM tells whoever starts an
engine that its processes have failed, and not why."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


class PagedUnsupportedError(ValueError):
    """This model cannot keep adapters in KV memory."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"adapters cannot live in this model's KV memory: {reason}. "
            "Use vLLM's adapter slots instead (engine.adapter_memory: slots)"
        )


def tells_starter(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorator: a PagedUnsupportedError's reason also goes to whoever starts the engine, who then can fall back."""

    @functools.wraps(method)
    def telling(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return method(*args, **kwargs)
        except PagedUnsupportedError as error:
            if path := os.environ.get(REASON_FILE_ENV):
                Path(path).write_text(error.reason, encoding="utf-8")
            raise

    return telling


@contextlib.contextmanager
def told_reason() -> Iterator[Callable[[], str]]:
    """For whoever starts an engine: what its processes have told (``tells_starter``); "" if nothing."""
    with tempfile.NamedTemporaryFile("r", prefix="chameleon-", suffix=".reason", encoding="utf-8") as file:
        os.environ[REASON_FILE_ENV] = file.name
        try:
            yield lambda: Path(file.name).read_text(encoding="utf-8")
        finally:
            del os.environ[REASON_FILE_ENV]


@dataclass(frozen=True, slots=True)
class SliceShape:
    """One projection of a layer on one tensor-parallel rank: A is [rank, in_features], B is [out_features, rank]."""

    in_features: int
    out_features: int


@dataclass(frozen=True)
class ModelLayout(KVConnectorHandshakeMetadata):
    """What a worker knows about the model once it is loaded, sent to the scheduler at start-up.

    parts: name of a part -> (in_features, output widths of its slices), in row-table order.
    targets: vLLM's name of an adapted module, as in checkpoints -> (layer number, slice number).
    renames: the model's WeightsMapper from checkpoint names to vLLM's, or None.
    num_layers: KV tensors. page_elems, pages_per_block, num_blocks: see ``PageGeometry``. element_bytes: of a weight.
    """

    parts: dict[str, tuple[int, tuple[int, ...]]]
    targets: dict[str, tuple[int, int]]
    renames: Any
    num_layers: int
    page_elems: int
    pages_per_block: int
    num_blocks: int
    element_bytes: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request must end with an error. retry_after_s: when to try its adapter again; None: never."""

    reason: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Fetch:
    """Read an adapter from its folder into host memory. slice_ranks: see ``plan_rows``."""

    adapter_id: int
    folder: str
    slice_ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """Copy an adapter from host memory into these blocks of every layer."""

    adapter_id: int
    block_ids: tuple[int, ...]


@dataclass
class StepOrders(KVConnectorMetadata):
    """Scheduler to workers: what to do with adapters, in this order. Adapters are known by number."""

    evict: list[int] = field(default_factory=list)
    drop: list[int] = field(default_factory=list)
    load: list[Load] = field(default_factory=list)
    fetch: list[Fetch] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.evict or self.drop or self.load or self.fetch)


@dataclass
class StepResults(KVConnectorWorkerMetadata):
    """Workers to scheduler: how many ranks finished what. fetched, loaded: adapter number -> ranks that are done, be it
    with an error; errors: adapter number -> the first rank's reason. seconds: (what, duration) of finished work."""

    fetched: Counter[int] = field(default_factory=Counter)
    loaded: Counter[int] = field(default_factory=Counter)
    errors: dict[int, str] = field(default_factory=dict)
    seconds: list[tuple[str, float]] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "StepResults":
        assert isinstance(other, StepResults)
        return StepResults(
            self.fetched + other.fetched,
            self.loaded + other.loaded,
            {**other.errors, **self.errors},
            self.seconds + other.seconds,
        )

    def __bool__(self) -> bool:
        return bool(self.fetched or self.loaded)
