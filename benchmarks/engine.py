"""One engine, no Ray: vLLM as it comes, its slots under our policy, adapters in KV memory, the base model alone.

Each is a fresh engine in a process of its own, one after the other, with the same KV cache, prompts and output lengths.
Printed: tokens per second of each case.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chameleon_ray.engine.environment import cpu_environment
from chameleon_ray.engine.paged.options import PagedSettings, paged_arguments
from chameleon_ray.engine.slots.options import slots_arguments
from chameleon_ray.random_demo import link_adapters, make_random_demo

if TYPE_CHECKING:
    from vllm.inputs import TokensPrompt

MIB = 1 << 20
KV_BYTES = 512 * MIB
PROMPT_TOKENS, OUTPUT_TOKENS = 16, 16
MAX_MODEL_LEN = 512
MODES = ("stock", "slots", "paged", "base")
STOCK_SLOTS = 8
REPEATS = 3
_SLOW = ("stock", "slots")
"""vLLM's CPU kernels compute these: no repeats."""


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


def run(json_path: Path | None, dtype: str, prompt_tokens: int) -> None:
    """Measure and print.

    dtype: of weights, activations and KV cache; ``auto`` is vLLM's choice, bfloat16, which is slow on a CPU without
    instructions for it. prompt_tokens: their length.
    """
    threads = os.cpu_count() or 1
    demo = make_random_demo()
    with tempfile.TemporaryDirectory() as folder:
        adapters = link_adapters(demo, Path(folder), max(case.num_adapters for case in CASES))
        folders = [str(adapter.path) for adapter in adapters.values()]
        rates = {mode: _child([mode, str(demo.model), folders, dtype, prompt_tokens], threads) for mode in MODES}
    rows = [
        {"case": case.name, **{f"{mode}_tok_s": round(rates[mode][case.name], 1) for mode in MODES}}
        for case in sorted(CASES, key=lambda case: case.num_requests)
    ]
    print(
        f"\nTokens per second, {prompt_tokens} in and {OUTPUT_TOKENS} out a request, {dtype}, {threads} threads, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    print(f"{'requests/adapters':<20}" + "".join(f"{mode:>10}" for mode in MODES) + "   paged is")
    for row in rows:
        values = [row[f"{mode}_tok_s"] for mode in MODES]
        print(f"{row['case']:<20}" + "".join(f"{value:>10.0f}" for value in values) + "   " + _ratios(row))
    if json_path is not None:
        figures = {"rows": rows, "dtype": dtype, "threads": threads, "prompt_tokens": prompt_tokens}
        json_path.write_text(json.dumps(figures, indent=2) + "\n")


def _ratios(row: dict[str, Any]) -> str:
    paged = row.get("paged_tok_s")
    others = [mode for mode in ("stock", "slots", "base") if row.get(f"{mode}_tok_s")]
    return ", ".join(f"{paged / row[f'{mode}_tok_s']:.2f}x {mode}" for mode in others) if paged else ""


def engine_environment(threads: int) -> dict[str, str]:
    """More of it for a process with a CPU engine of so many compute threads."""
    return cpu_environment(threads) | {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


def _child(task: list[Any], threads: int) -> dict[str, float]:
    with tempfile.NamedTemporaryFile("r", suffix=".json") as result:
        command = [sys.executable, "-m", "benchmarks.engine", "--child", json.dumps(task), result.name]
        print(f"running {task[0]} ...", flush=True)
        subprocess.run(command, env=os.environ | engine_environment(threads), check=True)
        measured: dict[str, float] = json.load(result)
        return measured


def engine_arguments(
    mode: str, model: str, dtype: str, kv_bytes: int, *, num_slots: int = STOCK_SLOTS
) -> dict[str, Any]:
    """vLLM's arguments for an engine in one of ``MODES``."""
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
        arguments |= {"enable_lora": True, "max_loras": num_slots, "max_lora_rank": 128, "max_cpu_loras": 200}
    elif mode == "slots":
        arguments |= {"enable_lora": True, **slots_arguments(num_slots, 128)}
    elif mode == "paged":
        arguments |= {"enable_lora": True, **paged_arguments(PagedSettings())}
    return arguments


def prompts(num: int, seed: int, num_tokens: int = PROMPT_TOKENS) -> list["TokensPrompt"]:
    """Prompts of random tokens."""
    rng = random.Random(seed)
    return [{"prompt_token_ids": [rng.randrange(10, 600) for _ in range(num_tokens)]} for _ in range(num)]


def _rates(mode: str, model: str, folders: list[str], dtype: str, prompt_tokens: int) -> dict[str, float]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(**engine_arguments(mode, model, dtype, KV_BYTES))
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    loras = [LoRARequest(Path(folder).name, i + 1, folder) for i, folder in enumerate(folders)]
    llm.generate(prompts(64, 0), params, use_tqdm=False)
    seed = 0

    def rate(case: Case) -> float:
        nonlocal seed
        seed += 1
        asked = prompts(case.num_requests, seed, prompt_tokens)
        wanted = None if mode == "base" else [loras[i % case.num_adapters] for i in range(case.num_requests)]
        began_s = time.perf_counter()
        llm.generate(asked, params, lora_request=wanted, use_tqdm=False)
        return case.num_requests * OUTPUT_TOKENS / (time.perf_counter() - began_s)

    measured = {}
    for case in CASES:
        if case.warm and mode not in _SLOW:
            rate(case)
        times = 1 if not case.warm or mode in _SLOW else REPEATS
        measured[case.name] = statistics.median(rate(case) for _ in range(times))
    return measured


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("--dtype", default="float32", help="of weights, activations and KV cache (%(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS, help="length of the prompts (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--child", nargs=2, metavar=("TASK", "FILE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        Path(given.child[1]).write_text(json.dumps(_rates(*json.loads(given.child[0]))))
    elif not 0 < given.prompt_tokens <= MAX_MODEL_LEN - OUTPUT_TOKENS:
        parser.error(f"prompts of {given.prompt_tokens} tokens: give 1 to {MAX_MODEL_LEN - OUTPUT_TOKENS}")
    else:
        run(given.json, given.dtype, given.prompt_tokens)
