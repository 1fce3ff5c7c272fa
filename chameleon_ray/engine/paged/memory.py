"""Scheduler side: the replica's policy on vLLM's requests and block pool.

Decisions are ``policy.replica``'s; this tells it what happens, carries its plans out on the pool and passes orders to
the workers. Called by the engine's loop alone; reading an adapter's headers has a thread of its own.
"""

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request, RequestStatus

from chameleon_ray.adapters.identity import AdapterId, AdapterNumbers
from chameleon_ray.engine.paged.checkpoint import AdapterSummary, summarise
from chameleon_ray.engine.paged.identity import identify
from chameleon_ray.engine.paged.messages import Fetch, Load, ModelLayout, Refusal, StepOrders, StepResults
from chameleon_ray.engine.paged.options import EngineLimits, PagedSettings
from chameleon_ray.engine.report import WAITING_FOR, MemoryLimits
from chameleon_ray.policy.adapter import Adapter
from chameleon_ray.policy.admission import Obstacle
from chameleon_ray.policy.cache import AdapterCache, AdapterTooLarge, CacheCorrupt, Plan, State
from chameleon_ray.policy.lengths import PREDICTED_TOKENS, HistoryPredictor, LengthFeatures, PredictionAccuracy
from chameleon_ray.policy.replica import AdapterFailed, ReplicaPolicy
from chameleon_ray.policy.sizing import QueuedRequest

logger = init_logger(__name__)

_ENDED_BY_ITSELF = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)
_WAITS_FOR = {
    State.ABSENT: "fetch",
    State.FAILED: "fetch",
    State.FETCHING: "fetch",
    State.HOST: "room",
    State.LOADING: "load",
    State.RESIDENT: "turn",
}


@dataclass(slots=True)
class _Known:
    """An adapter by its digest.

    number: what workers know it by. inspection: under way; pending: requests that wait for its end. summary: once it
    has ended well; from then on the policy knows the adapter. reason, retry_at_s: once it has ended badly.
    """

    id: AdapterId
    name: str
    path: str
    number: int
    inspection: Future[tuple[str, AdapterSummary]] | None = None
    pending: list[str] = field(default_factory=list)
    summary: AdapterSummary | None = None
    reason: str = ""
    retry_at_s: float = float("-inf")
    blocks: list[KVCacheBlock] = field(default_factory=list)

    @property
    def digest(self) -> str:
        return self.id.digest


@dataclass(slots=True)
class _Live:
    """A request that has not ended. known: its adapter; None for the base model.

    num_predicted_tokens: 0 until the policy knows the request. running: admitted, and not preempted since.
    """

    request: Request
    known: _Known | None
    arrived_s: float
    num_predicted_tokens: int = 0
    running: bool = False

    @property
    def features(self) -> LengthFeatures:
        digest = self.known.digest if self.known else None
        return LengthFeatures(digest, self.request.num_prompt_tokens, self.request.max_tokens)


class AdapterMemory:
    """Owns every borrowed block. One object per engine, made once the workers have said how the model is laid out."""

    def __init__(
        self,
        layout: ModelLayout,
        num_ranks: int,
        pool: BlockPool,
        settings: PagedSettings,
        limits: EngineLimits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        block_bytes = layout.num_layers * layout.page_elems * layout.pages_per_block * layout.element_bytes
        self.policy = ReplicaPolicy(settings.replica_config(layout.num_blocks, block_bytes, limits), self)
        """For questions; change it through this object."""
        self.accuracy = PredictionAccuracy()
        self.num_changes = 0  # Grows with whatever ``stats.py`` reports.
        self.seconds: list[tuple[str, float]] = []  # Durations of finished work since somebody last took them.
        self.waited: list[tuple[int, float]] = []  # (queue, delay in s) of requests admitted since then.
        self.num_inspection_failures = 0
        self._block_bytes = block_bytes
        self._layout = layout
        self._num_ranks = num_ranks
        self._pool = pool
        self._settings = settings
        self._block_size = limits.block_size
        self._predictor = HistoryPredictor(limits.max_model_len)
        self._clock = clock
        self._known: dict[str, _Known] = {}
        self._numbers = AdapterNumbers()
        self._live: dict[str, _Live] = {}
        self._failed: dict[str, Refusal] = {}
        self._inspecting: list[_Known] = []
        self._inspector = ThreadPoolExecutor(1, "adapter-headers")
        self._orders = StepOrders()
        self._finished: dict[str, Counter[int]] = {"fetch": Counter(), "load": Counter()}  # Ranks that are done.
        self._errors: dict[int, str] = {}
        self._load_s, self._loaded_bytes = 0.0, 0

    # What the policy asks (``BlockPool``)

    def free_blocks(self) -> int:
        """Blocks that nobody holds; those of cached prefixes count."""
        return int(self._pool.get_num_free_blocks())

    def kv_blocks(self, request_id: str) -> int:
        """Blocks of a running request's KV cache; those that it shares by prefix caching count."""
        return -(-self._live[request_id].request.num_computed_tokens // self._block_size)

    # What happens to requests

    def add(self, request: Request) -> None:
        """A request has arrived. Its LoRARequest is replaced by one that names the adapter's content."""
        known = None if request.lora_request is None else self._identify(request, request.lora_request)
        self._live[request.request_id] = _Live(request, known, self._clock())
        self._arrive(request.request_id)

    def release(self, request: Request) -> None:
        """A request has ended, in whatever way; its status says how."""
        live = self._live.pop(request.request_id, None)
        if live is None:
            return
        self.num_changes += 1
        self._failed.pop(request.request_id, None)
        if not live.num_predicted_tokens:
            if live.known is not None and request.request_id in live.known.pending:
                live.known.pending.remove(request.request_id)
            return
        if request.status in _ENDED_BY_ITSELF:
            self.accuracy.record(live.num_predicted_tokens, request.num_output_tokens)
            self._predictor.observe(live.features, request.num_output_tokens)
        if live.running and request.status in _ENDED_BY_ITSELF:
            self.policy.finish(request.request_id, self._clock(), request.num_output_tokens)
        else:
            self.policy.remove(request.request_id, self._clock())

    def requeue(self, request: Request, *, squashed: bool = False) -> None:
        """A running request was preempted or squashed: it waits again, at its old place."""
        if (live := self._live.get(request.request_id)) is not None and live.running:
            live.running = False
            self.num_changes += 1
            self.policy.requeue(request.request_id, self._clock(), squashed=squashed)

    def refuse(self, request: Request, reason: str) -> None:
        """The request can never be served: ``take_failed`` names it."""
        self._failed[request.request_id] = Refusal(reason)

    def take_failed(self) -> dict[str, Refusal]:
        """Requests that must end with an error -> why. Whoever ends them also releases them."""
        failed, self._failed = self._failed, {}
        return failed

    # A step

    def begin_step(self) -> None:
        """Start a step; requests that the policy wants squashed have been requeued."""
        now_s = self._clock()
        if self._inspecting:
            self._end_inspections(now_s)
        self.policy.begin_step(now_s)

    def candidate(self) -> Request | None:
        """The request that is to be admitted next, or passed over; None: no more in this step."""
        queued = self.policy.peek()
        return None if queued is None else self._live[queued.request_id].request

    def pass_over(self, request: Request, obstacle: Obstacle) -> None:
        """The candidate cannot run in this step."""
        self.policy.pass_over(request.request_id, obstacle)

    def admit(self, request_id: str) -> None:
        """The candidate runs from now on: its adapter stays until it is released or requeued."""
        live = self._live[request_id]
        if not live.running:
            admitted = self.policy.admit(request_id, self._clock())
            live.running = True
            self.num_changes += 1
            self.waited.append((admitted.queue, admitted.waited_s))

    def reclaim(self, num_blocks: int, request_id: str, *, or_nothing: bool) -> bool:
        """Give blocks of idle adapters to the KV cache; False if there are none.

        request_id: whom they are for; its own adapter stays. or_nothing: evict nobody where it is not enough.
        """
        plan = self.policy.make_room(num_blocks, self._clock(), for_request=request_id, or_nothing=or_nothing)
        self._carry_out(plan)
        return bool(plan.evict)

    def end_step(self, reserved_blocks: int) -> StepOrders:
        """What the workers have to do with this step. reserved_blocks: see ``ReplicaPolicy.end_step``."""
        self._carry_out(self.policy.end_step(self._clock(), reserved_blocks))
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
                self._end_work(what, self._numbered(number), self._errors.pop(number, None))

    # State

    @property
    def cache(self) -> AdapterCache:
        """The policy's cache, for questions."""
        return self.policy.cache

    @property
    def num_requests(self) -> int:
        """Live requests."""
        return len(self._live)

    @property
    def running(self) -> frozenset[str]:
        """Requests that run, by the policy's books."""
        return frozenset(request_id for request_id, live in self._live.items() if live.running)

    @property
    def is_busy(self) -> bool:
        """Whether workers still have something to report."""
        stats = self.cache.stats()
        return bool(stats.loads_in_flight or stats.fetches_in_flight or self._orders)

    def is_running(self, request_id: str) -> bool:
        """Whether the request was admitted and has not been requeued since."""
        return (live := self._live.get(request_id)) is not None and live.running

    def evict_idle(self) -> None:
        """Give back every block that no running request needs."""
        self.reclaim(self._layout.num_blocks, "", or_nothing=False)

    @property
    def limits(self) -> MemoryLimits:
        """What adapters may take."""
        config = self.cache.config
        return MemoryLimits(
            self._block_bytes * self._num_ranks, config.max_blocks, self._layout.num_blocks, config.host_bytes
        )

    def waiting(self) -> dict[str, int]:
        """Requests that wait, by what for: ``inspection`` of the adapter's files, ``fetch`` into host memory, ``room``
        in KV memory, ``load`` into it, or their ``turn`` (quota, seat, KV memory), with nothing else missing."""
        counts = dict.fromkeys(WAITING_FOR, 0)
        for request_id, live in self._live.items():
            if live.running or request_id in self._failed:
                continue
            if live.known is None:
                counts["turn"] += 1
            elif live.known.summary is None:
                counts["inspection"] += 1
            else:
                counts[_WAITS_FOR[self.cache.state(live.known.digest)]] += 1
        return counts

    @property
    def oldest_waiting_s(self) -> float:
        """Seconds since the oldest request that does not run has come; 0 without one."""
        oldest = next((live for live in self._live.values() if not live.running), None)
        return 0.0 if oldest is None else self._clock() - oldest.arrived_s

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
        return self.cache.eviction_cost_s(self.free_blocks(), self._clock(), lambda size_bytes: size_bytes * s_per_byte)

    def check(self) -> None:
        """Raise CacheCorrupt or AssertionError unless the policy's, the pool's and this object's numbers agree."""
        self.policy.check()
        known = [live.request.request_id for live in self._live.values() if live.known and live.num_predicted_tokens]
        owned = {known.digest: len(known.blocks) for known in self._known.values() if known.blocks}
        self.cache.check(owned_blocks=owned, live_requests=known)
        blocks = [block for known in self._known.values() for block in known.blocks]
        if len({block.block_id for block in blocks}) < len(blocks) or any(block.ref_cnt != 1 for block in blocks):
            raise CacheCorrupt("a borrowed block has two owners")
        if self.policy.num_running != len(self.running):
            raise CacheCorrupt(f"{self.policy.num_running} requests run by the policy, {len(self.running)} here")

    def close(self) -> None:
        """Stop the background thread."""
        self._inspector.shutdown(wait=False, cancel_futures=True)

    def _identify(self, request: Request, lora: LoRARequest) -> _Known:
        name, adapter_id = identify(lora)
        known = self._known.get(adapter_id.digest)
        if known is None:
            number = self._numbers.number(adapter_id.digest)
            known = self._known[adapter_id.digest] = _Known(adapter_id, name, lora.lora_path, number)
        lora_name = adapter_id.lora_name(name)
        request.lora_request = LoRARequest(lora_name, known.number, lora.lora_path)
        if lora_name != lora.lora_name:  # The prefix cache's keys contain the name.
            request.block_hashes = []
            request.update_block_hashes()
        return known

    def _numbered(self, number: int) -> _Known:
        digest = self._numbers.digest(number)
        assert digest is not None, f"workers report of number {number}, which no adapter has"
        return self._known[digest]

    def _arrive(self, request_id: str) -> None:
        """Queue a live request, at once or when its adapter has been inspected; or fail it."""
        self.num_changes += 1
        now_s = self._clock()
        live = self._live[request_id]
        known, adapter = live.known, None
        if known is not None and known.summary is None:
            if now_s < known.retry_at_s:
                self._failed[request_id] = Refusal(known.reason, known.retry_at_s - now_s)
                return
            known.pending.append(request_id)
            if known.inspection is None:
                max_rank = self._settings.max_rank
                known.inspection = self._inspector.submit(_inspect, known.path, self._layout, max_rank)
                self._inspecting.append(known)
            return
        if known is not None and known.summary is not None:
            adapter = Adapter(known.digest, known.summary.rank, known.summary.size_bytes)
        predicted, request = self._predict(live), live.request
        queued = QueuedRequest(request_id, request.num_prompt_tokens, predicted, adapter, request.priority)
        try:
            self.policy.arrive(queued, now_s)
        except AdapterFailed as error:
            self._failed[request_id] = Refusal(str(error), error.retry_at_s - now_s)
        else:
            live.num_predicted_tokens = predicted

    def _predict(self, live: _Live) -> int:
        params = live.request.sampling_params
        if self._settings.trust_predictions and params is not None and params.extra_args:
            given = params.extra_args.get(PREDICTED_TOKENS)
            if isinstance(given, int) and given > 0:
                return min(given, live.request.max_tokens)
        return self._predictor.predict(live.features)

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
                self.policy.add_adapter(adapter, summary.num_blocks)
            except (AdapterTooLarge, ValueError, OSError) as error:
                known.reason = self._refused(known, str(error))
                known.retry_at_s = now_s + self._settings.retry_after_s
                self.num_inspection_failures += 1
            else:
                known.summary = summary
            for request_id in pending:
                self._arrive(request_id)

    def _carry_out(self, plan: Plan) -> None:
        if not plan:
            return
        self.num_changes += 1
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
            (self.policy.fetched if what == "fetch" else self.policy.loaded)(known.digest)
            return
        reason = self._refused(known, error)
        failed = self.policy.fetch_failed if what == "fetch" else self.policy.load_failed
        refusal = Refusal(reason, self._settings.retry_after_s)
        self._failed |= dict.fromkeys(failed(known.digest, reason, self._clock()), refusal)
        if what == "load":
            self._give_back(known)
        self._orders.drop.append(known.number)  # Other ranks may have succeeded.

    def _refused(self, known: _Known, reason: str) -> str:
        reason = f"adapter {known.name!r} ({known.id.short}) cannot be used: {reason}"
        logger.error("%s", reason)
        return reason


def _inspect(path: str, layout: ModelLayout, max_rank: int) -> tuple[str, AdapterSummary]:
    folder = get_adapter_absolute_path(path)
    return folder, summarise(Path(folder), layout, max_rank)
