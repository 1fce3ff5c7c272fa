"""What this machine's local application costs: start-up, memory, overhead per request, streaming throughput.

Everything goes through the real path over HTTP on loopback. The first three are measured with the configuration's own
engines, the throughput with engines that generate at once (``deployments.instant``), so that the path is the limit.
"""

import concurrent.futures
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from chameleon_ray.launcher import Launcher, LaunchError

NUM_REQUESTS = 300
NUM_STREAMS = 16
TOKENS_PER_STREAM = 4000
PERCENTILES = (50, 99)
REPORT_S = 1.5
"""Longer than a replica takes to report, and the ingress to hear of it."""
IDLE_PERCENT, SETTLE_S, SETTLE_LIMIT_S = 20.0, 3.0, 60.0


def run(config: Path, json_path: Path | None, say: Callable[[str], None] = print) -> int:
    """Measure, print a table, optionally write it as JSON; the exit status."""
    measured: dict[str, float] = {}
    say(f"1/2 the application of {config}")
    with _running(config, say) as (launcher, began_s):
        models = _models(launcher.url)
        _request(launcher.url, models[-1])
        measured["start_to_first_token_s"] = time.monotonic() - began_s
        measured["memory_pss_gib"] = _memory_gib()
        _settle(say)
        in_turn = _adapter_of_each_replica(launcher.url, models[1:])
        for name, asked in (("base", models[:1]), ("adapter", models[-1:]), ("adapters_in_turn", in_turn)):
            measured |= {f"{name}_{key}": value for key, value in _overhead(launcher.url, asked, say).items()}
    say("2/2 the same with engines that generate at once")
    with tempfile.TemporaryDirectory() as folder, _running(_instant(config, Path(folder)), say) as (launcher, _):
        measured["streamed_tokens_s"] = _throughput(launcher.url, _models(launcher.url)[-1])
    say("")
    for name, value in measured.items():
        say(f"{name:28} {value:10.1f}")
    if json_path is not None:
        json_path.write_text(json.dumps(measured, indent=2) + "\n")
    return 0


@contextmanager
def _running(config: Path, say: Callable[[str], None]) -> Iterator[tuple[Launcher, float]]:
    began_s = time.monotonic()
    launcher = Launcher(config, say)
    try:
        if not launcher.start():
            raise LaunchError("interrupted")
        yield launcher, began_s
    finally:
        launcher.stop()


def _instant(config: Path, folder: Path) -> Path:
    """The same configuration with instant engines; relative paths still mean the current folder."""
    settings = yaml.safe_load(config.read_text())
    settings["applications"][0]["import_path"] = "deployments.instant:build"
    path = folder / "instant.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def _models(url: str) -> list[str]:
    return [card["id"] for card in httpx.get(f"{url}/v1/models").raise_for_status().json()["data"]]


def _request(url: str, model: str) -> None:
    body = {"model": model, "prompt": "Hello", "max_tokens": 1}
    httpx.post(f"{url}/v1/completions", json=body, timeout=120.0).raise_for_status()


def _memory_gib() -> float:
    """Proportional set size of everything this process has started: shared pages count once."""
    return sum(_pss(process) for process in psutil.Process().children(recursive=True)) / 2**30


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.NoSuchProcess:
        return 0


def _settle(say: Callable[[str], None]) -> None:
    """Wait until the machine is idle: after "ready" Ray's own processes go on starting, and take the cores for it."""
    idle_s, limit_s = 0.0, time.monotonic() + SETTLE_LIMIT_S
    while idle_s < SETTLE_S and time.monotonic() < limit_s:
        idle_s = idle_s + 1.0 if psutil.cpu_percent(interval=1.0) < IDLE_PERCENT else 0.0
    if idle_s < SETTLE_S:
        say("     the machine does not become idle: latencies include what else it does")


def _adapter_of_each_replica(url: str, adapters: list[str]) -> list[str]:
    """One adapter for each replica, which it alone has in its GPU memory (a CPU replica's KV memory)."""
    for adapter in adapters:
        _request(url, adapter)
        time.sleep(REPORT_S)
        held = _held(url)
        alone = [own - set().union(*(other for other in held if other is not own)) for own in held]
        if all(alone):
            return [min(own) for own in alone]
    raise RuntimeError(f"{len(adapters)} adapters, requested one after the other, did not reach every replica: {held}")


def _held(url: str) -> list[set[str]]:
    """The adapters in each replica's GPU memory."""
    placement = httpx.get(f"{url}/v1/chameleon/placement").raise_for_status().json()
    return [{name for name, tier in one["adapters"].items() if tier == "gpu"} for one in placement["replicas"]]


def _overhead(url: str, models: list[str], say: Callable[[str], None]) -> dict[str, float]:
    """Client's latency less the engine's own time for the very same request (Server-Timing), in milliseconds; the
    models are asked in turn."""
    bodies = itertools.cycle({"model": model, "prompt": "Hello", "max_tokens": 1} for model in models)
    total, overhead = [], []
    with httpx.Client(base_url=url, timeout=120.0) as client:
        for number in range(NUM_REQUESTS + NUM_REQUESTS // 10):
            body = next(bodies)
            began_s = time.perf_counter()
            answer = client.post("/v1/completions", json=body).raise_for_status()
            seconds = time.perf_counter() - began_s
            if number < NUM_REQUESTS // 10:
                continue  # connections and caches warm up
            total.append(seconds * 1e3)
            overhead.append(seconds * 1e3 - float(answer.headers["server-timing"].partition("dur=")[2]))
    median, around = statistics.median(total), statistics.median(overhead)
    say(f"     {', '.join(models)}: {median:.1f} ms a request, {around:.1f} ms of it around the engine")
    return {f"overhead_p{p}_ms": _percentile(overhead, p) for p in PERCENTILES}


def _percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _throughput(url: str, model: str) -> float:
    """Tokens per second over concurrent streams."""
    began_s = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(NUM_STREAMS) as pool:
        tokens = sum(pool.map(lambda _: _stream(url, model), range(NUM_STREAMS)))
    return tokens / (time.perf_counter() - began_s)


def _stream(url: str, model: str) -> int:
    body: dict[str, Any] = {"model": model, "prompt": "Hello", "max_tokens": TOKENS_PER_STREAM, "stream": True}
    tokens, ended = 0, False
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120.0) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            ended |= line == "data: [DONE]"
            tokens += line.startswith("data: {")
    if not ended or tokens != TOKENS_PER_STREAM:
        raise RuntimeError(f"a stream ended after {tokens} of {TOKENS_PER_STREAM} tokens")
    return tokens
