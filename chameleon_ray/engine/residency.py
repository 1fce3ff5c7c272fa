"""What a vLLM worker knows of its model and its adapters (a ``worker_extension_cls``)."""

from dataclasses import asdict
from typing import Any

from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from chameleon_ray.adapters.errors import AdapterError, AdapterInvalidError, AdapterLoadError
from chameleon_ray.adapters.identity import AdapterId
from chameleon_ray.engine.cpu_slots import correct_wrappers
from chameleon_ray.engine.inspection import Inspection
from chameleon_ray.engine.modules import dump_modules
from chameleon_ray.engine.slots_loading import ScaledLoRAModel

logger = init_logger(__name__)

_PASSING = (MemoryError, OSError, LoRAAdapterNotFoundError, RuntimeError)
"""Errors of the moment: there may be memory, files or a free slot later. Any other is the content's."""


class AdapterResidency:
    """Mixed into vLLM's worker; called through ``AsyncLLM.collective_rpc``."""

    def adapter_residency(self) -> tuple[list[int], list[int]]:
        """LoRA ids in GPU slots and LoRA ids in host memory, each least recently used first."""
        manager = self.model_runner.lora_manager._adapter_manager  # type: ignore[attr-defined]
        return list(manager._active_adapters), list(manager._registered_adapters)

    def load_adapter(self, lora_name: str, number: int, path: str) -> dict[str, Any]:
        """Load an adapter into a slot; the fields of an Inspection. What is raised here would end the engine."""
        try:
            self.add_lora(LoRARequest(lora_name, number, path))  # type: ignore[attr-defined]
        except Exception as error:
            logger.exception("Adapter %s cannot be loaded", lora_name)
            return asdict(_failed(lora_name, error))
        return asdict(Inspection())

    def module_table(self) -> bytes:
        """See ``dump_modules``."""
        return dump_modules(self.model_runner)  # type: ignore[attr-defined]

    def correct_slots(self) -> None:
        """Once, before the first request: see ``cpu_slots`` and ``slots_loading``."""
        manager = self.model_runner.lora_manager  # type: ignore[attr-defined]
        correct_wrappers(manager._adapter_manager)
        manager._lora_model_cls = ScaledLoRAModel


def _failed(lora_name: str, error: Exception) -> Inspection:
    name, adapter_id = AdapterId.parse(lora_name)
    adapter = f"adapter {name!r}" + (f" ({adapter_id.short})" if adapter_id else "")
    if isinstance(error, AdapterError):
        code = error.code
    elif isinstance(error, _PASSING):
        code = AdapterLoadError.code
    else:
        code = AdapterInvalidError.code
    return Inspection(code=code, reason=f"{adapter} cannot be used: {error or repr(error)}")
