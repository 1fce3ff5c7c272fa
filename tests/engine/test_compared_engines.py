"""``benchmarks.schedulers`` on two real engines, small; and what the policy says at vLLM's /metrics."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from prometheus_client import REGISTRY, Counter, Gauge, Histogram, generate_latest

from benchmarks.state import parse_state
from chameleon_ray.demo import DemoPaths
from chameleon_ray.engine.paged.connector import PagedConnector
from chameleon_ray.engine.report import WAITING_FOR, MemoryLimits
from chameleon_ray.policy.admission import QueuesState, QueueState
from chameleon_ray.policy.cache import AdapterCache
from chameleon_ray.policy.cache_types import CacheConfig
from chameleon_ray.policy.disciplines import UNLIMITED
from chameleon_ray.predictor.lengths import PredictionAccuracy

LIMIT_S = 1200.0
ROOT = Path(__file__).parents[2]


def test_two_schedulers_are_compared_on_real_engines(demo: DemoPaths, tmp_path: Path) -> None:
    """A whole run: servers, learning, three loads, the engines' own queueing delays, the policies' states, the end."""
    file = tmp_path / "figures.json"
    options = {"schedulers": "chameleon,fifo", "demo": demo.model.parent, "adapters": 10, "max-model-len": 256}
    options |= {
        "rates": "12,16,20",
        "num-windows": 1,
        "window-s": 2,
        "learn-s": 3,
        "kv-cache-gib": 0.03125,
        "json": file,
    }
    command = [sys.executable, "-m", "benchmarks.schedulers"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads(file.read_text())
    assert results["complete"]
    loads = results["loads"]
    assert [(load["level"], load["target"]) for load in loads] == [
        (level, name) for level in ("low", "medium", "overload") for name in ("chameleon", "fifo")
    ]
    for load in loads:
        assert load["requests"] > 0 and not load["errors"] and load["short_answers"] == 0, load["error_examples"]
        totals = load["policy_totals"]
        assert totals["admissions"] >= load["requests"]
        assert load["squash_share"] == totals["squashes"] / totals["admissions"]
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

    def report(squashes: int, *queues: tuple[float, int]) -> dict[str, Any]:
        """``AdapterStats.data`` with queues of (largest size, quota)."""
        cache = asdict(AdapterCache(CacheConfig(max_blocks=4, adapter_host_bytes=4000)).stats())
        states = [QueueState(size, 0, 0, 0, 7, quota, 0) for size, quota in queues]
        state = QueuesState(tuple(states), 0, 1.0, 20, 20, num_squashes=squashes, num_refreshes=20, num_holds=0)
        return {
            "cache": {**cache, "evictions": {"load": 4}, "misses": 6},
            "queues": asdict(state),
            "predictions": asdict(PredictionAccuracy().snapshot()),
            "limits": asdict(MemoryLimits(500, 4, 8, 4000)),
            "waiting": dict.fromkeys(WAITING_FOR, 1),
            "oldest_waiting_s": 0.5,
            "num_inspection_failures": 3,
        }

    def value(name: str, **labels: str) -> float | None:
        return REGISTRY.get_sample_value(name, {"model_name": "demo", "engine": "0", **labels})

    shown.observe({})
    shown.observe(report(2, (0.25, 300), (0.5, 200), (float("inf"), 100)))
    state = parse_state(generate_latest(REGISTRY).decode())
    assert (state.cutoffs, state.quotas, state.seats) == ((0.25, 0.5), (300, 200, 100), (7, 7, 7))
    assert (state.totals["squashes"], state.totals["adapter_misses"]) == (2, 6)
    assert value("chameleon_adapter_evictions_total", reason="load") == 4
    assert value("chameleon_adapter_load_failures_total", stage="inspection") == 3
    assert value("chameleon_waiting_requests", reason="turn") == 1 and value("chameleon_queues") == 3
    shown.observe(report(3, (float("inf"), UNLIMITED)))
    state = parse_state(generate_latest(REGISTRY).decode())
    assert (state.cutoffs, state.quotas, state.totals["squashes"]) == ((), (0,), 3)
    assert value("chameleon_adapter_evictions_total", reason="load") == 4
    assert value("chameleon_queue_cutoff", queue="2") is None


def test_under_ray_the_replica_publishes_by_itself() -> None:
    class RayGauge:
        pass

    config: Any = type("Config", (), {"kv_transfer_config": None})()
    assert PagedConnector.build_prom_metrics(config, {Gauge: RayGauge, Counter: RayGauge}, [], {}) is None
