"""What the paged engine is not for is said before it starts, in words that name the way out."""

import asyncio
from typing import Any

import pytest
from vllm import EngineArgs

from chameleon_ray.config import AppConfig, ConfigError
from chameleon_ray.demo import DemoPaths
from chameleon_ray.engine import server
from chameleon_ray.engine.options import resolve_adapter_memory, server_args
from chameleon_ray.engine.paged.messages import PagedUnsupportedError, tells_starter, told_reason
from chameleon_ray.engine.paged.options import PagedSettings, lift_slot_limits, paged_arguments, unsupported_reason
from chameleon_ray.engine.slots import options as slots_options

BESIDE_ANOTHER = {
    "kv_connector": "MultiConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {
        "connectors": [
            paged_arguments()["kv_transfer_config"],
            {"kv_connector": "ExampleConnector", "kv_role": "kv_both"},
        ]
    },
}


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
        ({"kv_transfer_config": BESIDE_ANOTHER}, "the KV connector is MultiConnector"),
    ],
)
def test_what_is_not_supported_is_named(demo: DemoPaths, arguments: dict[str, Any], reason: str) -> None:
    assert reason in (unsupported_reason(_vllm_config(demo, **arguments)) or "")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, None),
        ({"kv_cache_dtype": "fp8", "fully_sharded_loras": True}, None),
        ({"enable_lora": False}, "not enabled"),
        ({"pipeline_parallel_size": 2}, "pipeline"),
        ({"kv_transfer_config": BESIDE_ANOTHER}, "the KV connector is MultiConnector"),
    ],
)
def test_slots_take_more_than_pages(demo: DemoPaths, arguments: dict[str, Any], reason: str | None) -> None:
    ours = slots_options.slots_arguments(4, 128)
    found = slots_options.unsupported_reason(_vllm_config(demo, **(ours | arguments)))
    assert found is None if reason is None else reason in (found or "")


def test_an_option_that_has_no_effect_with_what_auto_chooses_is_an_error(
    demo: DemoPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolved(device: str, **engine: Any) -> str:
        monkeypatch.setattr("chameleon_ray.engine.options.resolve_device", lambda engine: device)
        config = AppConfig.from_args({"model": {"source": str(demo.model)}, "engine": engine})
        return resolve_adapter_memory(config).engine.adapter_memory

    assert resolved("cpu", adapter_memory_share=0.3) == "paged"
    assert resolved("cuda", max_loras=16, adapter_host_gib=8.0) == "slots"
    with pytest.raises(ConfigError, match=r"engine\.max_loras: without effect .*auto, which is paged here"):
        resolved("cpu", max_loras=16)
    with pytest.raises(ConfigError, match=r"engine\.adapter_memory_share: without effect .*slots here"):
        resolved("cuda", adapter_memory_share=0.3)


def test_configuration_chooses_between_pages_and_slots(demo: DemoPaths) -> None:
    def arguments(**engine: Any) -> Any:
        return server_args(AppConfig.from_args({"model": {"source": str(demo.model)}, "engine": engine}))

    stock = arguments(adapter_memory="stock", max_loras=3)
    assert (stock.max_loras, stock.max_cpu_loras, stock.scheduler_cls) == (3, 64, None)
    slots = arguments(adapter_memory="slots", max_loras=3, adapter_host_gib=2.0)
    assert (slots.max_loras, slots.max_cpu_loras, slots.max_lora_rank) == (3, 3, 128)
    assert slots.scheduler_cls == "chameleon_ray.engine.slots.scheduler.SlotsScheduler"
    assert PagedSettings(**slots.additional_config["chameleon"]).adapter_host_bytes == 2 << 30
    paged = arguments(adapter_memory="paged", adapter_memory_share=0.25, adapter_host_gib=2.0)
    assert paged.scheduler_cls == "chameleon_ray.engine.paged.scheduler.ChameleonScheduler"
    settings = PagedSettings(**paged.additional_config["chameleon"])
    assert (settings.adapter_memory_share, settings.adapter_host_bytes, settings.max_rank) == (0.25, 2 << 30, 128)


def test_with_another_kv_connector_an_engine_starts_as_vllm_comes_before_it_has_loaded_anything(
    demo: DemoPaths, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Both kinds move adapters by a connector of their own."""

    class FarEnoughError(Exception):
        pass

    def estimator(config: AppConfig, *_: object) -> None:
        raise FarEnoughError(config.engine.adapter_memory)

    monkeypatch.setattr(server, "make_estimator", estimator)
    monkeypatch.setattr(server.logger, "propagate", True)
    engine = {"adapter_memory": "paged", "dtype": "float32", "vllm_args": {"kv_transfer_config": BESIDE_ANOTHER}}
    config = AppConfig.from_args({"model": {"source": str(demo.model)}, "engine": engine})
    with pytest.raises(FarEnoughError, match="stock"):
        asyncio.run(server.EngineServer.start(config))
    assert "slots instead of paged: the KV connector is MultiConnector" in caplog.text
    assert "stock instead of slots: the KV connector is MultiConnector" in caplog.text


def test_whoever_starts_an_engine_hears_why_its_processes_refuse() -> None:
    @tells_starter
    def refuse(error: Exception) -> None:
        raise error

    with told_reason() as reason:
        with pytest.raises(ZeroDivisionError):
            refuse(ZeroDivisionError())
        assert reason() == ""
        with pytest.raises(PagedUnsupportedError):
            refuse(PagedUnsupportedError("it is round"))
        assert reason() == "it is round"
