"""One engine, no Ray: vLLM's adapter slots, adapters in KV memory, and the base model alone, side by side.

Each is a fresh engine in a process of its own, one after the other, with the same KV cache, prompts and output lengths.
``chameleon bench engine`` prints tokens per second of each case, then how a long base-model stream fares while adapters
rotate through memory that holds a fifth of them (``churn``).
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from chameleon_ray.demo import make_demo
from chameleon_ray.engine.paged.options import PagedSettings, paged_arguments

MIB = 1 << 20
KV_BYTES = 512 * MIB
PROMPT_TOKENS, OUTPUT_TOKENS = 16, 16
MAX_MODEL_LEN = 512
MODES = ("stock", "paged", "base")
STOCK_SLOTS = 8
NUM_CHURNED, NUM_HELD = 100, 20


@dataclass(frozen=True, slots=True)
class Case:
    """num_requests at once, request i with adapter i modulo num_adapters; warm: the adapters were used just before."""

    name: str
    num_requests: int
    num_adapters: int
    warm: bool


CASES = (
    Case("64/64 cold", 64, 64, False),
    Case("64/64 warm", 64, 64, True),
    Case("32/8 warm", 32, 8, True),
    Case("200/200", 200, 200, False),
)
"""In this order on a fresh engine, so that the cold case is cold."""


def run(
    json_path: Path | None,
    *,
    threads: int | None = None,
    modes: Sequence[str] = MODES,
    repeats: int = 3,
    dtype: str = "float32",
    prompt_tokens: int = PROMPT_TOKENS,
) -> int:
    """Measure and print; exit status 0. threads: compute threads, default all cores. dtype: of weights, activations and
    KV cache; ``auto`` is vLLM's choice: bfloat16, which is slow on a CPU without instructions for it.
    prompt_tokens: their length; ``churn`` keeps its own. Raises ValueError where no room is left for the answers."""
    if not 0 < prompt_tokens <= MAX_MODEL_LEN - OUTPUT_TOKENS:
        raise ValueError(f"prompts of {prompt_tokens} tokens: give 1 to {MAX_MODEL_LEN - OUTPUT_TOKENS}")
    threads = threads or os.cpu_count() or 1
    demo = make_demo(Path("demo"))
    with tempfile.TemporaryDirectory() as folder:
        adapters = _many_adapters(demo.adapters, Path(folder))
        rates = {
            mode: _child(
                ["rates", mode, str(demo.model), str(adapters), str(repeats), dtype, str(prompt_tokens)], threads
            )
            for mode in modes
        }
        churn = (
            _child(["churn", "paged", str(demo.model), str(adapters), "1", dtype, str(PROMPT_TOKENS)], threads)
            if "paged" in modes
            else None
        )
    rows = [
        {"case": case.name, **{f"{mode}_tok_s": round(rates[mode][case.name], 1) for mode in modes}}
        for case in sorted(CASES, key=lambda case: case.num_requests)
    ]
    print(
        f"\nTokens per second, {prompt_tokens} in and {OUTPUT_TOKENS} out a request, {dtype}, {threads} threads, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    print(f"{'requests/adapters':<20}" + "".join(f"{mode:>10}" for mode in modes) + "   paged is")
    for row in rows:
        values = [row[f"{mode}_tok_s"] for mode in modes]
        print(f"{row['case']:<20}" + "".join(f"{value:>10.0f}" for value in values) + "   " + _ratios(row))
    if churn is not None:
        print(
            f"\nBase-model stream beside {NUM_CHURNED} adapters in memory for {NUM_HELD}: P99 between tokens "
            f"{churn['churn_p99_ms']:.1f} ms, {churn['still_p99_ms']:.1f} ms beside adapters that stay "
            f"({churn['churn_p99_ms'] / churn['still_p99_ms']:.2f}x)"
        )
    if json_path is not None:
        json_path.write_text(
            json.dumps(
                {"rows": rows, "churn": churn, "dtype": dtype, "threads": threads, "prompt_tokens": prompt_tokens},
                indent=2,
            )
            + "\n"
        )
    return 0


def _ratios(row: dict[str, Any]) -> str:
    paged = row.get("paged_tok_s")
    others = [mode for mode in ("stock", "base") if row.get(f"{mode}_tok_s")]
    return ", ".join(f"{paged / row[f'{mode}_tok_s']:.2f}x {mode}" for mode in others) if paged else ""


def _many_adapters(demo: Path, folder: Path) -> Path:
    """200 adapters of the demo's ranks; their files are the demo's, linked, so that they take no room on disk."""
    sources = sorted(demo.iterdir(), key=lambda source: source.name[-2:])
    for i in range(max(case.num_adapters for case in CASES)):
        target = folder / f"adapter-{i:03d}"
        target.mkdir()
        for file in sources[i % len(sources)].iterdir():
            (target / file.name).symlink_to(file)
    return folder


def _child(arguments: list[str], threads: int) -> dict[str, float]:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    with tempfile.NamedTemporaryFile("r", suffix=".json") as result:
        command = [sys.executable, "-m", "chameleon_ray.bench.engine", *arguments, result.name]
        print(f"running {' '.join(arguments[:2])} ...", flush=True)
        subprocess.run(command, env=environment, check=True)
        measured: dict[str, float] = json.load(result)
        return measured


def _engine_arguments(mode: str, model: str, dtype: str, kv_bytes: int) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 64,
        "kv_cache_memory_bytes": kv_bytes,
        "enforce_eager": True,
        "enable_prefix_caching": True,
    }
    if mode == "stock":
        arguments |= {"enable_lora": True, "max_loras": STOCK_SLOTS, "max_lora_rank": 128, "max_cpu_loras": 200}
    elif mode == "paged":
        arguments |= {"enable_lora": True, **paged_arguments(PagedSettings())}
    return arguments


def _prompts(num: int, seed: int, num_tokens: int = PROMPT_TOKENS) -> list[dict[str, list[int]]]:
    rng = random.Random(seed)
    return [{"prompt_token_ids": [rng.randrange(10, 600) for _ in range(num_tokens)]} for _ in range(num)]


def _rates(mode: str, model: str, adapters: str, repeats: int, dtype: str, prompt_tokens: int) -> dict[str, float]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(**_engine_arguments(mode, model, dtype, KV_BYTES))
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    folders = sorted(Path(adapters).iterdir())
    loras = [LoRARequest(folder.name, i + 1, str(folder)) for i, folder in enumerate(folders)]
    llm.generate(_prompts(64, 0), params, use_tqdm=False)
    seed = 0

    def rate(case: Case) -> float:
        nonlocal seed
        seed += 1
        prompts = _prompts(case.num_requests, seed, prompt_tokens)
        wanted = None if mode == "base" else [loras[i % case.num_adapters] for i in range(case.num_requests)]
        began_s = time.perf_counter()
        llm.generate(prompts, params, lora_request=wanted, use_tqdm=False)
        return case.num_requests * OUTPUT_TOKENS / (time.perf_counter() - began_s)

    measured = {}
    for case in CASES:
        if case.warm and mode != "stock":
            rate(case)
        times = 1 if not case.warm or mode == "stock" else repeats
        measured[case.name] = statistics.median(rate(case) for _ in range(times))
    return measured


async def _churn(mode: str, model: str, folders: list[Path], dtype: str) -> dict[str, float]:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    # A demo adapter takes 3.4 MiB on average, half of it in 16 bits; half of the pool is the adapters' share.
    kv_bytes = 2 * NUM_HELD * 7 * MIB // (2 if dtype == "float32" else 4)
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**_engine_arguments(mode, model, dtype, kv_bytes)))
    loras = [LoRARequest(f.name, i + 1, str(f)) for i, f in enumerate(folders[:NUM_CHURNED])]
    num_requests = 0

    async def generate(prompt: Any, lora: Any, max_tokens: int) -> list[float]:
        nonlocal num_requests
        num_requests += 1
        params = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        times: list[float] = []
        async for _ in engine.generate(prompt, params, f"r{num_requests}", lora_request=lora):
            times.append(time.perf_counter())
        return times

    async def p99_ms(num_adapters: int, seed: int) -> float:
        prompts = _prompts(1000, seed)
        stop = asyncio.Event()

        async def client(number: int) -> None:
            i = number
            while not stop.is_set():
                await generate(prompts[i % len(prompts)], loras[i % num_adapters], 4)
                i += 4

        clients = [asyncio.create_task(client(number)) for number in range(4)]
        times = await generate(prompts[-1], None, 450)
        stop.set()
        await asyncio.gather(*clients)
        gaps = sorted(after - before for before, after in pairwise(times[20:]))
        return 1000 * gaps[int(0.99 * len(gaps))]

    try:
        await p99_ms(8, 1)
        still, churned = [], []
        for seed in range(3):
            still.append(await p99_ms(8, 10 + seed))
            churned.append(await p99_ms(NUM_CHURNED, 20 + seed))
    finally:
        engine.shutdown()
    return {"still_p99_ms": statistics.median(still), "churn_p99_ms": statistics.median(churned)}


def _main() -> None:
    parser = argparse.ArgumentParser(description="one engine's measurements, for the parent process")
    for name in ("what", "mode", "model", "adapters", "repeats", "dtype", "prompt_tokens", "result"):
        parser.add_argument(name)
    given = parser.parse_args()
    if given.what == "rates":
        measured = _rates(
            given.mode, given.model, given.adapters, int(given.repeats), given.dtype, int(given.prompt_tokens)
        )
    else:
        measured = asyncio.run(_churn(given.mode, given.model, sorted(Path(given.adapters).iterdir()), given.dtype))
    Path(given.result).write_text(json.dumps(measured))


if __name__ == "__main__":
    _main()
