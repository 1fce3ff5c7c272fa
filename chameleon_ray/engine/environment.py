"""What an engine is to its node: thread counts, which must be set before vLLM is imported, and processes per core."""

import os
from pathlib import Path

from chameleon_ray.config import AppConfig, EngineConfig

SHORT_SPIN_S = 0.002
"""Longer than the pause between two steps of a busy engine, too short for others to notice."""


def cpu_environment(threads: int) -> dict[str, str]:
    """Environment variables of a CPU engine with so many compute threads.

    vLLM binds every engine's threads from core 0 upwards, so that several engines on one machine fight for the same
    cores: with a thread count given, binding is left to the operating system.
    """
    return {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def set_cpu_environment(engine: EngineConfig) -> None:
    """Bound the compute threads of a CPU engine."""
    if engine.cpu_threads is not None and engine.tensor_parallel_size == 1:
        os.environ |= cpu_environment(engine.cpu_threads)


def usable_cores(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """Cores that this process may use: those it is bound to, or its control group's quota where that is less.

    cpu_max: the quota in the format of cgroup v2 (``quota period``, in us; ``max``: none).
    """
    cores = float(len(os.sched_getaffinity(0)))
    try:
        quota, period = cpu_max.read_text().split()
        return cores if quota == "max" else min(cores, int(quota) / int(period))
    except (OSError, ValueError):  # no cgroup v2 here
        return cores


def num_engine_processes(config: AppConfig, cores: float, num_gpus: int | None = None) -> int:
    """The most engine processes (EngineCore and workers) that Ray may place on a node of so many cores and GPUs.

    num_gpus: None for CPU engines.
    """
    replicas, engine = config.replicas, config.engine
    num_replicas = replicas.num_replicas if replicas.autoscaling is None else replicas.autoscaling.max_replicas
    if replicas.num_cpus > 0:
        num_replicas = min(num_replicas, int(cores / replicas.num_cpus))
    if num_gpus is not None:
        num_replicas = min(num_replicas, num_gpus // engine.tensor_parallel_size)
    return max(1, num_replicas) * (1 + engine.tensor_parallel_size)


def worker_spin_s(config: AppConfig, cores: float, num_processes: int) -> float | None:
    """Seconds that a worker polls for the next message; None for vLLM's own second. See ``engine/spin.py``."""
    chosen = config.engine.worker_spin_s
    if chosen is not None:
        return chosen
    return SHORT_SPIN_S if cores < 2 * num_processes else None
