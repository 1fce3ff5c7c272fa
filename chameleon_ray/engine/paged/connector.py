"""vLLM's KV connector as the wire between the scheduler's ``AdapterMemory`` and the workers' ``WorkerHost``.

No KV is transferred: a connector is vLLM's way to lend blocks out, to send something along with every step, and to hear
back from all ranks. Translation only.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import prometheus_client
import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput

from chameleon_ray.engine.paged.host import WorkerHost
from chameleon_ray.engine.paged.memory import AdapterMemory
from chameleon_ray.engine.paged.messages import (
    ModelLayout,
    PagedUnsupportedError,
    StepOrders,
    StepResults,
    tells_starter,
)
from chameleon_ray.engine.paged.options import EngineLimits, PagedSettings
from chameleon_ray.engine.paged.prometheus import PolicyPrometheus
from chameleon_ray.engine.paged.stats import AdapterStats, StatsReporter
from chameleon_ray.engine.paged.storage import PagedStorage, Storage

if TYPE_CHECKING:
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


class PagedConnector(KVConnectorBase_V1, SupportsHMA):
    """One in the scheduler's process (``memory`` is set), one per worker (``host`` is set).

    ``SupportsHMA``: else vLLM would give every layer of a model with sliding windows a full KV cache for our sake. With
    it we see that the layers do not share one table, and such a model is served from slots.
    """

    memory: AdapterMemory
    host: WorkerHost[Any, Any]
    kv_caches: dict[str, torch.Tensor]

    @tells_starter
    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.check_groups(kv_cache_config)
        self.settings = PagedSettings.of(vllm_config)
        self.reserved_blocks: Callable[[], int] = lambda: 0
        """Free blocks that the running batch is about to need; the scheduler's to say."""
        self._limits = EngineLimits.of(vllm_config)

    def check_groups(self, kv_cache_config: KVCacheConfig) -> None:
        """Raise PagedUnsupportedError for groups of layers with tables of KV blocks of their own."""
        if len(kv_cache_config.kv_cache_groups) != 1:
            raise PagedUnsupportedError("its layers do not share one table of KV blocks")

    def make_storage(self, layout: KVConnectorHandshakeMetadata) -> Storage:
        """Where adapters lie, by what the workers have told."""
        assert isinstance(layout, ModelLayout)
        return PagedStorage(layout, self._pool)

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # Scheduler's process

    def bind_gpu_block_pool(self, gpu_block_pool: "BlockPool") -> None:
        self._pool = gpu_block_pool

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        layouts = list(metadata.values())
        layout = layouts[0]
        assert all(other == layout for other in layouts), "ranks must agree"
        self.memory = AdapterMemory(self.make_storage(layout), len(layouts), self._pool, self.settings, self._limits)
        self._reporter = StatsReporter(self.memory)

    def on_new_request(self, request: "Request") -> None:
        self.memory.add(request)

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        return 0, False

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        self.memory.admit(request.request_id)

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self.memory.release(request)
        return False, None

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, [])

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        orders = self.memory.end_step(self.reserved_blocks())
        orders.has_forward = scheduler_output.total_num_scheduled_tokens > 0
        return orders

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        if connector_output.kv_connector_worker_meta is not None:
            assert isinstance(connector_output.kv_connector_worker_meta, StepResults)
            self.memory.apply(connector_output.kv_connector_worker_meta)

    def has_pending_push_work(self) -> bool:
        return self.memory.has_work

    def get_kv_connector_stats(self) -> AdapterStats | None:
        return self._reporter.take() if self.role is KVConnectorRole.SCHEDULER else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> AdapterStats:
        return AdapterStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PolicyPrometheus | None:
        if metric_types[prometheus_client.Gauge] is not prometheus_client.Gauge:
            return None  # Ray's: replicas publish by themselves.
        return PolicyPrometheus(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # Workers

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.kv_caches = kv_caches

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata:
        return self.host.layout

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        orders = self._get_connector_metadata()
        assert isinstance(orders, StepOrders)
        self._had_forward = orders.has_forward
        self.host.start(orders)

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return self.host.take_results(may_wait=not self._had_forward) or None

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

    def shutdown(self) -> None:
        if self.role is KVConnectorRole.SCHEDULER:
            self.memory.close()
        else:
            self.host.close()
