"""``chameleon bench schedulers`` on two real engines, small; and what the policy says at vLLM's /metrics."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
from prometheus_client import REGISTRY, Counter, Gauge, Histogram, generate_latest

from chameleon_ray.bench.compare.state import parse_state
from chameleon_ray.demo import DemoPaths
from chameleon_ray.engine.paged.connector import PagedConnector

LIMIT_S = 400.0
UNLIMITED = 1 << 62


def test_two_schedulers_are_compared_on_real_engines(demo: DemoPaths, tmp_path: Path) -> None:
    """A whole run: servers, learning, three loads, the engines' own queueing delays, the policies' states, the end."""
    file = tmp_path / "figures.json"
    options = {"schedulers": "chameleon,fifo", "demo": demo.model.parent, "adapters": 10, "context-window": 256}
    options |= {"rates": "6,8,10", "num-windows": 1, "window-s": 4, "learn-s": 6, "kv-mib": 32, "json": file}
    command = [sys.executable, "-m", "chameleon_ray.cli", "bench", "schedulers"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads(file.read_text())
    assert results["complete"]
    loads = results["loads"]
    assert [(load["level"], load["target"]) for load in loads] == [
        (level, name) for level in ("low", "medium", "overload") for name in ("chameleon", "fifo")
    ]
    for load in loads:
        assert load["requests"] > 0 and load["failed"] == 0 and load["short_answers"] == 0
        assert load["policy_totals"]["admissions"] >= load["requests"]
        assert load["squash_share"] <= 0.05
        assert 0 <= load["queued"]["mean_ms"] <= load["ttft"]["mean_ms"]
    assert all(load["queues"] == "one queue" for load in loads if load["target"] == "fifo")
    assert any("queues by size" in load["queues"] for load in loads if load["target"] == "chameleon"), done.stdout
    assert not [process for process in psutil.process_iter(["cmdline"]) if str(file) in (process.info["cmdline"] or [])]


def test_vllms_metrics_show_the_policy() -> None:
    labels = {0: ["demo", "0"]}
    types = {Gauge: Gauge, Counter: Counter, Histogram: Histogram}
    config: Any = type("Config", (), {"kv_transfer_config": None})()
    shown = PagedConnector.build_prom_metrics(config, types, ["model_name", "engine"], labels)
    assert shown is not None

    def queue(max_size: float, quota_tokens: int) -> dict[str, Any]:
        return {"max_size": max_size, "quota_tokens": quota_tokens, "max_running": 7}

    def report(squashes: int, *queues: dict[str, Any]) -> dict[str, Any]:
        names = ("num_admissions", "num_bypasses", "num_refreshes")
        state = {"queues": queues, "num_squashes": squashes, **dict.fromkeys(names, 20)}
        return {"queues": state, "cache": {"hits": 5, "misses": 6}}

    shown.observe({})
    shown.observe(report(2, queue(0.25, 300), queue(0.5, 200), queue(float("inf"), 100)))
    state = parse_state(generate_latest(REGISTRY).decode())
    assert (state.cutoffs, state.quotas, state.seats) == ((0.25, 0.5), (300, 200, 100), (7, 7, 7))
    assert (state.totals["squashes"], state.totals["adapter_misses"]) == (2, 6)
    shown.observe(report(3, queue(float("inf"), UNLIMITED)))
    state = parse_state(generate_latest(REGISTRY).decode())
    assert (state.cutoffs, state.quotas, state.totals["squashes"]) == ((), (0,), 3)


def test_under_ray_the_replica_publishes_by_itself() -> None:
    class RayGauge:
        pass

    config: Any = type("Config", (), {"kv_transfer_config": None})()
    assert PagedConnector.build_prom_metrics(config, {Gauge: RayGauge, Counter: RayGauge}, [], {}) is None
