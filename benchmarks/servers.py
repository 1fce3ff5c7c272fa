"""vLLM's own OpenAI servers on loopback, one per engine to compare, in processes that end with this one's block."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from chameleon_ray.bench.load.errors import LoadError
from chameleon_ray.bench.load.targets import Target
from chameleon_ray.engine.environment import cpu_environment
from chameleon_ray.engine.paged.options import PagedSettings, paged_words
from chameleon_ray.redis_server import free_port, tied

START_LIMIT_S = 600.0
STOP_LIMIT_S = 15.0
LAST_LINES = 30
MODEL_NAME = "demo"
STOCK_SLOTS = 8
"""vLLM's adapter slots in memory where nothing else is asked for, as in ``engine.py``."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine of a comparison. settings: of adapters in KV memory; None: vLLM as it comes, slots and FCFS."""

    name: str
    settings: PagedSettings | None


@dataclass(frozen=True, slots=True)
class Machine:
    """What all engines of a comparison have alike.

    kv_cache_bytes: KV pool. max_num_seqs: requests at once. cpu_threads: compute threads of an engine.
    """

    model: Path
    adapters: Mapping[str, Path]
    kv_cache_bytes: int
    max_num_seqs: int
    max_model_len: int
    max_rank: int
    cpu_threads: int
    dtype: str = "float32"


@contextmanager
def running(engines: Sequence[Engine], machine: Machine, say: Callable[[str], None]) -> Iterator[list[Target]]:
    """The engines' servers while the block runs, ready for requests. Raises LoadError when one does not start."""
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chameleon-bench-")))
        say(f"starting {', '.join(engine.name for engine in engines)} (all at once; about 20 s each on one core)")
        began_s = time.monotonic()
        ports = [free_port() for _ in engines]
        processes = [
            stack.enter_context(_process(command(engine, machine, port), machine.cpu_threads, logs / engine.name))
            for engine, port in zip(engines, ports, strict=True)
        ]
        targets = [Target(engine.name, f"http://127.0.0.1:{port}") for engine, port in zip(engines, ports, strict=True)]
        for target, process in zip(targets, processes, strict=True):
            _wait_ready(target, process, logs / target.name)
            say(f"  {target.name} ready after {time.monotonic() - began_s:.0f} s")
        yield targets


def command(engine: Engine, machine: Machine, port: int) -> list[str]:
    """The command line of an engine's server."""
    options: dict[str, object] = {
        "model": machine.model,
        "served_model_name": MODEL_NAME,
        "host": "127.0.0.1",
        "port": port,
        "dtype": machine.dtype,
        "max_model_len": machine.max_model_len,
        "max_num_seqs": machine.max_num_seqs,
        "kv_cache_memory_bytes": machine.kv_cache_bytes,
    }
    more: list[str] = []
    if engine.settings is None:
        slots = min(STOCK_SLOTS, len(machine.adapters))
        options |= {"max_loras": slots, "max_lora_rank": machine.max_rank, "max_cpu_loras": len(machine.adapters)}
    else:
        more = paged_words(engine.settings)
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", "--enable-lora"]
    words += ["--enable-per-request-metrics", "--disable-uvicorn-access-log"]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return [*words, *more, "--lora-modules", *(f"{name}={path}" for name, path in machine.adapters.items())]


@contextmanager
def _process(words: Sequence[str], threads: int, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A command with all that it starts, which ends with the block whatever happens in it, and with this process."""
    environment = os.environ | cpu_environment(threads) | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as output:
        # A session of its own: Ctrl-C reaches this process alone, which then ends everything in order.
        process = subprocess.Popen(
            tied(words, signal.SIGTERM),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            process.terminate()
            process.wait(STOP_LIMIT_S)
        with contextlib.suppress(ProcessLookupError):  # vLLM's engine and worker processes are in the same group
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_ready(target: Target, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline_s = time.monotonic() + START_LIMIT_S
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{target.url}/health", timeout=5.0).status_code == 200:
                return
        if process.poll() is not None or time.monotonic() > deadline_s:
            lines = log.read_text(errors="replace").splitlines()[-LAST_LINES:]
            raise LoadError("\n".join([f"{target.name} did not start; the end of its log:", *lines]))
        time.sleep(0.25)
