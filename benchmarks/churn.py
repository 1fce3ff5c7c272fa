"""How a long base-model stream fares while adapters rotate through memory that holds a fifth of them.

One engine with adapters in KV memory, in this process. Printed: the stream's P99 time between tokens, beside adapters
that stay in memory and beside 100 that take turns.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.engine import MIB, engine_arguments, engine_environment, prompts
from chameleon_ray.random_demo import link_adapters, make_random_demo

NUM_CHURNED, NUM_HELD = 100, 20


def run(dtype: str, threads: int, json_path: Path | None) -> None:
    """Measure and print."""
    os.environ |= engine_environment(threads)
    demo = make_random_demo()
    with tempfile.TemporaryDirectory() as folder:
        adapters = link_adapters(demo, Path(folder), NUM_CHURNED)
        found = asyncio.run(_churn(str(demo.model), [adapter.path for adapter in adapters.values()], dtype))
    print(
        f"base-model stream beside {NUM_CHURNED} adapters in memory for {NUM_HELD}: P99 between tokens "
        f"{found['churn_p99_ms']:.1f} ms, {found['still_p99_ms']:.1f} ms beside adapters that stay "
        f"({found['churn_p99_ms'] / found['still_p99_ms']:.2f}x)"
    )
    if json_path is not None:
        json_path.write_text(json.dumps(found | {"dtype": dtype, "threads": threads}, indent=2) + "\n")


async def _churn(model: str, folders: list[Path], dtype: str) -> dict[str, float]:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    # A demo adapter takes 3.4 MiB on average, half of it in 16 bits; half of the pool is the adapters' share.
    kv_bytes = 2 * NUM_HELD * 7 * MIB // (2 if dtype == "float32" else 4)
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_arguments("paged", model, dtype, kv_bytes)))
    loras = [LoRARequest(f.name, i + 1, str(f)) for i, f in enumerate(folders)]
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
        asked = prompts(1000, seed)
        stop = asyncio.Event()

        async def client(number: int) -> None:
            i = number
            while not stop.is_set():
                await generate(asked[i % len(asked)], loras[i % num_adapters], 4)
                i += 4

        clients = [asyncio.create_task(client(number)) for number in range(4)]
        times = await generate(asked[-1], None, 450)
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.churn", description=__doc__)
    parser.add_argument("--dtype", default="float32", help="of weights, activations and KV cache (%(default)s)")
    parser.add_argument("--cpu-threads", type=int, default=os.cpu_count(), help="compute threads (all cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    given = parser.parse_args()
    run(given.dtype, given.cpu_threads, given.json)
