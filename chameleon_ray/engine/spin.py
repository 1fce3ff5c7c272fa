"""How long the processes of an engine poll for messages before they sleep.

A worker of vLLM's multiprocessing executor calls ``sched_yield`` in a loop for one second after each message, and so
does EngineCore while it waits for the workers' answer (``SpinCondition`` in
vllm/distributed/device_communicators/shm_broadcast.py). Where engines have more processes than the node has cores, they
take the cores from everything else for that second, and requests stall.

vLLM has no option for it. An executor class is one of its extension points (``distributed_executor_backend``), and sets
the time in both kinds of processes.
"""

import gc
from typing import Any

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

EXECUTOR = "chameleon_ray.engine.spin.BoundedSpinExecutor"
SETTINGS_KEY = "chameleon_worker_spin_s"
"""Carries the time in vLLM's ``additional_config``, in seconds."""


class BoundedSpinExecutor(MultiprocExecutor):
    """vLLM's executor for worker processes, with the polling time that ``additional_config`` carries."""

    def _init_executor(self) -> None:
        super()._init_executor()
        spin_s = float(self.vllm_config.additional_config[SETTINGS_KEY])
        bound_spin(None, spin_s)
        self.collective_rpc(bound_spin, args=(spin_s,))


def bound_spin(_worker: Any, spin_s: float) -> None:
    """Let every reader of a message queue in this process poll for ``spin_s`` seconds after a message.

    ``collective_rpc`` calls it with the worker. vLLM keeps a worker's reader in a local variable of its main function,
    so readers are found among all objects.
    """
    for reader in spin_readers():
        reader.busy_loop_s = spin_s


def spin_times_s(_worker: Any = None) -> list[float]:
    """Seconds that each reader in this process polls for; can be called through ``collective_rpc``."""
    return [reader.busy_loop_s for reader in spin_readers()]


def spin_readers() -> list[SpinCondition]:
    """The readers of message queues in this process."""
    return [one for one in gc.get_objects() if type(one) is SpinCondition and one.is_reader]
