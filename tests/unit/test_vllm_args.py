"""``chameleon vllm-args``: one line for vLLM's own server."""

import json
from dataclasses import fields

import pytest

from chameleon_ray.cli import main
from chameleon_ray.config import EngineConfig
from chameleon_ray.engine.paged.options import PagedSettings, paged_arguments, parse_settings
from chameleon_ray.policy.cache_types import CacheConfig
from chameleon_ray.policy.disciplines import QueueOptions
from chameleon_ray.policy.replica import ReplicaConfig
from chameleon_ray.policy.sizing import SizingOptions
from chameleon_ray.sim.scenario import PolicySettings


def test_a_shell_splits_the_line_into_options_with_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["vllm-args", "adapter_memory_share=0.8", "scheduler=fifo", "scheduler_slo_s=null", "check_finite=false"])
        == 0
    )
    words = capsys.readouterr().out.split()
    assert words[::2] == ["--scheduler-cls", "--worker-cls", "--kv-transfer-config", "--additional-config"]
    wanted = paged_arguments(PagedSettings(adapter_memory_share=0.8, scheduler="fifo", check_finite=False))
    assert words[1::2][:2] == [wanted["scheduler_cls"], wanted["worker_cls"]]
    assert [json.loads(word) for word in words[5::2]] == [wanted["kv_transfer_config"], wanted["additional_config"]]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("memory_shares=0.8", "adapter_memory_share, adapter_policy"),
        ("adapter_memory_share", "NAME=VALUE"),
        ("adapter_memory_share=7", "at most 1"),
        ("scheduler=lifo", "chameleon, paper, fifo"),
        ("adapter_host_bytes=much", "adapter_host_bytes=much"),
    ],
)
def test_a_wrong_setting_is_named(given: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vllm-args", given]) == 2
    assert told in capsys.readouterr().err


def test_no_settings_are_the_defaults() -> None:
    assert parse_settings([]) == PagedSettings()


def names_of(kind: type) -> set[str]:
    return {field.name for field in fields(kind)}


def test_an_option_has_one_name_from_the_configuration_to_the_policy_and_the_simulator() -> None:
    options = {n for n in EngineConfig.model_fields if n.startswith(("adapter_", "scheduler", "request_size"))}
    options -= {"adapter_memory", "adapter_host_gib"}  # which engine; and in bytes from there on
    policy = names_of(CacheConfig) | names_of(QueueOptions) | names_of(SizingOptions) | names_of(ReplicaConfig)
    assert options < names_of(PagedSettings)
    assert options - {"adapter_memory_share"} < policy  # a number of blocks there
    simulated = set(PolicySettings.model_fields) - {"adapter_slots", "predictor_accuracy"}
    assert options < simulated < names_of(PagedSettings)
