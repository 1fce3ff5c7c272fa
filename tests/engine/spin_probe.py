"""A worker extension for tests: asks a worker process how long its message readers poll."""

from chameleon_ray.engine.residency import AdapterResidency
from chameleon_ray.engine.spin import spin_times_s

PROBE = "spin_probe.SpinProbe"


class SpinProbe(AdapterResidency):
    """Called through ``AsyncLLM.collective_rpc``."""

    def spin_times(self) -> list[float]:
        """Seconds, one per reader of the worker's process."""
        return spin_times_s()
