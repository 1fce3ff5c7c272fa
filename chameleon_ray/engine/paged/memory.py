"""Scheduler side: which adapters hold which blocks, what is to be read and loaded, and which requests may run.

Decisions are ``policy.cache``'s; this carries them out on vLLM's block pool and passes orders to the workers. Called by
the engine's loop alone; reading an adapter's headers has a thread of its own.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from chameleon_ray.engine.paged.checkpoint import AdapterSummary, summarise
from chameleon_ray.engine.paged.identity import identified
from chameleon_ray.engine.paged.messages import Fetch, Load, ModelLayout, StepOrders, StepResults
from chameleon_ray.engine.paged.options import PagedSettings
from chameleon_ray.policy.adapter import Adapter
from chameleon_ray.policy.cache import AdapterCache, AdapterTooLarge, CacheCorrupt, Plan, State

logger = init_logger(__name__)

IDLE_PLAN_INTERVAL_S = 0.05
"""How often to plan while no request waits for an adapter: only expected adapters and leftovers are at stake."""


@dataclass(slots=True)
class _Known:
    """An adapter by its digest.

    number: what workers know it by. inspection: under way; pending: requests that wait for its end. summary: once it
    has ended well; from then on the cache knows the adapter. reason, retry_at_s: once it has ended badly.
    """

    digest: str
    name: str
    path: str
    number: int
    inspection: Future[tuple[str, AdapterSummary]] | None = None
    pending: list[str] = field(default_factory=list)
    summary: AdapterSummary | None = None
    reason: str = ""
    retry_at_s: float = float("-inf")
    blocks: list[KVCacheBlock] = field(default_factory=list)


class AdapterMemory:
    """Owns every borrowed block. One object per engine, made once the workers have said how the model is laid out."""

    def __init__(
        self,
        layout: ModelLayout,
        num_ranks: int,
        pool: BlockPool,
        settings: PagedSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cache = AdapterCache(settings.cache_config(layout.num_blocks))
        self.num_changes = 0  # Grows with whatever ``stats.py`` reports.
        self.seconds: list[tuple[str, float]] = []  # Durations of finished work since somebody last took them.
        self._layout = layout
        self._num_ranks = num_ranks
        self._pool = pool
        self._max_rank = settings.max_rank
        self._retry_after_s = settings.retry_after_s
        self._clock = clock
        self._known: dict[str, _Known] = {}
        self._by_number: dict[int, _Known] = {}
        self._requests: dict[str, _Known] = {}  # Live requests for adapters.
        self._cached: set[str] = set()  # Those of them that the cache knows, and
        self._running: set[str] = set()  # those of them that run.
        self._failed: dict[str, str] = {}
        self._inspecting: list[_Known] = []
        self._inspector = ThreadPoolExecutor(1, "adapter-headers")
        self._orders = StepOrders()
        self._finished: dict[str, Counter[int]] = {"fetch": Counter(), "load": Counter()}  # Ranks that are done.
        self._errors: dict[int, str] = {}
        self._blocked: str | None = None
        self._planned_at_s = float("-inf")
        self._load_s, self._loaded_bytes = 0.0, 0

    # What happens to requests

    def add(self, request: Request) -> None:
        """A request has arrived. Its LoRARequest is replaced by one that names the adapter's content."""
        if request.lora_request is None:
            return
        path = request.lora_request.lora_path
        digest, name = identified(request.lora_request)
        known = self._known.get(digest)
        if known is None:
            known = self._known[digest] = _Known(digest, name, path, len(self._known) + 1)
            self._by_number[known.number] = known
        renamed = name != request.lora_request.lora_name
        request.lora_request = LoRARequest(name, known.number, path)
        if renamed:  # The prefix cache's keys contain the name.
            request.block_hashes = []
            request.update_block_hashes()
        self._requests[request.request_id] = known
        self._enqueue(request.request_id, known)

    def release(self, request_id: str) -> None:
        """A request has ended, in whatever way."""
        known = self._requests.pop(request_id, None)
        if known is None:
            return
        self.num_changes += 1
        self._failed.pop(request_id, None)
        self._running.discard(request_id)
        if request_id in self._cached:
            self._cached.remove(request_id)
            self.cache.release(request_id, self._clock())
        elif request_id in known.pending:
            known.pending.remove(request_id)

    def start(self, request_id: str) -> None:
        """The request runs from now on: its adapter stays until it is released or preempted."""
        if request_id in self._requests and request_id not in self._running:
            self.num_changes += 1
            self.cache.acquire(request_id, self._clock())
            self._running.add(request_id)

    def preempt(self, request_id: str) -> None:
        """The request waits again."""
        if request_id in self._running:
            self._running.remove(request_id)
            self.num_changes += 1
            self.cache.requeue(request_id, self._clock())

    def is_ready(self, request: Request) -> bool:
        """Whether the request may run as far as its adapter goes."""
        known = self._requests.get(request.request_id)
        if known is None:
            return True
        return request.request_id in self._cached and self.cache.state(known.digest) is State.RESIDENT

    def take_failed(self) -> dict[str, str]:
        """Requests that must end with an error -> why. Whoever ends them also releases them."""
        failed, self._failed = self._failed, {}
        return failed

    # What happens to adapters

    def advance(self, waiting: Iterable[Request], seats: int, num_running: int, block_size: int) -> list[Request]:
        """Decide for the next step; returns the requests that may be admitted in it, at most ``seats``.

        Order is that of ``waiting``: requests whose adapter is being read or loaded are passed over; behind one whose
        adapter does not fit until a running request ends, nobody is admitted, or it could wait for ever.
        """
        now_s = self._clock()
        if self._inspecting:
            self._end_inspections(now_s)
        front = _first(waiting, seats, lambda request: request.request_id not in self._failed)
        if len(self._cached) > len(self._running) or now_s >= self._planned_at_s + IDLE_PLAN_INTERVAL_S:
            self._plan(front, num_running, block_size, now_s)
        if not self._blocked and len(front) < seats:
            return [request for request in front if self.is_ready(request)]
        return self._admissible(waiting, seats)

    def reclaim(self, num_blocks: int, request_id: str, *, or_nothing: bool) -> bool:
        """Give blocks of idle adapters to the KV cache; False if there are none.

        request_id: whom they are for; its own adapter stays. or_nothing: evict nobody where it is not enough.
        """
        now_s = self._clock()
        known = self._requests.get(request_id)
        plan = self.cache.reclaim(num_blocks, now_s, keep=() if known is None else (known.digest,))
        if not plan.evict or (or_nothing and plan.freed_blocks < num_blocks):
            return False
        self._carry_out(plan, now_s)
        return True

    def take_orders(self) -> StepOrders:
        """What the workers have to do with the next step."""
        orders, self._orders = self._orders, StepOrders()
        return orders

    def apply(self, results: StepResults) -> None:
        """What workers have done meanwhile. An adapter's work has ended when all ranks say so."""
        self._errors.update(results.errors)
        self.seconds += results.seconds
        self._load_s += sum(seconds for what, seconds in results.seconds if what == "load")
        for what, counts in (("fetch", results.fetched), ("load", results.loaded)):
            finished = self._finished[what]
            finished.update(counts)
            for number in [number for number in counts if finished[number] == self._num_ranks]:
                del finished[number]
                self._end_work(what, self._by_number[number], self._errors.pop(number, None))

    @property
    def num_requests(self) -> int:
        """Live requests for adapters."""
        return len(self._requests)

    @property
    def running(self) -> frozenset[str]:
        """Requests that hold a reference to their adapter."""
        return frozenset(self._running)

    @property
    def is_busy(self) -> bool:
        """Whether workers still have something to report."""
        stats = self.cache.stats()
        return bool(stats.loads_in_flight or stats.fetches_in_flight or self._orders)

    def evict_idle(self) -> None:
        """Give back every block that no running request needs."""
        self.reclaim(self._layout.num_blocks, "", or_nothing=False)

    def failures(self) -> dict[str, str]:
        """Digest -> why its requests are refused at present."""
        now_s = self._clock()
        failures = {known.digest: known.reason for known in self._known.values() if now_s < known.retry_at_s}
        for known in self._known.values():
            if known.summary is not None and (failure := self.cache.failure(known.digest, now_s)):
                failures[known.digest] = failure.reason
        return failures

    def eviction_cost_s(self) -> float:
        """Seconds that later requests lose if one more adapter is loaded (``AdapterCache.eviction_cost_s``), at the
        mean rate of all loads so far."""
        if not self._loaded_bytes:
            return 0.0
        s_per_byte = self._load_s / self._loaded_bytes
        return self.cache.eviction_cost_s(
            self._pool.get_num_free_blocks(), self._clock(), lambda size_bytes: size_bytes * s_per_byte
        )

    def check(self) -> None:
        """Raise CacheCorrupt unless the cache's, the pool's and this object's numbers agree."""
        owned = {known.digest: len(known.blocks) for known in self._known.values() if known.blocks}
        self.cache.check(owned_blocks=owned, live_requests=self._cached)
        blocks = [block for known in self._known.values() for block in known.blocks]
        if len({block.block_id for block in blocks}) < len(blocks) or any(block.ref_cnt != 1 for block in blocks):
            raise CacheCorrupt("a borrowed block has two owners")
        if not self._running <= self._cached <= self._requests.keys():
            raise CacheCorrupt("requests are counted that have ended")

    def close(self) -> None:
        """Stop the background thread."""
        self._inspector.shutdown(wait=False, cancel_futures=True)

    def _enqueue(self, request_id: str, known: _Known) -> None:
        self.num_changes += 1
        now_s = self._clock()
        if known.summary is not None:
            if failure := self.cache.failure(known.digest, now_s):
                self._failed[request_id] = failure.reason
                return
            self.cache.enqueue(request_id, known.digest, now_s)
            self._cached.add(request_id)
        elif now_s < known.retry_at_s:
            self._failed[request_id] = known.reason
        else:
            known.pending.append(request_id)
            if known.inspection is None:
                known.inspection = self._inspector.submit(_inspect, known.path, self._layout, self._max_rank)
                self._inspecting.append(known)

    def _end_inspections(self, now_s: float) -> None:
        ended = [known for known in self._inspecting if known.inspection is not None and known.inspection.done()]
        for known in ended:
            self._inspecting.remove(known)
            inspection, known.inspection = known.inspection, None
            pending, known.pending = known.pending, []
            assert inspection is not None
            try:
                known.path, summary = inspection.result()
                adapter = Adapter(known.digest, summary.rank, summary.size_bytes)
                self.cache.add(adapter, summary.num_blocks)
            except (AdapterTooLarge, ValueError, OSError) as error:
                known.reason, known.retry_at_s = self._refused(known, str(error)), now_s + self._retry_after_s
            else:
                known.summary = summary
            for request_id in pending:
                self._enqueue(request_id, known)

    def _plan(self, front: Sequence[Request], num_running: int, block_size: int, now_s: float) -> None:
        self._planned_at_s = now_s
        needed = [
            known.digest
            for request in front
            if (known := self._requests.get(request.request_id)) is not None and known.summary is not None
        ]
        # Every running request may need a block, and those that can be admitted their prompts'.
        reserved = num_running
        for request in front:
            if not self.is_ready(request):
                break
            reserved += ceil(request.num_tokens / block_size)
        plan = self.cache.plan(needed, max(0, self._pool.get_num_free_blocks() - reserved), now_s)
        self._blocked = plan.blocked
        if plan:
            self._carry_out(plan, now_s)

    def _admissible(self, waiting: Iterable[Request], seats: int) -> list[Request]:
        admissible: list[Request] = []
        for request in waiting:
            known = self._requests.get(request.request_id)
            if len(admissible) == seats or (known is not None and known.digest == self._blocked):
                break
            if self.is_ready(request):
                admissible.append(request)
        return admissible

    def _carry_out(self, plan: Plan, now_s: float) -> None:
        self.num_changes += 1
        self.cache.commit(plan, now_s)
        for eviction in plan.evict:
            self._give_back(self._known[eviction.digest])
        self._orders.drop += [self._known[digest].number for digest in plan.drop]
        for digest in plan.load:
            known = self._known[digest]
            assert known.summary is not None
            known.blocks = self._pool.get_new_blocks(known.summary.num_blocks)
            self._orders.load.append(Load(known.number, tuple(block.block_id for block in known.blocks)))
        for digest in plan.fetch:
            known = self._known[digest]
            assert known.summary is not None
            self._orders.fetch.append(Fetch(known.number, known.path, known.summary.slice_ranks))

    def _give_back(self, known: _Known) -> None:
        self._orders.evict.append(known.number)
        self._pool.free_blocks(known.blocks)
        known.blocks = []

    def _end_work(self, what: str, known: _Known, error: str | None) -> None:
        self.num_changes += 1
        if error is None:
            if what == "load" and known.summary is not None:
                self._loaded_bytes += known.summary.size_bytes * self._num_ranks
            (self.cache.fetched if what == "fetch" else self.cache.loaded)(known.digest)
            return
        reason = self._refused(known, error)
        failed = self.cache.fetch_failed if what == "fetch" else self.cache.load_failed
        failed(known.digest, reason, self._clock())
        if what == "load":
            self._give_back(known)
        self._orders.drop.append(known.number)  # Other ranks may have succeeded.
        for request_id, wanted in self._requests.items():
            if wanted is known:
                self._failed[request_id] = reason

    def _refused(self, known: _Known, reason: str) -> str:
        reason = f"adapter {known.name!r} cannot be used: {reason}"
        logger.error("%s", reason)
        return reason


def _inspect(path: str, layout: ModelLayout, max_rank: int) -> tuple[str, AdapterSummary]:
    folder = get_adapter_absolute_path(path)
    return folder, summarise(Path(folder), layout, max_rank)


def _first(waiting: Iterable[Request], count: int, wanted: Callable[[Request], bool]) -> list[Request]:
    front: list[Request] = []
    for request in waiting:
        if len(front) >= count:
            break
        if wanted(request):
            front.append(request)
    return front
