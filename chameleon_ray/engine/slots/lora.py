"""vLLM's LoRA manager of a worker, whose slots ``SlotHost`` fills: by itself it loads nothing any more."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.lora.layers import LoRAMapping
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.utils.torch_utils import PIN_MEMORY

from chameleon_ray.engine.cpu_slots import correct_wrappers
from chameleon_ray.engine.paged.checkpoint import AdapterFilesError
from chameleon_ray.engine.paged.lora import WARM_UP_PATH
from chameleon_ray.engine.slots_loading import ScaledLoRAModel, expected_experts


class SlotWorkerLoRAManager(LRUCacheWorkerLoRAManager):
    """What the model runner talks to. ``in_use``: adapter number -> its slot, from the beginning of its load until it
    leaves; only adapters whose loads have ended are seen by vLLM's kernels (``assign``)."""

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: VllmConfig) -> Any:
        wrapped = super().create_lora_manager(model, vllm_config)
        correct_wrappers(self._adapter_manager)
        self.in_use: dict[int, int] = {}
        return wrapped

    # For ``SlotHost``

    @property
    def num_slots(self) -> int:
        return int(self._adapter_manager.lora_slots)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot, over all layers."""
        tensors = (
            tensor
            for module in self._adapter_manager.modules.values()
            for name, value in vars(module).items()
            if name.endswith("_stacked")
            for tensor in value
        )
        # Layers of experts list their tensors twice, in two orders.
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values()) // self.num_slots

    @property
    def experts(self) -> frozenset[str]:
        """See ``SlotLayout``."""
        manager = self._adapter_manager
        return expected_experts(manager.supported_lora_modules, manager.packed_modules_mapping)

    def read(self, number: int, folder: str, check_finite: bool) -> LoRAModel:
        """The adapter as slots take it, in page-locked host memory where there is a GPU; in any thread.

        Raises ValueError or OSError.
        """
        model = self._load_adapter(LoRARequest(f"adapter {number}", number, folder))
        self._adapter_manager._create_merged_loras_inplace(model)
        for weights in model.loras.values():
            weights.lora_a = _prepared(weights.lora_a, check_finite)
            weights.lora_b = _prepared(weights.lora_b, check_finite)
        return model

    def fill(self, slot: int, model: LoRAModel) -> None:
        """Copy the adapter into the slot, which nobody reads meanwhile, on the calling thread's stream."""
        manager = self._adapter_manager
        for name, module in manager.modules.items():
            if weights := manager._get_lora_layer_weights(model, name):
                module.set_lora(slot, weights.lora_a, weights.lora_b)
            else:
                module.reset_lora(slot)

    def assign(self, slot: int, number: int | None) -> None:
        """The slot holds this adapter, or none, for the steps to come."""
        self._adapter_manager.lora_index_to_id[slot] = number

    # For the model runner

    def set_active_adapters(self, requests: set[LoRARequest], mapping: LoRAMapping | None) -> None:
        """Describe the next step to the kernels. A dummy step beside others' batches, with adapters in slots, has none:
        the adapters that vLLM makes for it would overwrite them."""
        if self.in_use and mapping is not None and any(request.lora_path == WARM_UP_PATH for request in requests):
            mapping = replace(
                mapping,
                index_mapping=(0,) * len(mapping.index_mapping),
                prompt_mapping=(0,) * len(mapping.prompt_mapping),
            )
        super().set_active_adapters(requests, mapping)

    def forget_step(self) -> None:
        """Describe the next step anew, although it may be like the last one: device memory was lost meanwhile."""
        self._adapter_manager._last_mapping = None

    def _apply_adapters(self, lora_requests: set[LoRARequest]) -> None:
        if not self.in_use:  # Warm-up: a request's adapter is in its slot before the request runs.
            super()._apply_adapters(lora_requests)

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """Adapters are loaded when the first request needs them; only those of the warm-up are loaded here."""
        return super().add_adapter(lora_request) if lora_request.lora_path == WARM_UP_PATH else True

    def add_dummy_lora(self, lora_request: LoRARequest, rank: int) -> bool:
        return True if self.in_use else super().add_dummy_lora(lora_request, rank)

    def remove_adapter(self, adapter_id: int) -> bool:
        return True

    def remove_all_adapters(self) -> None:
        """After the warm-up, or new base weights: adapters in slots are the scheduler's to remove."""
        if not self.in_use:
            super().remove_all_adapters()

    def pin_adapter(self, adapter_id: int) -> bool:
        raise NotImplementedError("adapters cannot be pinned to slots: the cache keeps the ones that are used")

    def list_adapters(self) -> set[int]:
        return super().list_adapters() | self.in_use.keys()


def load_lora_model(
    runner: Any, model: torch.nn.Module, vllm_config: VllmConfig, device: torch.device
) -> torch.nn.Module:
    """Takes the place of the model runner's method of that name (``LoRAModelRunnerMixin``, both runners)."""
    runner.lora_manager = SlotWorkerLoRAManager(vllm_config, device, model.embedding_modules, ScaledLoRAModel)
    return runner.lora_manager.create_lora_manager(model, vllm_config)


def use_slots(runner: Any) -> None:
    """Have the model runner build its LoRA manager here; before it loads the model."""
    runner.load_lora_model = partial(load_lora_model, runner)


def _prepared(weights: Any, check_finite: bool) -> Any:
    if isinstance(weights, list):
        return [_prepared(one, check_finite) for one in weights]
    if weights is None:
        return None
    if check_finite and not bool(torch.isfinite(weights).all()):
        raise AdapterFilesError(f"its weights are not all finite as {weights.dtype}: train it again, or check the file")
    return weights.pin_memory() if PIN_MEMORY and not weights.is_pinned() else weights
