"""The vLLM arguments that put our policy over vLLM's slots, and what cannot be served so. Imports no vLLM."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from chameleon_ray.engine.paged.options import SETTINGS_KEY, PagedSettings, foreign_connector

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PACKAGE = "chameleon_ray.engine.slots"
CONNECTOR = "SlotsConnector"


def slots_arguments(max_loras: int, max_lora_rank: int, settings: PagedSettings | None = None) -> dict[str, Any]:
    """vLLM arguments, by their Python names, to set beside ``enable_lora=True``. max_loras: number of slots.
    max_lora_rank: rank of each. settings: ``adapter_memory_share`` has no meaning here."""
    return {
        "scheduler_cls": f"{PACKAGE}.scheduler.SlotsScheduler",
        "worker_cls": f"{PACKAGE}.worker.SlotsWorker",
        "kv_transfer_config": {
            "kv_connector": CONNECTOR,
            "kv_connector_module_path": f"{PACKAGE}.connector",
            # Nothing is transferred. From a consumer vLLM holds freed blocks back for a step, and lets its clients send
            # embeddings of images.
            "kv_role": "kv_producer",
        },
        "additional_config": {SETTINGS_KEY: asdict(settings or PagedSettings())},
        "max_loras": max_loras,
        "max_cpu_loras": max_loras,  # vLLM makes no host copies: ``adapter_host_bytes`` bounds the policy's.
        "max_lora_rank": max_lora_rank,
    }


def unsupported_reason(vllm_config: "VllmConfig") -> str | None:
    """Why this configuration cannot have our policy over its slots; None when nothing is known against it."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    context_ranks = max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size)
    # Reason -> whether it applies; every one has been read in vLLM 0.30, none is tried and seen to fail.
    reasons = {
        "LoRA is not enabled": vllm_config.lora_config is None,
        "vLLM gives encoder-decoder models no KV connector": model.is_encoder_decoder,
        "the stages of a pipeline are not implemented": parallel.pipeline_parallel_size > 1,
        "context parallelism is not implemented": context_ranks > 1,
    }
    known = next((reason for reason, applies in reasons.items() if applies), None)
    return known or foreign_connector(vllm_config, CONNECTOR)
