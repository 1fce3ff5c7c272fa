"""Worker side: adapters from disk into host memory, and from there into vLLM's slots, beside the batch.

Both run in background threads; on a GPU the copies are on a side stream, which waits for the work that the compute
stream had been given when the load was ordered: a slot that an adapter leaves may still be read by a step under way.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from vllm.lora.lora_model import LoRAModel

from chameleon_ray.engine.paged.host import WorkerHost, background_thread
from chameleon_ray.engine.paged.messages import Fetch, Load
from chameleon_ray.engine.slots.lora import SlotWorkerLoRAManager
from chameleon_ray.engine.slots.messages import SlotLayout

_Done = Callable[[str | None], None]


class _Filler(Protocol):
    def submit(self, slot: int, model: LoRAModel, done: _Done) -> None:
        """Copy into the slot; ``done`` is called, in any thread, with None or with an error."""

    def poll(self) -> None:
        """Call ``done`` for copies that have finished meanwhile."""


class SlotHost(WorkerHost[LoRAModel, int]):
    """All adapters of one worker; its slots change here alone."""

    def __init__(
        self, layout: SlotLayout, manager: SlotWorkerLoRAManager, *, num_readers: int, check_finite: bool
    ) -> None:
        super().__init__(layout, num_readers)
        self._manager = manager
        self._check_finite = check_finite
        device = manager.device
        self._filler: _Filler = _CpuFiller(manager) if device.type == "cpu" else _GpuFiller(manager)

    def read(self, fetch: Fetch) -> LoRAModel:
        return self._manager.read(fetch.adapter_id, fetch.folder, self._check_finite)

    def copy(self, load: Load, copy: LoRAModel, done: Callable[[int | None, str | None], None]) -> None:
        [slot] = load.block_ids
        self._manager.in_use[load.adapter_id] = slot
        self._filler.submit(slot, copy, lambda error: done(None if error else slot, error))

    def poll(self) -> None:
        self._filler.poll()

    def loaded(self, adapter_id: int, place: int) -> None:
        self._manager.assign(place, adapter_id)

    def evicted(self, adapter_id: int) -> None:
        if (slot := self._manager.in_use.pop(adapter_id, None)) is not None:
            self._manager.assign(slot, None)


class _CpuFiller:
    """Copies in a background thread, module by module: torch lets go of Python's lock for each."""

    def __init__(self, manager: SlotWorkerLoRAManager) -> None:
        self._manager = manager
        self._thread = ThreadPoolExecutor(1, "adapter-slots", initializer=background_thread)

    def submit(self, slot: int, model: LoRAModel, done: _Done) -> None:
        @torch.inference_mode()  # As vLLM made the tensors.
        def run() -> None:
            self._manager.fill(slot, model)

        self._thread.submit(run).add_done_callback(lambda future: done(_problem(future)))

    def poll(self) -> None:
        pass


class _GpuFiller:
    """Gives the copies to a side stream from a background thread: there are hundreds, small ones, for one adapter."""

    def __init__(self, manager: SlotWorkerLoRAManager) -> None:
        self._manager = manager
        self._device = manager.device
        self._stream = torch.cuda.Stream(self._device)
        self._thread = ThreadPoolExecutor(1, "adapter-slots")
        self._flying: list[tuple[Future[torch.cuda.Event], LoRAModel, _Done]] = []

    def submit(self, slot: int, model: LoRAModel, done: _Done) -> None:
        before = torch.cuda.Event()
        before.record(torch.cuda.current_stream(self._device))

        @torch.inference_mode()  # As vLLM made the tensors.
        def run() -> torch.cuda.Event:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                self._stream.wait_event(before)
                self._manager.fill(slot, model)
                copied = torch.cuda.Event()
                copied.record(self._stream)
            return copied

        self._flying.append((self._thread.submit(run), model, done))

    def poll(self) -> None:
        while self._flying and self._flying[0][0].done():
            future, _, done = self._flying[0]
            if (problem := _problem(future)) is None and not future.result().query():  # type: ignore[no-untyped-call]
                return
            del self._flying[0]
            done(problem)


def _problem(future: Future[object]) -> str | None:
    error = future.exception()
    return None if error is None else str(error) or repr(error)
