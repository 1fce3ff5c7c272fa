"""vLLM's worker, its slots filled by ``SlotHost``."""

from typing import Any

import torch
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheConfig

from chameleon_ray.engine.modules import module_table
from chameleon_ray.engine.paged.messages import tells_starter
from chameleon_ray.engine.slots import lora
from chameleon_ray.engine.slots.connector import SlotsConnector
from chameleon_ray.engine.slots.host import SlotHost
from chameleon_ray.engine.slots.messages import SlotLayout, SlotsUnsupportedError

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class SlotsWorker(PlatformWorker):
    """Wires LoRA layers and connector."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        lora.use_slots(self.model_runner)
        super().load_model(*args, **kwargs)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """As vLLM's, which restores the model's weights; what its LoRA kernels read of a step lies beside them."""
        super().wake_up(tags)
        if tags is None or "weights" in tags:
            self.model_runner.lora_manager.forget_step()

    @tells_starter
    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        connector = get_kv_transfer_group()
        if not isinstance(connector, SlotsConnector):
            raise SlotsUnsupportedError("the KV connector is not ours; set kv_transfer_config as slots_arguments does")
        manager: lora.SlotWorkerLoRAManager = self.model_runner.lora_manager
        dtype = self.vllm_config.lora_config.lora_dtype
        layout = SlotLayout(
            table=module_table(self.model_runner),
            experts=manager.experts,
            num_slots=manager.num_slots,
            slot_bytes=manager.slot_bytes,
            element_bytes=dtype.itemsize,
        )
        settings = connector.settings
        # What is finite in a file may overflow float16.
        check_finite = settings.check_finite or dtype is torch.float16
        connector.host = SlotHost(layout, manager, num_readers=settings.readers, check_finite=check_finite)
