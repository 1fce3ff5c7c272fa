"""Worker side: adapters from disk into host memory, and from there into blocks of the KV cache, beside the batch.

Files are read by background threads into host memory that is already in page order and sharded for this rank. Copies
into blocks run in one background thread on a CPU, on a side stream on a GPU: the only difference between the two is
``_CpuCopier`` and ``_GpuCopier``. Everything else here is called by the worker's own thread. What is the same for
adapters elsewhere (``engine.slots``) is ``WorkerHost``.
"""

import contextlib
import ctypes
import mmap
import os
import queue
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from chameleon_kernels import AdapterRows, RowPlan
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata

from chameleon_ray.engine.paged.checkpoint import AdapterFilesError, LayerModule, pack_plan, read_pages
from chameleon_ray.engine.paged.messages import Fetch, Load, ModelLayout, StepOrders, StepResults, WorkError
from chameleon_ray.engine.paged.pages import PageGeometry

BACKGROUND_NICENESS = 10
"""Threads that read and copy give way to the ones that compute; niceness is per thread on Linux."""
SWITCH_INTERVAL_S = 0.0005
"""The worker's own thread lets go of Python's lock many times a step; with readers and copier beside it, it could wait
5 ms, the default, each time to get it back."""
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # Linux; the second, from 6.1 on, is for memory that is in use already.
IDLE_WAIT_S = 0.002
"""A step without a forward pass waits so long for a result, else the engine's loop would spin."""


@dataclass(frozen=True, slots=True)
class HostCopy:
    """An adapter in host memory. pages: [num_layers, num_pages, page_elems] in page order."""

    plan: RowPlan
    pages: torch.Tensor


_CopyT = TypeVar("_CopyT")
_PlaceT = TypeVar("_PlaceT")


@dataclass(frozen=True, slots=True)
class _Done(Generic[_CopyT, _PlaceT]):
    """A read that gave ``copy``, a load that ended at ``place``, or an error of either."""

    adapter_id: int
    what: str
    seconds: float
    error: WorkError | None = None
    copy: _CopyT | None = None
    place: _PlaceT | None = None


class WorkerHost(ABC, Generic[_CopyT, _PlaceT]):
    """All adapters of one worker, and its side of the orders: copies in host memory (``_CopyT``), and what the LoRA
    layers have to know of a loaded one (``_PlaceT``)."""

    def __init__(self, layout: KVConnectorHandshakeMetadata, num_readers: int) -> None:
        self.layout = layout
        self._copies: dict[int, _CopyT] = {}
        self._done: queue.SimpleQueue[_Done[_CopyT, _PlaceT]] = queue.SimpleQueue()
        self._num_pending = 0
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._readers = ThreadPoolExecutor(num_readers, "adapter-reader", initializer=background_thread)

    @abstractmethod
    def read(self, fetch: Fetch) -> _CopyT:
        """The adapter in host memory; in a background thread. Raises whatever is wrong with it."""

    @abstractmethod
    def copy(self, load: Load, copy: _CopyT, done: Callable[[_PlaceT | None, str | None], None]) -> None:
        """Begin to copy into the blocks; ``done`` is to be called, in any thread, with the place or with an error."""

    @abstractmethod
    def poll(self) -> None:
        """Call ``done`` for copies that have finished meanwhile."""

    @abstractmethod
    def loaded(self, adapter_id: int, place: _PlaceT) -> None:
        """The next steps may use the adapter."""

    @abstractmethod
    def evicted(self, adapter_id: int) -> None:
        """No step from the next on uses the adapter; this rank may have failed to load it."""

    def start(self, orders: StepOrders) -> None:
        """Carry the orders out; reads and copies end later, see ``take_results``."""
        for adapter_id in orders.evict:
            self.evicted(adapter_id)
        for adapter_id in orders.drop:
            self._copies.pop(adapter_id, None)  # Absent where this rank's read had failed.
        for load in orders.load:
            self._load(load)
        for what, fetches in (("fetch", orders.fetch), ("trial", orders.trial)):
            for fetch in fetches:
                self._num_pending += 1
                self._readers.submit(self._read, fetch, what)

    def take_results(self, may_wait: bool) -> StepResults:
        """What has finished since the last call; waits a moment for the first one if ``may_wait``."""
        results = StepResults()
        self.poll()
        wait_s = IDLE_WAIT_S if may_wait and self._num_pending else 0.0
        while True:
            try:
                done = self._done.get(timeout=wait_s) if wait_s else self._done.get_nowait()
            except queue.Empty:
                return results
            wait_s = 0.0
            self._num_pending -= 1
            self._settle(done, results)

    def close(self) -> None:
        """Stop the background threads; reads under way end first."""
        self._readers.shutdown(wait=True, cancel_futures=True)

    def _settle(self, done: _Done[_CopyT, _PlaceT], results: StepResults) -> None:
        work = (done.what, done.adapter_id)
        results.finished[work] += 1
        if done.error is not None:
            results.errors[work] = done.error
        if done.copy is not None:
            self._copies[done.adapter_id] = done.copy
        if done.place is not None:
            self.loaded(done.adapter_id, done.place)
        results.seconds.append((done.what, done.seconds))

    def _load(self, load: Load) -> None:
        began_s = time.monotonic()
        self._num_pending += 1

        def done(place: _PlaceT | None, error: str | None) -> None:
            problem = None if error is None else WorkError(error)
            self._done.put(_Done(load.adapter_id, "load", time.monotonic() - began_s, problem, place=place))

        self.copy(load, self._copies[load.adapter_id], done)

    def _read(self, fetch: Fetch, what: str) -> None:
        """``fetch``: into memory that stays; ``trial``: only to see whether that would succeed."""
        began_s = time.monotonic()
        copy, error = None, None
        try:
            copy = self.read(fetch)
            if what == "trial":
                copy = None
        except Exception as problem:  # Whatever is wrong with one adapter's files must not end the engine.
            error = WorkError(str(problem) or repr(problem), isinstance(problem, AdapterFilesError))
        self._done.put(_Done(fetch.adapter_id, what, time.monotonic() - began_s, error, copy=copy))


class _Copier(Protocol):
    def submit(
        self, copy: HostCopy, page_starts: np.ndarray, done: Callable[[AdapterRows | None, str | None], None]
    ) -> None:
        """Copy into the blocks; ``done`` is called, in any thread, with the table or with an error."""

    def poll(self) -> None:
        """Call ``done`` for copies that have finished meanwhile."""


class AdapterHost(WorkerHost[HostCopy, AdapterRows]):
    """Adapters in pages. ``resident``: adapter number -> rows, what the LoRA layers compute with."""

    layout: ModelLayout

    def __init__(
        self,
        layout: ModelLayout,
        geometry: PageGeometry,
        modules: list[LayerModule],
        kv_layers: list[torch.Tensor],
        *,
        num_readers: int,
        check_finite: bool,
    ) -> None:
        super().__init__(layout, num_readers)
        self.resident: dict[int, AdapterRows] = {}
        self.version = 0  # Grows with every change of ``resident``.
        self._geometry = geometry
        self._modules = modules
        self._check_finite = check_finite
        self._dtype = kv_layers[0].dtype
        on_cpu = kv_layers[0].device.type == "cpu"
        self._pin = not on_cpu
        self._copier: _Copier = _CpuCopier(kv_layers) if on_cpu else _GpuCopier(kv_layers, geometry)

    def read(self, fetch: Fetch) -> HostCopy:
        plan = pack_plan(self.layout, fetch.slice_ranks)
        shape = (self.layout.num_layers, plan.num_pages, self.layout.page_elems)
        pages = torch.zeros(shape, dtype=self._dtype, pin_memory=self._pin)
        read_pages(Path(fetch.folder), self.layout, self._modules, fetch.slice_ranks, pages, self._check_finite)
        return HostCopy(plan, pages)

    def copy(self, load: Load, copy: HostCopy, done: Callable[[AdapterRows | None, str | None], None]) -> None:
        self._copier.submit(copy, self._geometry.page_starts(load.block_ids)[: copy.plan.num_pages], done)

    def poll(self) -> None:
        self._copier.poll()

    def loaded(self, adapter_id: int, place: AdapterRows) -> None:
        self.resident[adapter_id] = place
        self.version += 1

    def evicted(self, adapter_id: int) -> None:
        self.resident.pop(adapter_id, None)
        self.version += 1


class _CpuCopier:
    """Copies in a background thread, page by page: torch lets go of Python's lock for each, so that the worker's own
    thread never waits for more than one."""

    def __init__(self, kv_layers: list[torch.Tensor]) -> None:
        for storage in {layer.untyped_storage().data_ptr(): layer.untyped_storage() for layer in kv_layers}.values():
            _use_huge_pages(storage.data_ptr(), storage.nbytes())
        self._layers = [_flat(layer) for layer in kv_layers]
        self._thread = ThreadPoolExecutor(1, "adapter-copier", initializer=background_thread)

    def submit(
        self, copy: HostCopy, page_starts: np.ndarray, done: Callable[[AdapterRows | None, str | None], None]
    ) -> None:
        @torch.inference_mode()  # As vLLM made the tensors.
        def run() -> None:
            # The rows of memory are those of blocks that the scheduler lent to this adapter alone, so nothing races.
            for layer, pages in zip(self._layers, copy.pages, strict=True):
                for start, page in zip(page_starts.tolist(), pages, strict=True):
                    layer[start : start + page.shape[0]].copy_(page)
            done(AdapterRows.build(copy.plan, page_starts, "cpu"), None)

        self._thread.submit(run).add_done_callback(lambda future: _report(future, done))

    def poll(self) -> None:
        pass


class _GpuCopier:
    """Copies on a side stream, after everything that the compute stream has been given so far: a block that is lent now
    may still be written by a step under way. The table is used by later steps only, once the copy's event has passed.
    """

    def __init__(self, kv_layers: list[torch.Tensor], geometry: PageGeometry) -> None:
        self._geometry = geometry
        self._layers = [_flat(layer) for layer in kv_layers]
        self._device = kv_layers[0].device
        self._stream = torch.cuda.Stream(self._device)
        self._flying: list[tuple[torch.cuda.Event, AdapterRows, Callable[[AdapterRows | None, str | None], None]]] = []

    def submit(
        self, copy: HostCopy, page_starts: np.ndarray, done: Callable[[AdapterRows | None, str | None], None]
    ) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            starts = torch.from_numpy(page_starts).pin_memory().to(self._device, non_blocking=True)
            rows = AdapterRows.build(copy.plan, page_starts, self._device)
            for layer, pages in zip(self._layers, copy.pages, strict=True):
                staged = pages.to(self._device, non_blocking=True)
                window = torch.arange(staged.shape[1], device=self._device)
                layer.index_copy_(0, (starts[:, None] + window).view(-1), staged.view(-1))
            event = torch.cuda.Event()
            event.record(self._stream)
        rows.offsets.record_stream(torch.cuda.current_stream(self._device))
        self._flying.append((event, rows, done))

    def poll(self) -> None:
        while self._flying and self._flying[0][0].query():
            _, rows, done = self._flying.pop(0)
            done(rows, None)


def _flat(layer: torch.Tensor) -> torch.Tensor:
    """The layer's memory from its first element on, in the order in which it lies there."""
    return layer.as_strided((layer.untyped_storage().nbytes() // layer.element_size() - layer.storage_offset(),), (1,))


def _report(future: Future[None], done: Callable[[AdapterRows | None, str | None], None]) -> None:
    if (problem := future.exception()) is not None:
        done(None, str(problem))


def _use_huge_pages(address: int, num_bytes: int) -> None:
    """Back memory with huge pages where Linux allows it: a step reads adapters from all over the KV cache, and a sixth
    of the LoRA kernel's time went into finding their pages (64 adapters in a batch). Best effort."""
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = max(0, address + num_bytes - begin) // mmap.PAGESIZE * mmap.PAGESIZE
    for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), advice)


def background_thread() -> None:
    """What a thread beside the batch does first: it gives way to the threads that compute."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BACKGROUND_NICENESS)
    with contextlib.suppress(AttributeError):  # One thread for torch here: OpenMP keeps the number per calling thread.
        ctypes.CDLL(None).omp_set_num_threads(1)
