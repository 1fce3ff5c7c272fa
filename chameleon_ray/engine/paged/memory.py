"""Scheduler side: the replica's policy on vLLM's requests and on the storage that adapters have.

Decisions are ``policy.replica``'s; this tells it what happens, carries its plans out on the storage and passes orders
to the workers. Called by the engine's loop alone; reading an adapter's headers has a thread of its own.
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
from vllm.v1.request import Request, RequestStatus

from chameleon_ray.adapters.checkpoint import AdapterShape
from chameleon_ray.adapters.errors import (
    AdapterInvalidError,
    AdapterLoadError,
    AdapterNoRoomError,
    AdapterTooLargeError,
)
from chameleon_ray.adapters.identity import AdapterId, AdapterNumbers
from chameleon_ray.engine.inspection import Inspection
from chameleon_ray.engine.paged.checkpoint import AdapterFilesError, AdapterSummary
from chameleon_ray.engine.paged.identity import identify
from chameleon_ray.engine.paged.messages import Fetch, Load, Refusal, StepOrders, StepResults, WorkError
from chameleon_ray.engine.paged.options import EngineLimits, PagedSettings
from chameleon_ray.engine.paged.storage import Storage
from chameleon_ray.engine.report import WAITING_FOR, MemoryLimits
from chameleon_ray.policy.adapter import Adapter
from chameleon_ray.policy.admission import Obstacle
from chameleon_ray.policy.cache import AdapterCache
from chameleon_ray.policy.cache_types import AdapterTooLarge, CacheCorrupt, Plan
from chameleon_ray.policy.records import QueuedRequest, State
from chameleon_ray.policy.replica import ReplicaPolicy
from chameleon_ray.predictor.lengths import PREDICTED_TOKENS, HistoryPredictor, LengthFeatures, PredictionAccuracy

logger = init_logger(__name__)

_ENDED_BY_ITSELF = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)
_WAITS_FOR = {
    State.ABSENT: "fetch",
    State.FETCHING: "fetch",
    State.HOST: "room",
    State.LOADING: "load",
    State.RESIDENT: "turn",
}


@dataclass(slots=True)
class _Known:
    """An adapter by its digest.

    number: what workers know it by. inspection: under way; pending: requests that wait for its end. summary: once it
    has ended well; from then on the policy knows the adapter. One that has ended badly leaves nothing behind.
    inquiries: whom to tell the result (``AdapterMemory.inspect``), and whether that of a trial. blocks: where in the
    storage it lies, or is being loaded to. retired: to be forgotten when nothing is left of it.
    """

    id: AdapterId
    name: str
    path: str
    number: int
    inspection: Future[tuple[str, AdapterSummary]] | None = None
    pending: list[str] = field(default_factory=list)
    inquiries: list[tuple[Callable[[Inspection], None], bool]] = field(default_factory=list)
    summary: AdapterSummary | None = None
    blocks: tuple[int, ...] = ()
    retired: bool = False

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
    """Owns every block that adapters have. One object per engine, made once the workers have described the model."""

    def __init__(
        self,
        storage: Storage,
        num_ranks: int,
        pool: BlockPool,
        settings: PagedSettings,
        limits: EngineLimits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """pool: vLLM's KV blocks."""
        self.policy = ReplicaPolicy(storage.replica_config(settings, limits), self)
        """For questions; change it through this object."""
        self.storage = storage
        self.accuracy = PredictionAccuracy()
        self.num_changes = 0  # Grows with whatever ``stats.py`` reports.
        self.seconds: list[tuple[str, float]] = []  # Durations of finished work since somebody last took them.
        self.waited: list[tuple[int, float]] = []  # (queue, delay in s) of requests admitted since then.
        self.evicted: list[tuple[str, str]] = []  # (name, reason) of adapters that left the storage since then.
        self.num_inspection_failures = 0
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
        self._on_trial: set[str] = set()
        self._inspector = ThreadPoolExecutor(1, "adapter-headers")
        self._orders = StepOrders()
        self._finished: Counter[tuple[str, int]] = Counter()  # Ranks that are done, as in ``StepResults``.
        self._errors: dict[tuple[str, int], WorkError] = {}
        self._load_s, self._loaded_bytes = 0.0, 0

    # What the policy asks (``BlockPool``)

    def free_blocks(self) -> int:
        """KV blocks that nobody holds; those of cached prefixes count."""
        return int(self._pool.get_num_free_blocks())

    def kv_blocks(self, request_id: str) -> int:
        """Blocks of a running request's KV cache; those that it shares by prefix caching count."""
        return -(-self._live[request_id].request.num_computed_tokens // self._block_size)

    # What is asked of it without a request

    def inspect(self, lora_name: str, path: str, whole: bool, answer: Callable[[Inspection], None]) -> None:
        """Whether the engine can serve an adapter. whole: every rank also reads all its weights, and keeps nothing.

        ``answer`` is called in a later step, so that steps must go on until then (``has_work``), or at once.
        """
        known = self._know(*identify(LoRARequest(lora_name, 1, path)), path)
        known.inquiries.append((answer, whole))
        if known.summary is None:
            self._begin_inspection(known)
        else:
            self._answer_or_try(known, known.summary)

    def measure(self, shape: AdapterShape) -> Inspection:
        """The same for any adapter of that shape, known by it alone; nothing is read and nothing kept."""
        try:
            summary = self.storage.measure(shape)
            self.policy.config.cache.check_size(summary.num_blocks, summary.size_bytes)
        except AdapterFilesError as error:
            return Inspection(code=error.code, reason=str(error))
        except AdapterTooLarge as error:
            return Inspection(code=AdapterTooLargeError.code, reason=str(error))
        return Inspection(summary.num_blocks, summary.size_bytes)

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
        else:
            self._end(live)
        if live.known is not None:
            self._forget_retired(live.known)

    def _end(self, live: _Live) -> None:
        request = live.request
        if request.status in _ENDED_BY_ITSELF:
            self.accuracy.record(live.num_predicted_tokens, request.num_output_tokens)
            self._predictor.observe(live.features, request.num_output_tokens)
        if live.running and request.status in _ENDED_BY_ITSELF:
            self.policy.finish(request.request_id, self._clock(), request.num_output_tokens)
        else:
            self.policy.remove(request.request_id, self._clock())

    def retire(self, digests: list[str]) -> list[str]:
        """Forget these adapters: those that requests want when these have ended, unless another one comes first; those
        that are being inspected not yet.

        The next step has the others leave blocks and host memory. Returns the digests of which something is left now.
        """
        for known in [self._known[digest] for digest in digests if digest in self._known]:
            if known.inquiries:
                continue
            known.retired = True
            if known.summary is not None:
                self.policy.retire_adapter(known.digest)
            self._forget_retired(known)
        return [digest for digest in digests if digest in self._known]

    def requeue(self, request: Request, *, squashed: bool = False) -> None:
        """A running request was preempted or squashed: it waits again, at its old place."""
        if (live := self._live.get(request.request_id)) is not None and live.running:
            live.running = False
            self.num_changes += 1
            self.policy.requeue(request.request_id, self._clock(), squashed=squashed)

    def refuse(self, request: Request, reason: str) -> None:
        """The request and its adapter are too large together: ``take_failed`` names it."""
        self._failed[request.request_id] = Refusal(AdapterNoRoomError.code, reason)

    def take_failed(self) -> dict[str, Refusal]:
        """Requests that must end with an error -> why. Whoever ends them also releases them."""
        failed, self._failed = self._failed, {}
        return failed

    # A step

    def begin_step(self) -> None:
        """Start a step; requests that the policy wants squashed have been requeued."""
        now_s = self._clock()
        if self._inspecting:
            self._end_inspections()
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
        self._finished += results.finished
        for work in [work for work in results.finished if self._finished[work] == self._num_ranks]:
            del self._finished[work]
            what, number = work
            self._end_work(what, self._numbered(number), self._errors.pop(work, None))

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
        """Whether workers still have something to do or to report."""
        return bool(self._orders) or self.cache.is_busy

    @property
    def has_work(self) -> bool:
        """Whether steps must go on although no request may be live."""
        return bool(self._inspecting or self._on_trial) or self.is_busy

    def is_running(self, request_id: str) -> bool:
        """Whether the request was admitted and has not been requeued since."""
        return (live := self._live.get(request_id)) is not None and live.running

    def evict_idle(self) -> None:
        """Have every adapter leave that no running request needs."""
        self._carry_out(self.policy.evict_idle(self._clock()))

    @property
    def limits(self) -> MemoryLimits:
        """What adapters may take."""
        return self.storage.limits(self.policy.config, self._num_ranks)

    def waiting(self) -> dict[str, int]:
        """Requests that wait, by what for: ``inspection`` of the adapter's files, ``fetch`` into host memory, ``room``
        on the GPU, ``load`` into it, or their ``turn`` (quota, seat, KV memory), with nothing else missing."""
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

    def eviction_cost_s(self) -> float:
        """Seconds that later requests lose if one more adapter is loaded (``AdapterCache.eviction_cost_s``), at the
        mean rate of all loads so far."""
        if not self._loaded_bytes:
            return 0.0
        s_per_byte = self._load_s / self._loaded_bytes
        free_blocks = self.policy.room.free_adapter_blocks()
        return self.cache.eviction_cost_s(free_blocks, self._clock(), lambda size_bytes: size_bytes * s_per_byte)

    def check(self) -> None:
        """Raise CacheCorrupt or AssertionError unless the policy's, the storage's and this object's numbers agree."""
        owned = {known.digest: len(known.blocks) for known in self._known.values() if known.blocks}
        self.policy.check(owned, [request_id for request_id, live in self._live.items() if live.num_predicted_tokens])
        self.storage.check([number for known in self._known.values() for number in known.blocks])
        if self.policy.num_running != len(self.running):
            raise CacheCorrupt(f"{self.policy.num_running} requests run by the policy, {len(self.running)} here")
        inspected = {digest for digest, known in self._known.items() if known.summary is not None}
        if inspected != self.cache.tiers().keys() or len(self._numbers) != len(self._known):
            raise CacheCorrupt(
                f"{len(inspected)} of {len(self._known)} adapters inspected, {len(self._numbers)} numbers"
            )

    def close(self) -> None:
        """Stop the background thread."""
        self._inspector.shutdown(wait=False, cancel_futures=True)

    def _know(self, name: str, adapter_id: AdapterId, path: str) -> _Known:
        known = self._known.get(adapter_id.digest)
        if known is None:
            number = self._numbers.number(adapter_id.digest)
            known = self._known[adapter_id.digest] = _Known(adapter_id, name, path, number)
        known.name = name
        if known.retired:
            known.retired = False
            if known.summary is not None:
                self._add_to_policy(known, known.summary)
        return known

    def _identify(self, request: Request, lora: LoRARequest) -> _Known:
        name, adapter_id = identify(lora)
        known = self._know(name, adapter_id, lora.lora_path)
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
        """Queue a live request, at once or when its adapter has been inspected."""
        self.num_changes += 1
        live = self._live[request_id]
        known, adapter = live.known, None
        if known is not None and known.summary is None:
            known.pending.append(request_id)
            self._begin_inspection(known)
            return
        if known is not None and known.summary is not None:
            adapter = Adapter(known.digest, known.summary.rank, known.summary.size_bytes)
        predicted, request = self._predict(live), live.request
        queued = QueuedRequest(request_id, request.num_prompt_tokens, predicted, adapter, request.priority)
        self.policy.arrive(queued, self._clock())
        live.num_predicted_tokens = predicted

    def _predict(self, live: _Live) -> int:
        params = live.request.sampling_params
        if self._settings.trust_predictions and params is not None and params.extra_args:
            given = params.extra_args.get(PREDICTED_TOKENS)
            if isinstance(given, int) and given > 0:
                return min(given, live.request.max_tokens)
        return self._predictor.predict(live.features)

    def _begin_inspection(self, known: _Known) -> None:
        if known.inspection is None:
            known.inspection = self._inspector.submit(_inspect, known.path, self.storage, self._settings.max_rank)
            self._inspecting.append(known)

    def _end_inspections(self) -> None:
        ended = [known for known in self._inspecting if known.inspection is not None and known.inspection.done()]
        for known in ended:
            self._inspecting.remove(known)
            inspection, known.inspection = known.inspection, None
            assert inspection is not None
            try:
                known.path, summary = inspection.result()
                self._add_to_policy(known, summary)
            except AdapterFilesError as error:
                self._fail_inspection(known, error.code, str(error))
            except AdapterTooLarge as error:
                self._fail_inspection(known, AdapterTooLargeError.code, str(error))
            except (ValueError, OSError) as error:
                self._fail_inspection(known, AdapterLoadError.code, str(error))
            else:
                known.summary = summary
                self._answer_or_try(known, summary)
                pending, known.pending = known.pending, []
                for request_id in pending:
                    self._arrive(request_id)
                if known.retired:
                    self.retire([known.digest])

    def _fail_inspection(self, known: _Known, code: str, reason: str) -> None:
        """Refuse all who wait for it, and forget the adapter: who asks again has it inspected again."""
        reason = self._refused(known, reason)
        self.num_changes += 1
        self.num_inspection_failures += 1
        self._failed |= dict.fromkeys(known.pending, self._refusal(code, reason))
        for answer, _ in known.inquiries:
            answer(Inspection(code=code, reason=reason))
        del self._known[known.digest]
        self._numbers.release(known.digest)

    def _answer_or_try(self, known: _Known, summary: AdapterSummary) -> None:
        """Tell who has asked for an inspection, and start a trial for those who want one as well."""
        inquiries, known.inquiries = known.inquiries, []
        for answer, whole in inquiries:
            if whole:
                known.inquiries.append((answer, whole))
            else:
                answer(Inspection(summary.num_blocks, summary.size_bytes))
        if known.inquiries and known.digest not in self._on_trial:
            self._on_trial.add(known.digest)
            self._orders.trial.append(Fetch(known.number, known.path, summary.slice_ranks))

    def _end_trial(self, known: _Known, error: WorkError | None) -> None:
        assert known.summary is not None
        self._on_trial.remove(known.digest)
        inspection = Inspection(known.summary.num_blocks, known.summary.size_bytes)
        if error is not None:
            code = AdapterInvalidError.code if error.is_permanent else AdapterLoadError.code
            inspection = Inspection(code=code, reason=self._refused(known, error.reason))
        inquiries, known.inquiries = known.inquiries, []
        for answer, _ in inquiries:
            answer(inspection)
        self._forget_retired(known)

    def _add_to_policy(self, known: _Known, summary: AdapterSummary) -> None:
        self.policy.add_adapter(Adapter(known.digest, summary.rank, summary.size_bytes), summary.num_blocks)

    def _forget_retired(self, known: _Known) -> None:
        """After something was let go: forget a retired adapter of which nothing is left."""
        is_known = self._known.get(known.digest) is known
        if known.retired and is_known and known.inspection is None and not self.cache.knows(known.digest):
            del self._known[known.digest]
            self._numbers.release(known.digest)
            self._predictor.forget(known.digest)
            self.num_changes += 1

    def _carry_out(self, plan: Plan) -> None:
        if not plan:
            return
        self.num_changes += 1
        for eviction in plan.evict:
            known = self._known[eviction.digest]
            self._give_back(known)
            self.evicted.append((known.name, eviction.reason.value))
        self._orders.drop += [self._known[digest].number for digest in plan.drop]
        for digest in plan.load:
            known = self._known[digest]
            assert known.summary is not None
            known.blocks = self.storage.take(known.summary.num_blocks)
            self._orders.load.append(Load(known.number, known.blocks))
        for digest in plan.fetch:
            known = self._known[digest]
            assert known.summary is not None
            self._orders.fetch.append(Fetch(known.number, known.path, known.summary.slice_ranks))
        for digest in {*plan.drop, *(eviction.digest for eviction in plan.evict)}:
            self._forget_retired(self._known[digest])

    def _give_back(self, known: _Known) -> None:
        self._orders.evict.append(known.number)
        self.storage.give_back(known.blocks)
        known.blocks = ()

    def _end_work(self, what: str, known: _Known, error: WorkError | None) -> None:
        if what == "trial":
            self._end_trial(known, error)
            return
        self.num_changes += 1
        if error is None:
            if what == "load" and known.summary is not None:
                self._loaded_bytes += known.summary.size_bytes * self._num_ranks
            (self.policy.fetched if what == "fetch" else self.policy.loaded)(known.digest)
            return
        code = AdapterInvalidError.code if error.is_permanent else AdapterLoadError.code
        refusal = self._refusal(code, self._refused(known, error.reason))
        for request_id in self.policy.failed(known.digest, self._clock()):
            self._live[request_id].num_predicted_tokens = 0
            self._failed[request_id] = refusal
        if what == "load":
            self._give_back(known)
        self._orders.drop.append(known.number)  # Other ranks may have succeeded.
        self._forget_retired(known)

    def _refusal(self, code: str, reason: str) -> Refusal:
        return Refusal(code, reason, self._settings.retry_after_s if code == AdapterLoadError.code else None)

    def _refused(self, known: _Known, reason: str) -> str:
        reason = f"adapter {known.name!r} ({known.id.short}) cannot be used: {reason}"
        logger.error("%s", reason)
        return reason


def _inspect(path: str, storage: Storage, max_rank: int) -> tuple[str, AdapterSummary]:
    folder = get_adapter_absolute_path(path)
    return folder, storage.summarise(Path(folder), max_rank)
