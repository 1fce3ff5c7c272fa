"""What vLLM's stock LoRA slots hold, asked of the worker (a vLLM ``worker_extension_cls``)."""

from chameleon_ray.engine.cpu_slots import correct_wrappers


class AdapterResidency:
    """Mixed into vLLM's worker; called through ``AsyncLLM.collective_rpc``."""

    def adapter_residency(self) -> tuple[list[int], list[int]]:
        """LoRA ids in GPU slots and LoRA ids in host memory, each least recently used first."""
        manager = self.model_runner.lora_manager._adapter_manager  # type: ignore[attr-defined]
        return list(manager._active_adapters), list(manager._registered_adapters)

    def correct_slots(self) -> None:
        """Once, before the first request: see ``cpu_slots``."""
        correct_wrappers(self.model_runner.lora_manager._adapter_manager)  # type: ignore[attr-defined]
