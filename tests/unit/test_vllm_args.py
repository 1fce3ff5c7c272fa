"""``chameleon vllm-args``: one line for vLLM's own server."""

import json

import pytest

from chameleon_ray.cli import main
from chameleon_ray.engine.paged.options import PagedSettings, paged_arguments, parse_settings


def test_a_shell_splits_the_line_into_options_with_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vllm-args", "memory_share=0.8", "scheduler=fifo", "slo_s=null", "check_finite=false"]) == 0
    words = capsys.readouterr().out.split()
    assert words[::2] == ["--scheduler-cls", "--worker-cls", "--kv-transfer-config", "--additional-config"]
    wanted = paged_arguments(PagedSettings(memory_share=0.8, scheduler="fifo", check_finite=False))
    assert words[1::2][:2] == [wanted["scheduler_cls"], wanted["worker_cls"]]
    assert [json.loads(word) for word in words[5::2]] == [wanted["kv_transfer_config"], wanted["additional_config"]]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("memory_shares=0.8", "memory_share, policy"),
        ("memory_share", "NAME=VALUE"),
        ("memory_share=7", "at most 1"),
        ("scheduler=lifo", "chameleon, paper, fifo"),
        ("host_bytes=much", "host_bytes=much"),
    ],
)
def test_a_wrong_setting_is_named(given: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vllm-args", given]) == 2
    assert told in capsys.readouterr().err


def test_no_settings_are_the_defaults() -> None:
    assert parse_settings([]) == PagedSettings()
