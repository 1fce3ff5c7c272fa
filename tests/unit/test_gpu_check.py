"""The logic of ``make gpu-check``, on the CPU: what it runs, what it makes of parts that fail, and its verdict."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check


def figures(tokens: dict[str, list[int]]) -> dict[str, Any]:
    return {"tokens": tokens, "tokens_per_s": 10.0, "first_use_ms": 3.0, "second_use_ms": 2.0, "gap_p99_ms": 1.0}


def script(code: str, **more: Any) -> Any:
    return gpu_check.Part("p", [sys.executable, "-c", f"import sys\n{code}"], 0.1, **more)


def test_a_part_that_fails_hangs_or_cannot_run_is_told_and_ends_no_other(tmp_path: Path) -> None:
    good = script("open(sys.argv[1], 'w').write('{\"a\": 1}')")
    assert gpu_check.run(good, tmp_path, 60).figures == {"a": 1}
    broken = gpu_check.run(script("raise ValueError('no such kernel')"), tmp_path, 60)
    assert broken.status == "failed" and "ValueError: no such kernel" in broken.detail
    silent = gpu_check.run(script("pass"), tmp_path, 60)
    assert silent.status == "failed", "an exit status of 0 without figures shows nothing"
    assert gpu_check.run(script("import time; time.sleep(600)"), tmp_path, 0.5).status == "timed out"
    absent = gpu_check.run(script("", needs=["no_such_module"]), tmp_path, 60)
    assert (absent.status, absent.detail) == ("not run", "no_such_module is not installed")


def test_an_engine_with_other_tokens_than_stock_has_failed() -> None:
    stock = gpu_check.Result("engine_stock", "ok", figures=figures({"a": [1, 2], "b": [3]}))
    same = gpu_check.Result("engine_slots", "ok", figures=figures({"a": [1, 2], "b": [3]}))
    other = gpu_check.Result("engine_paged", "ok", figures=figures({"a": [1, 2], "b": [4]}))
    gpu_check.judge([stock, same, other])
    assert (stock.status, same.status, other.status) == ("ok", "ok", "failed")
    assert other.detail == "other tokens than stock for b"

    alone = gpu_check.Result("engine_paged", "ok", figures=figures({"a": [1]}))
    gpu_check.judge([gpu_check.Result("engine_stock", "timed out"), alone])
    assert alone.status == "failed" and "nothing to compare with" in alone.detail


def test_the_check_succeeds_only_when_every_part_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.dumps(figures({"a": [1]}))
    good = script(f"open(sys.argv[1], 'w').write({content!r})")
    for last, status in ((good, 0), (script("sys.exit(3)"), 1)):
        monkeypatch.setattr(gpu_check, "parts", lambda device, last=last: [good, last])
        assert gpu_check.check("cpu", tmp_path, 20.0, say=lambda line: None) == status
        report = json.loads((tmp_path / "gpu_check.json").read_text())
        assert [one["status"] for one in report["parts"]] == ["ok", "ok" if status == 0 else "failed"]
        assert report["machine"].keys() >= {"device", "torch", "vllm"}
        assert (tmp_path / "gpu_check.md").read_text().count("| p |") == 2


def test_its_parts_fit_into_the_time_and_the_kernels_need_no_vllm() -> None:
    parts = gpu_check.parts("cuda")
    assert sum(part.share for part in parts) == pytest.approx(1.0)
    assert [part.name for part in parts if not part.needs] == ["kernels", "kernel_speed"]
    assert {part.name for part in parts} >= {"engine_stock", "engine_slots", "engine_paged"}


def test_the_kernels_part_runs_here(tmp_path: Path) -> None:
    [kernels] = [part for part in gpu_check.parts("cpu") if part.name == "kernels"]
    result = gpu_check.run(kernels, tmp_path, 300)
    assert (result.status, result.figures) == ("ok", {"checked": ["float32", "bfloat16"]}), result.detail
    assert gpu_check.summary(result) == {"checked": "float32, bfloat16"}
