"""One command for a machine with a GPU: what runs there, whether its results are right, and how fast it is.

    make gpu-check        # or: python benchmarks/gpu_check.py [--device cpu] [--minutes 15] [--out build/gpu-check]

Each part is a process of its own with a time limit, so that one that crashes or hangs does not end the others. The
parts ``kernels`` and ``kernel_speed`` need torch and Triton alone; the engine parts also need vLLM. No internet: the
model is random, made on the spot. Writes ``gpu_check.json`` and ``gpu_check.md``; exit status 0 only if every part
has run and every result is right.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

REPO = Path(__file__).parent.parent
ENGINE_MODES = ("stock", "slots", "paged")
NUM_ADAPTERS, NUM_SLOTS = 12, 4
PROMPT_TOKENS, OUTPUT_TOKENS = 24, 24
KV_BYTES = 512 << 20
NUM_TIMED = 6
"""Adapters whose first use is timed, one after the other."""


@dataclass
class Result:
    """What became of a part. status: ok, failed, timed out or not run."""

    part: str
    status: str
    seconds: float = 0.0
    detail: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Part:
    """command: writes its figures as JSON to the file named by its last argument. share: of the time there is."""

    name: str
    command: Sequence[str]
    share: float
    needs: Sequence[str] = ()


def parts(device: str) -> list[Part]:
    """All parts, in the order in which they run."""
    own = [sys.executable, str(Path(__file__).resolve()), "--device", device, "--part"]
    speed = [sys.executable, str(REPO / "kernels/benchmarks/bench_lora.py"), "--device", device, "--json"]
    return [
        Part("kernels", [*own, "kernels"], 0.25),
        Part("kernel_speed", speed, 0.15),
        *(Part(f"engine_{mode}", [*own, f"engine_{mode}"], 0.2, ["vllm"]) for mode in ENGINE_MODES),
    ]


def run(part: Part, folder: Path, limit_s: float) -> Result:
    """Run one part to its end or its limit; its output is in ``folder/NAME.log``."""
    missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if missing:
        return Result(part.name, "not run", detail=f"{', '.join(missing)} is not installed")
    figures, log = folder / f"{part.name}.json", folder / f"{part.name}.log"
    figures.unlink(missing_ok=True)
    paths = os.pathsep.join([str(REPO), str(REPO / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    began_s = time.monotonic()
    with log.open("wb") as output:
        try:
            command = [*part.command, str(figures)]
            status = subprocess.run(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=limit_s
            ).returncode
        except subprocess.TimeoutExpired:
            return Result(part.name, "timed out", time.monotonic() - began_s, f"after {limit_s:.0f} s; see {log}")
    seconds = time.monotonic() - began_s
    if status != 0 or not figures.exists():
        lines = log.read_text(errors="replace").strip().splitlines()
        return Result(part.name, "failed", seconds, f"{lines[-1] if lines else f'exit status {status}'}; see {log}")
    return Result(part.name, "ok", seconds, figures=json.loads(figures.read_text()))


def judge(results: list[Result]) -> None:
    """Fail the engine parts whose tokens are not those of stock vLLM; ``results`` is changed in place."""
    by_name = {result.part: result for result in results}
    stock = by_name.get("engine_stock")
    for mode in ENGINE_MODES[1:]:
        result = by_name.get(f"engine_{mode}")
        if result is None or result.status != "ok":
            continue
        if stock is None or stock.status != "ok":
            result.status, result.detail = "failed", "nothing to compare with: engine_stock did not run"
            continue
        ours, theirs = result.figures["tokens"], stock.figures["tokens"]
        wrong = [name for name in theirs if ours.get(name) != theirs[name]]
        result.figures["same_tokens"] = not wrong
        if wrong:
            result.status, result.detail = "failed", f"other tokens than stock for {', '.join(wrong)}"


def markdown(machine: dict[str, Any], results: list[Result]) -> str:
    """The table for people."""
    lines = ["# GPU check", "", *(f"- {name}: {value}" for name, value in machine.items()), ""]
    lines += ["| part | result | seconds | figures |", "| --- | --- | ---: | --- |"]
    for result in results:
        shown = result.detail or "; ".join(f"{name} {value}" for name, value in summary(result).items())
        lines.append(f"| {result.part} | {result.status} | {result.seconds:.0f} | {shown.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def summary(result: Result) -> dict[str, Any]:
    """The few figures of a part that go into the table."""
    figures = result.figures
    if result.part == "kernels":
        return {"checked": ", ".join(figures["checked"])}
    if result.part == "kernel_speed":
        return {
            row["case"]: f"{row['paged_ms']:.3f} ms = {row['paged_over_floor']:.1f} of the floor, "
            f"padded {row['padded_over_paged']:.1f} times that"
            for row in figures["rows"]
        }
    shown = {"tokens/s": f"{figures['tokens_per_s']:.0f}", "first use": f"{figures['first_use_ms']:.1f} ms"}
    shown |= {"second": f"{figures['second_use_ms']:.1f} ms", "P99 between tokens": f"{figures['gap_p99_ms']:.1f} ms"}
    return shown


def kernels(device: str) -> dict[str, Any]:
    """The kernels' own check in each type. Raises RuntimeError when a result is wrong."""
    import torch
    from chameleon_kernels.testing import self_check

    types = [torch.float32, torch.bfloat16] + ([torch.float16] if device == "cuda" else [])
    for dtype in types:
        self_check(device, dtype)
    return {"checked": [str(dtype).removeprefix("torch.") for dtype in types]}


def engine(mode: str, device: str) -> dict[str, Any]:
    """A small engine in one mode, with CUDA graphs and asynchronous scheduling on a GPU: greedy tokens of adapters of
    all ranks, tokens/s with all at once, time to an adapter's first token at its first and second use, and a
    base-model stream's P99 between tokens (ms) while adapters rotate."""
    import asyncio

    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    from benchmarks.engine import engine_arguments
    from chameleon_ray.random_demo import make_random_demo

    demo = make_random_demo()
    arguments = engine_arguments(mode, str(demo.model), "float32", KV_BYTES, num_slots=NUM_SLOTS)
    arguments |= {"enforce_eager": device == "cpu", "async_scheduling": True}
    names = demo.adapter_names()
    loras = [LoRARequest(name, i + 1, str(demo.adapters / name)) for i, name in enumerate(names)]

    async def measure() -> dict[str, Any]:
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        num_requests = 0

        async def generate(seed: int, lora: Any, max_tokens: int) -> tuple[list[int], list[float]]:
            nonlocal num_requests
            num_requests += 1
            prompt = TokensPrompt(prompt_token_ids=[10 + (seed * 37 + i * 11) % 500 for i in range(PROMPT_TOKENS)])
            params = SamplingParams(
                temperature=0.0, max_tokens=max_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
            )
            tokens: list[int] = []
            times = [time.perf_counter()]
            async for output in llm.generate(prompt, params, f"r{num_requests}", lora_request=lora):
                tokens += output.outputs[0].token_ids
                times.append(time.perf_counter())
            return tokens, times

        async def first_token_ms(seed: int, lora: Any) -> float:
            _, times = await generate(seed, lora, 1)
            return 1e3 * (times[-1] - times[0])

        try:
            await generate(0, None, 4)
            uses = [
                (await first_token_ms(i, one), await first_token_ms(50 + i, one))
                for i, one in enumerate(loras[-NUM_TIMED:])
            ]
            chosen = loras[:NUM_ADAPTERS]
            began_s = time.perf_counter()
            answers = await asyncio.gather(*(generate(100 + i, one, OUTPUT_TOKENS) for i, one in enumerate(chosen)))
            rate = NUM_ADAPTERS * OUTPUT_TOKENS / (time.perf_counter() - began_s)
            long = asyncio.create_task(generate(1, None, 300))
            i = 0
            while not long.done():
                await generate(200 + i, loras[i % len(loras)], 2)
                i += 1
            times = (await long)[1][2:]
        finally:
            llm.shutdown()
        gaps = sorted(1e3 * (after - before) for before, after in pairwise(times))
        return {
            "tokens": {one.lora_name: answer for one, (answer, _) in zip(chosen, answers, strict=True)},
            "tokens_per_s": rate,
            "first_use_ms": statistics.median(first for first, _ in uses),
            "second_use_ms": statistics.median(second for _, second in uses),
            "gap_p99_ms": gaps[int(0.99 * len(gaps))],
        }

    return asyncio.run(measure())


def machine_of(device: str) -> dict[str, Any]:
    """What was measured on."""
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "vllm"):
        if importlib.util.find_spec(name) is not None:
            versions[name] = importlib.import_module(name).__version__
    where = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {"device": where, **versions}


def obstacle(device: str) -> str:
    """Why nothing can be checked here; empty when it can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed in this Python: pip install '.[gpu]'"
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device (--device cpu runs the same parts on the CPU)"
    return ""


def check(device: str, folder: Path, minutes: float, say: Callable[[str], None] = print) -> int:
    """Run all parts, write both files; the exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for part in parts(device):
        say(f"{part.name} ...")
        results.append(run(part, folder, part.share * minutes * 60))
        say(f"  {results[-1].status}, {results[-1].seconds:.0f} s {results[-1].detail}")
    judge(results)
    machine = machine_of(device)
    report = {"machine": machine, "parts": [asdict(result) for result in results]}
    (folder / "gpu_check.json").write_text(json.dumps(report, indent=2) + "\n")
    text = markdown(machine, results)
    (folder / "gpu_check.md").write_text(text)
    say(f"\n{text}\nwritten to {folder}")
    return int(any(result.status != "ok" for result in results))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, default=15.0, help="time for all parts together (default 15)")
    parser.add_argument("--out", type=Path, default=Path("build/gpu-check"), help="folder for logs and results")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("result", nargs="?", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part is None:
        if problem := obstacle(given.device):
            print(f"error: {problem}", file=sys.stderr)
            return 2
        return check(given.device, given.out, given.minutes)
    if given.part == "kernels":
        figures = kernels(given.device)
    else:
        figures = engine(given.part.removeprefix("engine_"), given.device)
    given.result.write_text(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
