"""vLLM's scheduler with the replica's policy in it: which request runs next, and adapters in KV memory.

``schedule`` itself is vLLM's; this stands around it and translates. Seams of vLLM 0.30 that are used beyond its
documented hooks (tests/engine/test_seams.py pins them): ``Scheduler.waiting`` and ``skipped_waiting`` as replaceable
``RequestQueue``s; ``kv_cache_manager.allocate_slots`` as the one place where KV memory runs out; ``_preempt_request``;
``defer_block_free``; ``finish_requests`` for requests that must end with an error; ``EngineCore``'s utility calls.
"""

import time
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.engine.core import EngineCore
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from chameleon_ray.adapters.checkpoint import AdapterShape
from chameleon_ray.engine.paged.connector import PagedConnector
from chameleon_ray.engine.paged.memory import AdapterMemory
from chameleon_ray.engine.paged.messages import PagedUnsupportedError, Refusal, UnsupportedError, tells_starter
from chameleon_ray.engine.paged.options import lift_slot_limits, unsupported_reason
from chameleon_ray.engine.paged.queue import PolicyQueue, SkippedQueue
from chameleon_ray.engine.refusals import CODE, RETRY_AFTER_S

logger = init_logger(__name__)


@tells_starter
def check_supported(vllm_config: Any) -> None:
    """Raises PagedUnsupportedError for a configuration that cannot keep adapters in KV memory."""
    if (reason := unsupported_reason(vllm_config)) is not None:
        raise PagedUnsupportedError(reason)


class ChameleonScheduler(AsyncScheduler):
    """Admits requests in the policy's order, once their adapters are resident; takes idle adapters' blocks before it
    preempts anybody."""

    connector_type: type[PagedConnector] = PagedConnector
    unsupported: type[UnsupportedError] = PagedUnsupportedError

    @tells_starter
    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        self.prepare(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)
        if not isinstance(self.connector, self.connector_type):
            raise self.unsupported("the KV connector is not ours: leave kv_transfer_config to engine.adapter_memory")
        # vLLM holds freed blocks back one step for connectors that fill blocks unordered with the compute stream. Ours
        # does order its copies after it (host.py), so blocks are free at once, as without a connector.
        self.defer_block_free = False
        self.connector.reserved_blocks = self._reserved_blocks
        self.waiting = PolicyQueue(lambda: self._memory, self._fits)
        self.skipped_waiting = SkippedQueue(self.waiting)
        self._allocate_slots = self.kv_cache_manager.allocate_slots
        self.kv_cache_manager.allocate_slots = self._allocate_or_reclaim

    def prepare(self, vllm_config: Any) -> None:
        """Make the configuration fit before vLLM's scheduler reads it. Raises UnsupportedError where it cannot."""
        check_supported(vllm_config)
        lift_slot_limits(vllm_config)

    @property
    def _memory(self) -> AdapterMemory:
        return self.connector.memory

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        squashed = self._memory.policy.squashes()
        self.waiting.begin_step(squashed)
        for request_id in squashed:
            request = self.requests[request_id]
            self.running.remove(request)
            self._preempt_request(request, time.monotonic())
        self._memory.begin_step()
        return super().schedule(throttle_prefills)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if failed := self._memory.take_failed():
            self._end_failed(failed, outputs)
        return outputs

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """As vLLM's, which resets only a pool of which nothing is lent: adapters leave it too.

        reset_running_requests: adapters in use as well, as before sleep and pause, once the requests that use them are
        preempted; both come back. Raises RuntimeError while an adapter is being loaded.
        """
        if reset_running_requests:
            now_s = time.monotonic()
            while self.running:
                self._preempt_request(self.running.pop(), now_s, drop_stale_output=True)
        if reset_running_requests or self._memory.policy.config.shares_kv:
            self._memory.evict_idle()
        return super().reset_prefix_cache(reset_running_requests, reset_connector)

    def _end_failed(self, failed: dict[str, Refusal], outputs: dict[int, EngineCoreOutputs]) -> None:
        for request in self.finish_requests(list(failed), RequestStatus.FINISHED_ERROR):
            refusal = failed[request.request_id]
            output = EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=request.get_finished_reason(),
                stop_reason=refusal.reason,
                kv_transfer_params={CODE: refusal.code, RETRY_AFTER_S: refusal.retry_after_s},
                events=request.take_events(),
                trace_headers=request.trace_headers,
            )
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(output)

    def _reserved_blocks(self) -> int:
        return len(self.running) + self._inflight_prefill_reserved_blocks()

    def _fits(self, request: Request) -> bool:
        """Whether there are free blocks for a waiting request's tokens; takes them from idle adapters if they do."""
        if request.num_computed_tokens:  # A session that goes on: it holds blocks already.
            return True
        short = self._blocks_short(request, request.num_tokens)
        if short > 0:  # Blocks of its prefix that others use as well are not taken from the free ones.
            cached = self.kv_cache_manager.get_computed_blocks(request)[0].blocks
            short -= sum(block.ref_cnt > 0 for block in cached[0]) if cached else 0
        if short <= 0 or self._memory.reclaim(short, request.request_id, or_nothing=True):
            return True
        if self._memory.policy.config.shares_kv and not self.running and not self._memory.is_busy:
            pool = self.kv_cache_manager.block_pool.num_gpu_blocks - 1
            reason = f"{request.num_tokens} tokens and the adapter do not fit together in {pool} blocks of KV memory"
            self._memory.refuse(request, reason)
        return False

    def _allocate_or_reclaim(self, request: Request, num_new_tokens: int, **kwargs: Any) -> KVCacheBlocks | None:
        """``allocate_slots``; where memory is short, idle adapters leave first and it is tried again."""
        while (blocks := self._allocate_slots(request, num_new_tokens, **kwargs)) is None:
            short = max(1, self._blocks_short(request, num_new_tokens, **kwargs))
            # A running request would preempt others, so anything helps; a waiting one just waits if it does not fit.
            is_running = request.status == RequestStatus.RUNNING
            if not self._memory.reclaim(short, request.request_id, or_nothing=not is_running):
                return None
        return blocks

    def _blocks_short(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        num_lookahead_tokens: int = 0,
        full_sequence_must_fit: bool = False,
        reserved_blocks: int = 0,
        **_: Any,
    ) -> int:
        """How many more free blocks it takes; blocks found in the prefix cache count as free ones that it uses."""
        num_tokens = request.num_computed_tokens + num_new_computed_tokens + num_new_tokens + num_lookahead_tokens
        if full_sequence_must_fit:
            num_tokens = max(num_tokens, request.num_tokens)
        num_tokens = min(num_tokens, self.max_model_len)
        held = len(self.kv_cache_manager.get_block_ids(request.request_id)[0])
        wanted = -(-num_tokens // self.block_size) - held + reserved_blocks
        if request.status != RequestStatus.RUNNING and self.running:
            wanted += self.kv_cache_manager.watermark_blocks
        return wanted - self.kv_cache_manager.block_pool.get_num_free_blocks()


def _retire_adapters(core: EngineCore, digests: list[str]) -> list[str]:
    """See ``AdapterMemory.retire``."""
    left: list[str] = core.scheduler.connector.memory.retire(digests)
    return left


def _inspect_adapter(core: EngineCore, lora_name: str, path: str, whole: bool) -> Future[dict[str, Any]]:
    """``AdapterMemory.inspect``, with the fields of an Inspection as the result."""
    result: Future[dict[str, Any]] = Future()
    core.scheduler.connector.memory.inspect(lora_name, path, whole, lambda found: result.set_result(asdict(found)))
    return result


def _measure_adapters(core: EngineCore, shapes: list[AdapterShape]) -> list[dict[str, Any]]:
    """``AdapterMemory.measure`` for each, as the fields of an Inspection."""
    return [asdict(core.scheduler.connector.memory.measure(shape)) for shape in shapes]


# vLLM calls the method of EngineCore that a utility call names, between two steps, and answers when its Future is done.
EngineCore.inspect_adapter = _inspect_adapter
EngineCore.measure_adapters = _measure_adapters
EngineCore.retire_adapters = _retire_adapters
