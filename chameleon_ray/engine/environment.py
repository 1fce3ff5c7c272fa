"""The process environment of an engine; must be set before vLLM is imported."""

import os

from chameleon_ray.config import EngineConfig


def set_cpu_environment(engine: EngineConfig) -> None:
    """Bound the compute threads of a CPU engine.

    vLLM binds every engine's threads from core 0 upwards, so that several engines on one machine fight for the same
    cores: with a thread count given, binding is left to the operating system.
    """
    if engine.cpu_threads is not None and engine.tensor_parallel_size == 1:
        os.environ["OMP_NUM_THREADS"] = str(engine.cpu_threads)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
