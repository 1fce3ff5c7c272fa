"""vLLM's worker, its LoRA layers computing with adapters in KV memory."""

from typing import Any

import torch
from chameleon_kernels.testing import self_check
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheConfig

from chameleon_ray.engine.modules import describe_modules
from chameleon_ray.engine.paged import lora
from chameleon_ray.engine.paged.connector import PagedConnector
from chameleon_ray.engine.paged.host import AdapterHost
from chameleon_ray.engine.paged.messages import ModelLayout, PagedUnsupportedError, tells_starter
from chameleon_ray.engine.paged.options import lift_slot_limits
from chameleon_ray.engine.paged.pages import page_geometry, parts_in_pages

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker

logger = init_logger(__name__)


class PagedWorker(PlatformWorker):
    """Wires three things that vLLM makes one after the other: LoRA layers, KV cache, connector."""

    @tells_starter
    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        lift_slot_limits(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)

    @tells_starter
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        try:
            self_check(self.device, self.vllm_config.model_config.dtype)
        except Exception as error:  # A wrong result, or a kernel that does not compile here.
            raise PagedUnsupportedError(str(error) or repr(error)) from error
        lora.use_pages(self.model_runner)
        super().load_model(*args, **kwargs)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """As vLLM's, which restores the model's weights; our kernels' metadata lie beside them and are lost as well."""
        super().wake_up(tags)
        if tags is None or "weights" in tags:
            self.model_runner.lora_manager.forget_step()

    @tells_starter
    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        connector = get_kv_transfer_group()
        if not isinstance(connector, PagedConnector):
            raise PagedUnsupportedError("the KV connector is not ours; set kv_transfer_config as paged_arguments does")
        manager: lora.PagedWorkerLoRAManager = self.model_runner.lora_manager
        kv_of = {extract_layer_index(name): tensor for name, tensor in connector.kv_caches.items()}
        if len(kv_of) != len(connector.kv_caches):
            raise PagedUnsupportedError("it has layers with more than one KV cache")
        if missing := manager.layer_indices() - kv_of.keys():
            raise PagedUnsupportedError(f"its layers {sorted(missing)} have LoRA and no KV cache")
        dtype = self.vllm_config.lora_config.lora_dtype
        geometry = page_geometry(connector.kv_caches, kv_cache_config.num_blocks, dtype)
        parts = parts_in_pages(manager.parts, geometry)
        numbers = {index: number for number, index in enumerate(sorted(kv_of))}
        modules = manager.layer_modules(parts, numbers.__getitem__)
        layout = ModelLayout(
            parts=manager.parts,
            table=describe_modules(manager._adapter_manager),
            targets={
                name: (module.layer, module.first_slice + position)
                for module in modules
                for position, name in enumerate(module.slices)
            },
            num_layers=len(numbers),
            page_elems=geometry.page_elems,
            pages_per_block=geometry.pages_per_block,
            num_blocks=kv_cache_config.num_blocks,
            element_bytes=dtype.itemsize,
        )
        kv_layers = [kv_of[index] for index in sorted(kv_of)]
        settings = connector.settings
        connector.host = AdapterHost(
            layout,
            geometry,
            modules,
            kv_layers,
            num_readers=settings.readers,
            # What is finite in a file may overflow float16.
            check_finite=settings.check_finite or dtype is torch.float16,
        )
        manager.attach(connector.host, parts, kv_of.__getitem__)
