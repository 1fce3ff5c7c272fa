"""vLLM's server arguments and process environment, built from the configuration.

The arguments come from vLLM's own parser, so that every default is vLLM's and every name in ``engine.vllm_args`` can be
checked; what the configuration names itself is set on top.
"""

import logging
from argparse import Namespace
from pathlib import Path
from typing import Any, get_args

from vllm.config.lora import MaxLoRARanks
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from chameleon_ray.config import AppConfig, ConfigError, EngineConfig, no_effect
from chameleon_ray.engine.environment import num_engine_processes, usable_cores, worker_spin_s
from chameleon_ray.engine.paged.options import PagedSettings, paged_arguments
from chameleon_ray.engine.slots.options import slots_arguments
from chameleon_ray.engine.spin import EXECUTOR, SETTINGS_KEY

logger = logging.getLogger("ray.serve")

GIB = 2**30
NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
"""One entry per GPU of the node, whichever of them this process may use."""
RESIDENCY_EXTENSION = "chameleon_ray.engine.residency.AdapterResidency"


def resolve_device(engine: EngineConfig) -> str:
    """``cpu`` or ``cuda``. Raises ConfigError when the installed vLLM cannot run on the device asked for."""
    installed = "cpu" if current_platform.is_cpu() else "cuda"
    if engine.device not in ("auto", installed):
        raise ConfigError(
            f"engine.device is {engine.device!r}, but the installed vLLM is built for {installed!r}; "
            "install chameleon-ray[gpu] on machines with a GPU and requirements/cpu.txt elsewhere"
        )
    return installed


def resolve_adapter_memory(config: AppConfig) -> AppConfig:
    """The configuration with ``engine.adapter_memory`` other than ``auto``. Raises ConfigError as
    ``resolve_device``, and for an option that has no effect with what ``auto`` has chosen."""
    chosen: str = config.engine.adapter_memory
    if chosen == "auto":
        # docs/adapter_cache.md lists what has not run on a GPU; a wrong answer would be worse than a slow one.
        chosen = "paged" if resolve_device(config.engine) == "cpu" else "slots"
        if ignored := config.engine.ignored_options(chosen):
            raise ConfigError(no_effect(ignored, f"auto, which is {chosen} here"))
        logger.info("engine.adapter_memory is auto: %s", chosen)
    return with_adapter_memory(config, chosen)


def with_adapter_memory(config: AppConfig, where: str) -> AppConfig:
    """The configuration with this ``engine.adapter_memory``."""
    return config.model_copy(update={"engine": config.engine.model_copy(update={"adapter_memory": where})})


def server_args(config: AppConfig) -> Namespace:
    """The argument namespace that ``vllm serve`` would have parsed. Raises ConfigError for an unknown vLLM option."""
    config = resolve_adapter_memory(config)
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    own, extra = _own_arguments(config), _checked(args, config.engine.vllm_args)
    if isinstance(more := extra.get("additional_config"), dict):
        extra = extra | {"additional_config": own.get("additional_config", {}) | more}
    for name, value in (own | extra).items():
        setattr(args, name, value)
    try:
        validate_parsed_serve_args(args)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"engine.vllm_args: {error}") from None
    return args


def lora_rank_bound(max_rank: int) -> int:
    """The smallest slot rank that vLLM knows and that holds ``max_rank``. Raises ConfigError above its largest."""
    known = sorted(get_args(MaxLoRARanks))
    for rank in known:
        if rank >= max_rank:
            return int(rank)
    raise ConfigError(f"adapters.max_rank is {max_rank}, but vLLM's adapter slots go up to rank {known[-1]}")


def _own_arguments(config: AppConfig) -> dict[str, Any]:
    engine, model = config.engine, config.model
    arguments: dict[str, Any] = {
        "model": model.source,
        "served_model_name": [model.served_name],
        "dtype": engine.dtype,
        "seed": engine.seed,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "max_num_batched_tokens": engine.max_num_batched_tokens,
        "gpu_memory_utilization": engine.gpu_memory_utilization,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "enable_prefix_caching": engine.enable_prefix_caching,
        "enforce_eager": engine.enforce_eager,
        "enable_lora": True,
        "worker_extension_cls": RESIDENCY_EXTENSION,
        "enable_log_requests": False,
        "disable_fastapi_docs": True,
    }
    arguments |= {"paged": _paged, "slots": _slots, "stock": _stock}[engine.adapter_memory](config)
    kv_cache_gib = engine.kv_cache_gib
    if kv_cache_gib is None and resolve_device(engine) == "cpu":
        kv_cache_gib = 1.0  # vLLM's own default takes a share of all host memory, for every engine on the machine
    if kv_cache_gib is not None:
        arguments["kv_cache_memory_bytes"] = int(kv_cache_gib * GIB)
    if (spin := _spin(config)) is not None:
        arguments["distributed_executor_backend"] = EXECUTOR
        arguments["additional_config"] = {**arguments.get("additional_config", {}), SETTINGS_KEY: spin}
    return arguments


def _spin(config: AppConfig) -> float | None:
    """Seconds that worker processes poll for; None for vLLM's own, and where there are no worker processes."""
    on_cpu = resolve_device(config.engine) == "cpu"
    if not on_cpu and config.engine.tensor_parallel_size == 1:
        return None  # the worker is a part of EngineCore
    cores, num_gpus = usable_cores(), None if on_cpu else len(list(NVIDIA_GPUS.glob("*"))) or None
    num_processes = num_engine_processes(config, cores, num_gpus)
    spin_s = worker_spin_s(config, cores, num_processes)
    logger.info(
        "engine.worker_spin_s: workers poll for %s after each step (%g cores for up to %d engine processes)",
        "vLLM's own time" if spin_s is None else f"{spin_s:g} s",
        cores,
        num_processes,
    )
    return spin_s


def _stock(config: AppConfig) -> dict[str, Any]:
    return {
        "max_loras": config.engine.max_loras,
        "max_cpu_loras": max(config.engine.max_cpu_loras, config.engine.max_loras),
        "max_lora_rank": lora_rank_bound(config.adapters.max_rank),
    }


def _slots(config: AppConfig) -> dict[str, Any]:
    return slots_arguments(config.engine.max_loras, lora_rank_bound(config.adapters.max_rank), _settings(config))


def _paged(config: AppConfig) -> dict[str, Any]:
    return paged_arguments(_settings(config))


def _settings(config: AppConfig) -> PagedSettings:
    return PagedSettings(
        adapter_memory_share=config.engine.adapter_memory_share,
        adapter_host_bytes=int(config.engine.adapter_host_gib * GIB),
        max_rank=config.adapters.max_rank,
        check_finite=False,  # AdapterLibrary has looked at these very files.
        retry_after_s=config.adapters.retry_after_s,
        adapter_policy=config.engine.adapter_policy,
        scheduler=config.engine.scheduler,
        request_size=config.engine.request_size,
        scheduler_max_queues=config.engine.scheduler_max_queues,
        scheduler_slo_s=config.engine.scheduler_slo_s,
        scheduler_refresh_s=config.engine.scheduler_refresh_s,
        trust_predictions=config.engine.length_predictor != "history",  # EstimatingLLM strips what clients send.
    )


def _checked(args: Namespace, extra: dict[str, Any]) -> dict[str, Any]:
    for name in extra:
        if not hasattr(args, name):
            raise ConfigError(
                f"engine.vllm_args: vLLM has no option {name!r}; use the Python name, such as tool_call_parser"
            )
    return extra
