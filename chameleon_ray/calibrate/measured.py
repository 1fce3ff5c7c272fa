"""What calibration measures: plain values that travel from the process of the engine to the one that fits."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from chameleon_ray.sim.fit import StepPoint


class CalibrationError(ValueError):
    """Calibration is not possible; the message says why."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured. repeats: of each kind of step. batches, prompts: sizes tried. num_requests: of the
    workload; 0: none."""

    repeats: int = 5
    batches: Sequence[int] = (1, 2, 4, 8, 16, 32)
    prompts: Sequence[int] = (16, 64, 256, 768)
    num_requests: int = 300
    num_loads: int = 6


@dataclass(frozen=True, slots=True)
class Served:
    """One request of the validation workload: what was asked, and when (s) it was answered.

    adapter: index of ``Measured.adapters``; -1: the base model.
    """

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    adapter: int
    first_token_s: float
    end_s: float


@dataclass(slots=True)
class Measured:
    """One engine, or bare kernels.

    engine: in words. memory, limits: ``MemoryCosts``, ``EngineLimits`` as they are written. policy: those
    ``PolicySettings`` that the engine runs with. loads, fetches: (bytes, seconds) of adapters from host memory into
    blocks, and from disk into host memory. adapters: (rank, bytes). assumptions: what was not measured.
    """

    engine: str
    memory: dict[str, int]
    limits: dict[str, float]
    steps: list[StepPoint]
    loads: list[tuple[int, float]]
    fetches: list[tuple[int, float]] = field(default_factory=list)
    adapters: list[tuple[int, int]] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)
    policy: dict[str, object] = field(default_factory=dict)
    assumptions: list[str] = field(default_factory=list)
