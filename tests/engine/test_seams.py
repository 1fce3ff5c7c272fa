"""What our engines rely on in vLLM 0.30 beyond its documented hooks. A vLLM upgrade fails here first."""

import inspect

import pytest
from engine_harness import PagedEngine
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.request import Request
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from chameleon_ray.engine.paged.queue import PolicyQueue

PARAMETERS = {
    Scheduler.schedule: "self throttle_prefills",
    Scheduler.update_from_output: "self scheduler_output model_runner_output",
    Scheduler._preempt_request: "self request timestamp drop_stale_output",
    Scheduler.finish_requests: "self request_ids finished_status",
    Scheduler.reset_prefix_cache: "self reset_running_requests reset_connector",
    KVCacheManager.allocate_slots: (
        "self request num_new_tokens num_new_computed_tokens new_computed_blocks num_lookahead_tokens "
        "num_external_computed_tokens delay_cache_blocks num_encoder_tokens full_sequence_must_fit reserved_blocks "
        "has_scheduled_reqs"
    ),
    BlockPool.get_new_blocks: "self num_blocks",
    BlockPool.free_blocks: "self ordered_blocks",
    LoRAModelRunnerMixin.load_lora_model: "self model vllm_config device",
    LoRAModelManager._create_lora_modules: "self",
    WorkerLoRAManager.create_lora_manager: "self model vllm_config",
    WorkerLoRAManager.set_active_adapters: "self requests mapping",
    WorkerLoRAManager._load_adapter: "self lora_request",
    WorkerLoRAManager.add_dummy_lora: "self lora_request rank",
    LRUCacheWorkerLoRAManager._apply_adapters: "self lora_requests",
    LoRAModelManager._create_merged_loras_inplace: "self lora_model",
    LoRAModelManager._get_lora_layer_weights: "self lora_model module_name",
    BaseLayerWithLoRA.set_lora: "self index lora_a lora_b",
    Worker.initialize_from_config: "self kv_cache_config",
    MultiprocExecutor._init_executor: "self",
    SpinCondition.__init__: "self is_reader context notify_address busy_loop_s",
    KVConnectorBase_V1.set_xfer_handshake_metadata: "self metadata",
    KVConnectorBase_V1.on_new_request: "self request",
    AsyncMPClient.call_utility_async: "self method args",
    KVConnectorBase_V1.update_state_after_alloc: "self request blocks num_external_tokens",
    KVConnectorBase_V1.build_connector_worker_meta: "self",
}
"""Method -> its parameters as we call or override them."""

SOURCE = {
    Scheduler.schedule: (
        "while (self.waiting or self.skipped_waiting)",
        "request_queue.pop_request()\n                    step_skipped_waiting.prepend_request(request)",
        "self.skipped_waiting.prepend_requests(step_skipped_waiting)",
        "new_blocks = self.kv_cache_manager.allocate_slots(",
        "preempted_req = self.running.pop()",
        "self.connector.update_state_after_alloc(",
        "meta = self._build_kv_connector_meta(self.connector, scheduler_output)",
        "len(scheduled_loras) == self.lora_config.max_loras",
    ),
    Scheduler._select_waiting_queue_for_scheduling: ("return self.skipped_waiting or self.waiting or None",),
    Scheduler.add_request: ("self.connector.on_new_request(request)",),
    Scheduler._preempt_request: ("self.waiting.prepend_request(request)",),
    Scheduler._enqueue_waiting_request: ("self.skipped_waiting.add_request(request)",),
    Scheduler._free_request: ("self._connector_finished(request)",),
    Scheduler.finish_requests: ("self.waiting.remove_requests(",),
    Scheduler._request_blocks_can_be_freed: ("return not self.defer_block_free or",),
    Scheduler.has_requests: ("self.connector.has_pending_push_work()",),
    EngineCoreProc._handle_client_request: ("(method := getattr(self, method_name))",),
    BaseLinearLayerWithLoRA._apply_lora_to_output: ("self.punica_wrapper.add_lora_linear(",),
    BaseLinearLayerWithLoRA.create_lora_weights: ("max_loras,\n                1,",),
    LoRAModelManager._create_lora_modules: ("self.lora_slots,", "self.supported_lora_modules,"),
    LoRAModelManager.activate_adapter: ("module.reset_lora(index)", "self.lora_index_to_id[index] = lora_model.id"),
    LoRAModelManager.set_adapter_mapping: ("self._last_slot_layout != slot_layout",),
    WorkerLoRAManager.set_active_adapters: ("self._apply_adapters(requests)",),
    SpinCondition.wait: ("if current_time <= self.last_read + self.busy_loop_s:",),
    MultiprocExecutor._init_executor: ("self.response_mqs = []",),
    EngineCoreProc._invoke_utility_method: ("if isinstance(result, Future):",),
    LoRAModelRunnerMixin.maybe_setup_dummy_loras: ('lora_path="/not/a/real/path"',),
}
"""Function -> what its text must contain: where vLLM calls us, and where the order of calls matters."""


@pytest.mark.parametrize("method", PARAMETERS, ids=lambda method: method.__qualname__)
def test_signature(method: object) -> None:
    assert " ".join(inspect.signature(method).parameters) == PARAMETERS[method]  # type: ignore[arg-type]


@pytest.mark.parametrize("function", SOURCE, ids=lambda function: function.__qualname__)
def test_source(function: object) -> None:
    source = inspect.getsource(function)  # type: ignore[arg-type]
    missing = [text for text in SOURCE[function] if text not in source]
    assert not missing


def test_bases_and_fields() -> None:
    assert issubclass(AsyncScheduler, Scheduler) and issubclass(CPUWorker, Worker)
    assert RequestQueue.__abstractmethods__ <= set(vars(PolicyQueue))
    assert {"stop_reason", "finish_reason", "events", "trace_headers"} <= set(EngineCoreOutput.__struct_fields__)
    assert callable(Request.update_block_hashes)


def test_objects_of_a_started_engine(engine: PagedEngine) -> None:
    scheduler = engine.scheduler
    for name in ("running", "waiting", "skipped_waiting", "max_num_running_reqs", "block_size", "max_model_len"):
        assert hasattr(scheduler, name)
    assert isinstance(scheduler.waiting, PolicyQueue)
    assert scheduler.kv_cache_manager.allocate_slots == scheduler._allocate_or_reclaim
    assert isinstance(scheduler.kv_cache_manager.watermark_blocks, int)
    assert scheduler.defer_block_free is False
    request = engine.add("Hello")
    engine.step()
    [running] = scheduler.running
    assert isinstance(running.block_hashes, list) and running.lora_request is None
    assert isinstance(scheduler.kv_cache_manager.get_block_ids(running.request_id)[0], list)
    engine.finish([request])
