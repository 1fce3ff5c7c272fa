"""What the scheduler and its workers tell each other, through vLLM's connector channels."""

import contextlib
import functools
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from chameleon_ray.adapters.modules import ModuleTable

REASON_FILE_ENV = "CHAMELEON_UNSUPPORTED_REASON_FILE"
"""Environment variable with the file in which an engine's processes say why they refused: vLLM tells whoever starts an
engine that its processes have failed, and not why."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


class UnsupportedError(ValueError):
    """This model cannot have its adapters where it was asked to. problem: of all such errors of a kind. instead: the
    kind of ``engine.adapter_memory`` that can do."""

    problem: str
    instead: str

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"{self.problem}: {reason}. Use engine.adapter_memory: {self.instead}")


class PagedUnsupportedError(UnsupportedError):
    """This model cannot keep adapters in KV memory."""

    problem = "adapters cannot live in this model's KV memory"
    instead = "slots"


def tells_starter(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorator: an UnsupportedError's reason also goes to whoever starts the engine, who then can fall back."""

    @functools.wraps(method)
    def telling(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return method(*args, **kwargs)
        except UnsupportedError as error:
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
    table: the modules that take LoRA. targets: vLLM's name of one -> (layer number, slice number).
    num_layers: KV tensors. page_elems, pages_per_block, num_blocks: see ``PageGeometry``. element_bytes: of a weight.
    """

    parts: dict[str, tuple[int, tuple[int, ...]]]
    table: ModuleTable
    targets: dict[str, tuple[int, int]]
    num_layers: int
    page_elems: int
    pages_per_block: int
    num_blocks: int
    element_bytes: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request must end with an error, or an adapter is of no use. code: that of an AdapterError.

    retry_after_s: when to try the adapter again; None: never.
    """

    code: str
    reason: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class WorkError:
    """Why a worker could not read or load an adapter. is_permanent: it is the adapter's content, not the moment."""

    reason: str
    is_permanent: bool = False


@dataclass(frozen=True, slots=True)
class Fetch:
    """Read an adapter from its folder into host memory. slice_ranks: see ``plan_rows``; none for slots."""

    adapter_id: int
    folder: str
    slice_ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """Copy an adapter from host memory into these blocks of every layer; with slots, one: the slot's index."""

    adapter_id: int
    block_ids: tuple[int, ...]


@dataclass
class StepOrders(KVConnectorMetadata):
    """Scheduler to workers: what to do with adapters, in this order. Adapters are known by number.

    trial: read these as for a fetch, and keep nothing.
    has_forward: the step computes tokens; runners of vLLM do not all say so when they hand the orders on.
    """

    evict: list[int] = field(default_factory=list)
    drop: list[int] = field(default_factory=list)
    load: list[Load] = field(default_factory=list)
    fetch: list[Fetch] = field(default_factory=list)
    trial: list[Fetch] = field(default_factory=list)
    has_forward: bool = False

    def __bool__(self) -> bool:
        return bool(self.evict or self.drop or self.load or self.fetch or self.trial)


@dataclass
class StepResults(KVConnectorWorkerMetadata):
    """Workers to scheduler: how many ranks finished what. finished: (``fetch``, ``load`` or ``trial``, an adapter's
    number) -> ranks that are done, be it with an error; errors: of the same, the first rank's. seconds: (what,
    duration) of finished work."""

    finished: Counter[tuple[str, int]] = field(default_factory=Counter)
    errors: dict[tuple[str, int], WorkError] = field(default_factory=dict)
    seconds: list[tuple[str, float]] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "StepResults":
        assert isinstance(other, StepResults)
        return StepResults(
            self.finished + other.finished, {**other.errors, **self.errors}, self.seconds + other.seconds
        )

    def __bool__(self) -> bool:
        return bool(self.finished)
