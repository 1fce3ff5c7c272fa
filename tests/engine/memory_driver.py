"""A replica's adapters without its engine: vLLM's block pool and requests, the scheduler's and the worker's side of
adapters in KV memory, and what the replica's own process knows. Nothing happens but when it is told to, also what
otherwise has threads of its own."""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import asdict
from itertools import count
from types import SimpleNamespace
from typing import Any

import torch
from chameleon_kernels import layer_parts
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request, RequestStatus

from chameleon_ray.adapters.modules import ModuleTable
from chameleon_ray.config import AppConfig
from chameleon_ray.engine.paged.checkpoint import LayerModule
from chameleon_ray.engine.paged.host import AdapterHost
from chameleon_ray.engine.paged.memory import AdapterMemory
from chameleon_ray.engine.paged.messages import ModelLayout
from chameleon_ray.engine.paged.options import EngineLimits, PagedSettings
from chameleon_ray.engine.paged.pages import page_geometry
from chameleon_ray.engine.paged.stats import StatsReporter
from chameleon_ray.engine.paged.storage import PagedStorage
from chameleon_ray.engine.server import EngineServer
from chameleon_ray.engine.stats import LoadStats

NUM_BLOCKS, BLOCK_ELEMS = 65, 256
MAX_RANK = 8
RETRY_S = 3.0


class _Deferred(Executor):
    """Runs what it was given in ``run``."""

    def __init__(self) -> None:
        self._jobs: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, job: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._jobs.append((future, lambda: job(*args, **kwargs)))
        return future

    def run(self) -> None:
        jobs, self._jobs = self._jobs, []
        for future, job in jobs:
            try:
                future.set_result(job())
            except Exception as error:
                future.set_exception(error)


class MemoryDriver:
    """What an engine of ``tiny_table``'s model does with adapters. clock: seconds."""

    def __init__(self, table: ModuleTable, clock: Callable[[], float]) -> None:
        parts = {"self_attn.q_proj": (32, (16,)), "mlp.down_proj": (24, (32,))}
        kv_layers = [torch.zeros(NUM_BLOCKS, 1, 1, BLOCK_ELEMS) for _ in range(2)]
        geometry = page_geometry({str(i): kv for i, kv in enumerate(kv_layers)}, NUM_BLOCKS, torch.float32)
        numbered = layer_parts(parts, geometry.page_elems)
        modules = [
            LayerModule(layer, numbered[part].first_slice, (f"model.layers.{layer}.{part}",), list, list)
            for layer in range(2)
            for part in parts
        ]
        targets = {module.slices[0]: (module.layer, module.first_slice) for module in modules}
        pages = geometry.page_elems, geometry.pages_per_block
        layout = ModelLayout(parts, table, targets, 2, *pages, NUM_BLOCKS, element_bytes=4)
        self.host = AdapterHost(layout, geometry, modules, kv_layers, num_readers=1, check_finite=True)
        self.host._readers = self._reads = _Deferred()  # type: ignore[assignment]
        self.host._copier._thread = self._copies = _Deferred()  # type: ignore[attr-defined]
        self.pool = BlockPool(NUM_BLOCKS, enable_caching=False, hash_block_size=16)
        storage = PagedStorage(layout, self.pool)
        settings = PagedSettings(
            adapter_memory_share=0.3, adapter_host_bytes=48_000, max_rank=MAX_RANK, retry_after_s=RETRY_S
        )
        self.memory = AdapterMemory(storage, 1, self.pool, settings, EngineLimits(16, 4, 512), clock)
        self.memory._inspector = self._headers = _Deferred()  # type: ignore[assignment]
        self.requests: dict[str, Request] = {}
        self._ids = count()

    def add(self, lora: LoRARequest | None) -> str:
        """A request arrives; returns its id."""
        request = Request(f"r{next(self._ids)}", [1, 2, 3], SamplingParams(max_tokens=4), None, lora_request=lora)
        self.requests[request.request_id] = request
        self.memory.add(request)
        return request.request_id

    def end(self, request_id: str, status: RequestStatus = RequestStatus.FINISHED_STOPPED) -> None:
        """The request ends."""
        request = self.requests.pop(request_id)
        request.status = status
        self.memory.release(request)

    def preempt(self, request_id: str) -> None:
        """A running request waits again."""
        self.memory.requeue(self.requests[request_id])

    def read_headers(self) -> None:
        """Inspections under way end."""
        self._headers.run()

    def step(self) -> list[str]:
        """An engine step; returns the requests that ended with an error."""
        self.memory.begin_step()
        while (request := self.memory.candidate()) is not None:
            self.memory.admit(request.request_id)
        self.host.start(self.memory.end_step(0))
        failed = list(self.memory.take_failed())
        for request_id in failed:
            self.end(request_id, RequestStatus.FINISHED_ERROR)
        return failed

    def work(self) -> None:
        """Reads and copies under way end, and the scheduler hears of it."""
        self._copies.run()
        self._reads.run()
        self.memory.apply(self.host.take_results(may_wait=False))

    def serve(self, lora: LoRARequest) -> None:
        """One request from its arrival to its end."""
        request_id = self.add(lora)
        while request_id not in self.memory.running:
            self.read_headers()
            self.step()
            self.work()
        self.end(request_id)

    def settle(self) -> None:
        """Until workers have nothing to do."""
        self.read_headers()
        self.step()
        while self.memory.is_busy:
            self.work()
            self.step()

    def check(self) -> None:
        """All books balance, and the worker holds no adapter that the scheduler does not know of."""
        self.memory.check()
        numbers = {known.number for known in self.memory._known.values()}
        held = self.host.resident.keys() | self.host._copies.keys()
        assert held <= numbers, f"the worker holds {held - numbers}"

    def close(self) -> None:
        self.memory.close()
        self.host.close()


class EngineFront:
    """The front end of such an engine: the real ``EngineServer``, whose calls reach the driver's memory."""

    def __init__(self, driver: MemoryDriver, table: ModuleTable, clock: Callable[[], float]) -> None:
        self._driver = driver
        config = AppConfig.from_args({"model": {"source": "tiny"}, "engine": {"adapter_memory": "paged"}})
        scheduler_config = SimpleNamespace(max_num_seqs=4)
        self.stats = LoadStats(SimpleNamespace(scheduler_config=scheduler_config))  # type: ignore[arg-type]
        core = SimpleNamespace(call_utility_async=self._call)
        self.server = EngineServer(config, SimpleNamespace(engine_core=core), None, self.stats, table)  # type: ignore[arg-type]
        self.reporter = StatsReporter(driver.memory, clock)

    def report(self) -> None:
        """What the engine has to say reaches the front end."""
        if (report := self.reporter.take()) is not None:
            self.stats.record(SchedulerStats(kv_connector_stats=report.data), None)

    async def _call(self, method: str, given: list[Any]) -> list[Any]:
        memory = self._driver.memory
        if method == "measure_adapters":
            return [asdict(memory.measure(shape)) for shape in given]
        assert method == "retire_adapters"
        return memory.retire(given)


def sizes(of: object) -> dict[str, int]:
    """How many entries all containers have that are reachable from ``of`` through objects of ours: path -> number."""
    found: dict[str, int] = {}
    seen: set[int] = set()

    def walk(value: Any, path: str) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        for name, child in _parts(value):
            walk(child, f"{path}.{name}")
        if hasattr(value, "__len__") and not isinstance(value, str | bytes | type):
            found[path] = found.get(path, 0) + len(value)

    walk(of, "")
    return found


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from (("*", entry) for entry in list(value.values()))
    elif isinstance(value, list | tuple) or type(value).__name__ == "deque":
        yield from (("*", entry) for entry in list(value))
    elif type(value).__module__.split(".")[0] in ("chameleon_ray", "deployments"):
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        names = [*getattr(value, "__dict__", ()), *slots]
        yield from ((name, getattr(value, name)) for name in names if hasattr(value, name))
