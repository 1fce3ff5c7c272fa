"""``chameleon calibrate``: measure in a process of its own, fit, compare, write a cost model."""

import argparse
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from chameleon_ray.calibrate.measured import CalibrationError, Effort, Measured
from chameleon_ray.calibrate.report import cost_model, summary_lines
from chameleon_ray.engine.environment import cpu_environment
from chameleon_ray.sim.costs import load_cost_model

_MIB, _GIB = 1 << 20, 1 << 30
_DEMO_KV_BYTES, _DEMO_MODEL_LEN = 256 * _MIB, 2048
"""As in cluster_configs/local.yaml, so that the demo's model describes `make serve`."""
_CPU_CLOCK = "Time is CPU time of the engine's process, not wall-clock time: other processes used the machine."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--model", metavar="FOLDER", help="Hugging Face format, or a hub id (default: the demo model)")
    parser.add_argument(
        "--adapters", type=Path, metavar="FOLDER", help="whose sub-folders are adapters of at least two ranks"
    )
    parser.add_argument("--out", type=Path, default=Path("cost-model.json"), metavar="FILE", help="the cost model")
    parser.add_argument("--name", help="of the cost model (default: the file's)")
    parser.add_argument("--cpu-threads", type=int, help="compute threads of a CPU engine (default: all cores)")
    parser.add_argument("--dtype", help="of weights and KV cache (default: vLLM's choice; float32 for the demo)")
    parser.add_argument(
        "--kv-cache-gib", type=float, metavar="GIB", help="KV memory (default: as vLLM would; demo: 0.25)"
    )
    parser.add_argument("--adapter-host-gib", type=float, default=4.0, metavar="GIB", help="host memory for adapters")
    parser.add_argument("--max-model-len", type=int, help="context window (default: the model's)")
    parser.add_argument("--requests", type=int, default=300, help="of the workload that checks the model; 0: none")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each kind of step; medians are taken")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: count CPU time, for one-thread CPU engines on a machine that others use as well",
    )
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="bare kernels in the model's shapes on a CUDA device, not an engine",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure, write the model, print how good it is; the exit status. Raises CalibrationError, FitFailed."""
    for name in ("cpu_threads", "repeats", "max_model_len", "kv_cache_gib", "adapter_host_gib"):
        if (value := getattr(arguments, name)) is not None and value <= 0:
            raise CalibrationError(f"--{name.replace('_', '-')} is {value}: give a positive number")
    if arguments.requests < 0:
        raise CalibrationError("--requests is negative: give a number of requests, 0 for no check")
    if arguments.repeats < 2 and not arguments.kernels:
        raise CalibrationError("--repeats must be 2 at least: one measurement tells nothing about noise")
    if not arguments.out.parent.is_dir():
        raise CalibrationError(f"there is no folder {arguments.out.parent} to write {arguments.out.name} in")
    measured = _kernels(arguments) if arguments.kernels else _engine(arguments)
    costs = cost_model(arguments.name or arguments.out.stem, measured)
    draft = arguments.out.with_name(arguments.out.name + ".part")
    draft.write_text(costs.model_dump_json(indent=2) + "\n", encoding="utf-8")
    load_cost_model(str(draft))
    draft.replace(arguments.out)
    print("\n".join([*summary_lines(costs), f"written to {arguments.out}"]))
    return 0


def _kernels(arguments: argparse.Namespace) -> Measured:
    from chameleon_ray.calibrate.kernels import measure_kernels

    return measure_kernels(arguments.model)


def _engine(arguments: argparse.Namespace) -> Measured:
    if (arguments.model is None) != (arguments.adapters is None):
        raise CalibrationError("give --model and --adapters, or neither of them for the demo")
    threads = arguments.cpu_threads or os.cpu_count() or 1
    if arguments.clock == "cpu" and threads > 1:
        raise CalibrationError("--clock cpu needs --cpu-threads 1: it counts the seconds of all threads together")
    kv_cache_gib, dtype, max_model_len = arguments.kv_cache_gib, arguments.dtype, arguments.max_model_len
    model, adapters = arguments.model, arguments.adapters
    if model is None:
        from chameleon_ray.random_demo import make_random_demo

        demo = make_random_demo()
        model, adapters = str(demo.model), demo.adapters
        kv_cache_gib = kv_cache_gib or _DEMO_KV_BYTES / _GIB
        dtype, max_model_len = dtype or "float32", max_model_len or _DEMO_MODEL_LEN
    if not adapters.is_dir():
        raise CalibrationError(f"there is no folder of adapters at {adapters}")
    folders = sorted(folder for folder in adapters.iterdir() if (folder / "adapter_config.json").is_file())
    task = {
        "engine": {
            "model": model,
            "dtype": dtype or "auto",
            "kv_cache_bytes": None if kv_cache_gib is None else int(kv_cache_gib * _GIB),
            "adapter_host_bytes": int(arguments.adapter_host_gib * _GIB),
            "max_model_len": max_model_len,
        },
        "folders": folders,
        "effort": Effort(repeats=arguments.repeats, num_requests=arguments.requests),
        "seed": arguments.seed,
        "clock": arguments.clock,
    }
    measured = in_child(task, threads)
    if arguments.clock == "cpu":
        measured.assumptions.insert(0, _CPU_CLOCK)
    return measured


def in_child(task: dict[str, Any], threads: int) -> Measured:
    """The measurements of a fresh process: vLLM reads its settings from the environment as it is imported."""
    environment = (
        os.environ
        | cpu_environment(threads)
        | {
            "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder) / "task", Path(folder) / "result"
        given.write_bytes(pickle.dumps(task))
        command = [sys.executable, "-m", "chameleon_ray.calibrate.child", str(given), str(result)]
        status = subprocess.run(command, env=environment, stdout=sys.stderr, check=False).returncode
        if not result.is_file():
            raise CalibrationError(f"the engine could not be measured (exit status {status}); its output is above")
        answer = pickle.loads(result.read_bytes())
    if isinstance(answer, Exception):
        raise CalibrationError(str(answer))
    assert isinstance(answer, Measured)
    answer.engine += f", {threads} thread{'s' if threads > 1 else ''}" if " on cpu" in answer.engine.lower() else ""
    return answer
