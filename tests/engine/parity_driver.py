"""One recorded sequence of events, given to the simulated replica and to the real scheduler: what does each decide?

The simulator makes the record: arrivals, aborts, fetches and loads that end, and when steps begin. The real
``ChameleonScheduler`` with its block pool is given the same, without a model: every step's output is one token for each
request whose prompt is computed.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vllm import EngineArgs, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from chameleon_ray.adapters.identity import AdapterId
from chameleon_ray.adapters.modules import ModuleTable
from chameleon_ray.engine.paged.checkpoint import AdapterSummary
from chameleon_ray.engine.paged.memory import _Known
from chameleon_ray.engine.paged.messages import ModelLayout, StepResults
from chameleon_ray.engine.paged.options import PagedSettings, paged_arguments
from chameleon_ray.engine.paged.scheduler import ChameleonScheduler
from chameleon_ray.engine.slots.messages import SlotLayout
from chameleon_ray.engine.slots.options import slots_arguments
from chameleon_ray.engine.slots.scheduler import SlotsScheduler
from chameleon_ray.policy.adapter import Adapter, Tier
from chameleon_ray.policy.replica import ReplicaConfig, ReplicaPolicy
from chameleon_ray.predictor.lengths import HistoryPredictor
from chameleon_ray.sim.costs import CostModel
from chameleon_ray.sim.loop import run
from chameleon_ray.sim.replica import EngineMode, SimReplica
from chameleon_ray.sim.workload import SimRequest

STOP, OTHER = 7, 5
"""Tokens: the one that ends a request, and any other."""

Event = tuple[Any, ...]


@dataclass
class Recorder:
    """Everything that a policy is told (``events``) and what it decides (``decisions``, with the step's number)."""

    events: list[Event] = field(default_factory=list)
    decisions: list[Event] = field(default_factory=list)
    step: int = 0

    def attach(self, policy: ReplicaPolicy) -> None:
        def wrap(name: str, note: Callable[..., None]) -> None:
            method = getattr(policy, name)

            def noted(*args: Any, **kwargs: Any) -> Any:
                result = method(*args, **kwargs)
                note(result, *args, **kwargs)
                return result

            setattr(policy, name, noted)

        wrap("begin_step", self._begin_step)
        wrap("arrive", self._arrive)
        wrap("remove", self._remove)
        wrap("fetched", lambda _, digest: self.events.append(("fetched", digest)))
        wrap("loaded", lambda _, digest: self.events.append(("loaded", digest)))
        wrap("admit", lambda result, request_id, now_s: self._decide("admit", request_id, result.queue))
        wrap("pass_over", lambda _, request_id, obstacle: self._decide("pass over", request_id, obstacle))
        wrap("requeue", lambda _, request_id, now_s, squashed=False: self._decide("requeue", request_id, squashed))
        wrap("finish", lambda _, request_id, now_s, tokens: self._decide("finish", request_id, tokens))
        for name in ("end_step", "make_room"):
            wrap(name, lambda plan, *_, **__: self._plan(plan))

    def _decide(self, *what: Any) -> None:
        self.decisions.append((self.step, *what))

    def _begin_step(self, _: None, now_s: float) -> None:
        self.step += 1
        self.events.append(("step", now_s))

    def _arrive(self, hit: bool, request: Any, now_s: float) -> None:
        self.events.append(("arrive", now_s, request.request_id))
        self._decide("arrive", request.request_id, request.num_predicted_tokens, hit)

    def _remove(self, _: None, request_id: str, now_s: float) -> None:
        self.events.append(("abort", now_s, request_id))
        self._decide("remove", request_id)

    def _plan(self, plan: Any) -> None:
        if plan or plan.blocked:
            evict = tuple((eviction.digest, str(eviction.reason)) for eviction in plan.evict)
            self._decide("plan", evict, plan.drop, plan.load, plan.num_prefetch, plan.fetch, plan.blocked)


def simulate(
    costs: CostModel,
    config: ReplicaConfig,
    adapters: Sequence[Adapter],
    requests: Sequence[SimRequest],
    aborts: dict[str, float],
) -> tuple[Recorder, SimReplica]:
    """The simulator's record. aborts: request id -> when its client gives up, if it still is there."""
    recorder = Recorder()
    predictor = HistoryPredictor(costs.limits.max_model_len)
    replica = SimReplica(costs, config, EngineMode(check_every=1), predictor, lambda job, now_s: None)
    recorder.attach(replica.policy)
    for adapter in adapters:
        replica.add_adapter(adapter, Tier.DISK)

    def abort(request_id: str, now_s: float) -> Any:
        return replica.abort(request_id, now_s) if request_id in replica.jobs else ()

    events = [(request.arrival_s, partial(replica.arrive, request)) for request in requests]
    events += [(at_s, partial(abort, request_id)) for request_id, at_s in aborts.items()]
    run(events)
    replica.check_end()
    return recorder, replica


class RealScheduler:
    """vLLM's scheduler with our policy in it, and a clock that stands where it is put.

    num_slots: adapters are in so many slots; None: in KV memory.
    """

    def __init__(
        self,
        model: str,
        costs: CostModel,
        settings: PagedSettings,
        adapters: Sequence[Adapter],
        requests: Sequence[Any],
        num_slots: int | None = None,
    ) -> None:
        self.now_s = 0.0
        self.scheduler = _scheduler(model, costs, settings, num_slots)
        layout = _layout(costs) if num_slots is None else SlotLayout(ModuleTable(), frozenset(), num_slots, 1, 4)
        self.scheduler.connector.set_xfer_handshake_metadata({0: layout})
        self.memory = self.scheduler.connector.memory
        self.memory._clock = lambda: self.now_s
        self._loras = {}
        self._requests = {request.request_id: request for request in requests}
        self._output: Any = None
        for number, adapter in enumerate(adapters, start=1):
            adapter_id = AdapterId(adapter.digest)
            self._loras[adapter.digest] = LoRARequest(adapter_id.lora_name(str(number)), number, "nowhere")
            num_blocks = costs.adapter_blocks(adapter.size_bytes) if num_slots is None else 1
            summary = AdapterSummary(adapter.rank, (adapter.rank,), num_blocks, adapter.size_bytes)
            given = self.memory._numbers.number(adapter.digest)
            self.memory._known[adapter.digest] = _Known(adapter_id, str(number), "nowhere", given, summary=summary)
            self.memory.policy.add_adapter(adapter, num_blocks)

    def replay(self, events: Sequence[Event]) -> Recorder:
        """The decisions on these events; all books balance after every step."""
        recorder = Recorder()
        recorder.attach(self.memory.policy)
        for what, *rest in events:
            getattr(self, f"_{what}")(*rest)
        return recorder

    def _arrive(self, now_s: float, request_id: str) -> None:
        self.now_s = now_s
        given: SimRequest = self._requests[request_id]
        params = SamplingParams(temperature=0.0, max_tokens=given.max_tokens, stop_token_ids=[STOP])
        request = Request(
            request_id=request_id,
            prompt_token_ids=[OTHER] * given.num_prompt_tokens,
            sampling_params=params,
            pooling_params=None,
            lora_request=self._loras[given.adapter.digest] if given.adapter else None,
        )
        self.scheduler.add_request(request)

    def _abort(self, now_s: float, request_id: str) -> None:
        self.now_s = now_s
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def _fetched(self, digest: str) -> None:
        self._hear(StepResults(Counter({("fetch", self.memory._numbers.number(digest)): 1})))

    def _loaded(self, digest: str) -> None:
        self._hear(StepResults(Counter({("load", self.memory._numbers.number(digest)): 1})))

    def _hear(self, results: StepResults) -> None:
        """At once: in the engine it comes with the step's output, before the arrivals that came meanwhile."""
        self.scheduler.connector.update_connector_output(KVConnectorOutput(kv_connector_worker_meta=results))

    def _step(self, now_s: float) -> None:
        self.now_s = now_s
        if self._output is not None:
            self._end_step()
        self._output = self.scheduler.schedule()

    def _end_step(self) -> None:
        tokens = {request_id: self._token(request_id) for request_id in self._output.num_scheduled_tokens}
        output = ModelRunnerOutput(
            req_ids=list(tokens),
            req_id_to_index={request_id: index for index, request_id in enumerate(tokens)},
            sampled_token_ids=list(tokens.values()),
        )
        self.scheduler.update_from_output(self._output, output)
        self.memory.check()

    def _token(self, request_id: str) -> list[int]:
        request = self.scheduler.requests.get(request_id)
        if request is None or request.is_prefill_chunk:
            return []
        is_last = request.num_output_tokens + 1 == self._requests[request_id].num_output_tokens
        return [STOP if is_last else OTHER]


def _layout(costs: CostModel) -> ModelLayout:
    block_elems = costs.memory.block_tokens * costs.memory.kv_bytes_per_token // 4
    return ModelLayout(
        parts={},
        targets={},
        table=ModuleTable(),
        num_layers=1,
        page_elems=block_elems,
        pages_per_block=1,
        num_blocks=costs.memory.pool_blocks + 1,
        element_bytes=4,
    )


def _scheduler(model: str, costs: CostModel, settings: PagedSettings, num_slots: int | None) -> ChameleonScheduler:
    limits = costs.limits
    config = EngineArgs(
        model=model,
        dtype="float32",
        enable_lora=True,
        max_num_seqs=limits.max_num_seqs,
        max_model_len=limits.max_model_len,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        block_size=costs.memory.block_tokens,
        enforce_eager=True,
        enable_prefix_caching=False,
        watermark=limits.watermark_share,
        **(paged_arguments(settings) if num_slots is None else slots_arguments(num_slots, 128, settings)),
    ).create_engine_config()
    num_blocks = costs.memory.pool_blocks + 1
    config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(
        block_size=costs.memory.block_tokens, num_kv_heads=1, head_size=8, dtype=config.model_config.dtype
    )
    kv_cache_config = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    scheduler = ChameleonScheduler if num_slots is None else SlotsScheduler
    return scheduler(config, kv_cache_config, StructuredOutputManager(config), block_size=costs.memory.block_tokens)
