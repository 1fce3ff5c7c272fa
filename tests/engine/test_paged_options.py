"""What the paged engine is not for is said before it starts, in words that name the way out."""

from typing import Any

import pytest
from vllm import EngineArgs

from chameleon_ray.config import AppConfig
from chameleon_ray.demo import DemoPaths
from chameleon_ray.engine.options import server_args
from chameleon_ray.engine.paged.options import PagedSettings, lift_slot_limits, paged_arguments, unsupported_reason


def _vllm_config(demo: DemoPaths, **arguments: Any) -> Any:
    given: dict[str, Any] = {"model": str(demo.model), "dtype": "float32", "enable_lora": True, "max_num_seqs": 16}
    return EngineArgs(**(given | paged_arguments() | arguments)).create_engine_config()


def test_the_demo_is_supported_and_slot_options_limit_nothing(demo: DemoPaths) -> None:
    config = _vllm_config(demo)
    assert unsupported_reason(config) is None
    assert config.lora_config.max_loras == 1
    lift_slot_limits(config)
    assert config.lora_config.max_loras == 16
    assert PagedSettings.of(config) == PagedSettings()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"enable_lora": False}, "not enabled"),
        ({"pipeline_parallel_size": 2}, "pipeline"),
        ({"fully_sharded_loras": True}, "fully sharded"),
        ({"kv_cache_dtype": "fp8"}, "fp8"),
    ],
)
def test_what_is_not_supported_is_named(demo: DemoPaths, arguments: dict[str, Any], reason: str) -> None:
    assert reason in (unsupported_reason(_vllm_config(demo, **arguments)) or "")


def test_configuration_chooses_between_pages_and_slots(demo: DemoPaths) -> None:
    def arguments(**engine: Any) -> Any:
        return server_args(AppConfig.from_args({"model": {"source": str(demo.model)}, "engine": engine}))

    slots = arguments(adapter_memory="slots", max_loras=3)
    assert (slots.max_loras, slots.scheduler_cls) == (3, None)
    paged = arguments(adapter_memory="paged", adapter_memory_share=0.25, adapter_host_gib=2.0)
    assert paged.scheduler_cls == "chameleon_ray.engine.paged.scheduler.ChameleonScheduler"
    settings = PagedSettings(**paged.additional_config["chameleon"])
    assert (settings.memory_share, settings.host_bytes, settings.max_rank) == (0.25, 2 << 30, 128)
