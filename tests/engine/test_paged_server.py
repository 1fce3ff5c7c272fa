"""vLLM's own server with our options, without Ray, on two tensor-parallel ranks: the README's line, as a process."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from engine_harness import MIB, SETTINGS, Reference

from chameleon_ray.demo import DemoPaths

STARTUP_DEADLINE_S = 600.0
PROMPTS = ("Hello, my name is", "What is the capital of France?")


@pytest.fixture(scope="module")
def server(demo: DemoPaths, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = [f"{name}={json.dumps(value)}" for name, value in asdict(SETTINGS).items()]
    names = demo.adapter_names()[:13]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(demo.model), "--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "32"),
        *("--kv-cache-memory-bytes", str(32 * MIB), "--tensor-parallel-size", "2", "--enable-lora"),
        "--lora-modules",
        *(f"{name}={demo.adapters / name}" for name in names),
    ]
    chameleon = shlex.join([str(Path(sys.executable).with_name("chameleon")), "vllm-args", *given])
    line = f"exec {shlex.join(command)} $({chameleon})"
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["sh", "-c", line], env=environment, stdout=output, stderr=output, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_up(url, process, log)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=300)


def _wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + STARTUP_DEADLINE_S
    while True:
        assert process.poll() is None and time.monotonic() < deadline_s, log.read_text()[-5000:]
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)


def _complete(url: str, model: str, prompt: str, num_tokens: int = 8) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    body["return_token_ids"] = True
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two tensor-parallel ranks need two cores")
def test_two_ranks_answer_as_merged_weights_do(server: str, demo: DemoPaths, reference: Reference) -> None:
    wanted = [*demo.adapter_names()[:13], None, None]
    expected = [reference.tokens(PROMPTS[i % 2], name, 8) for i, name in enumerate(wanted)]
    for _ in range(2):  # Again from what is cached, evicted and loaded by now: the pool holds about half of them.
        with ThreadPoolExecutor(len(wanted)) as clients:
            answers = list(
                clients.map(
                    lambda i: _complete(server, wanted[i] or "demo", PROMPTS[i % 2])["choices"][0]["token_ids"],
                    range(len(wanted)),
                )
            )
        assert [tuple(answer) for answer in answers] == expected
    with urllib.request.urlopen(f"{server}/metrics", timeout=600) as response:
        assert "vllm:lora_requests_info" in response.read().decode()
