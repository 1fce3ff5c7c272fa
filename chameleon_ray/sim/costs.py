"""Cost models: how long an engine step takes, what loads cost, how much memory there is. A small JSON format.

A step that computes ``tokens`` (prefill chunks and one per decoding request) with ``context_tokens`` of KV cache in the
batch takes

    overhead_s + max(weights_read_s + kv_read_s * context_tokens, token_s * tokens)
               + token_rank_s * sum over tokens of their adapter's rank + adapter_read_s * bytes of distinct adapters

a roofline: reading weights and KV cache, or arithmetic, whichever is longer; then the LoRA kernels.
"""

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class CostModelError(ValueError):
    """The cost model cannot be read; the message says what is wrong in which file."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StepCosts(_Part):
    """Seconds; see the module's head. kv_read_s: per context token. adapter_read_s: per byte."""

    overhead_s: NotNegative = 0.0
    weights_read_s: NotNegative
    kv_read_s: NotNegative
    token_s: NotNegative
    token_rank_s: NotNegative = 0.0
    adapter_read_s: NotNegative = 0.0


class MemoryCosts(_Part):
    """pool_blocks: KV blocks of ``block_tokens`` tokens, adapters' share included. host_bytes: for host copies."""

    block_tokens: Count = 16
    kv_bytes_per_token: Count
    pool_blocks: Count
    host_bytes: Count
    adapter_bytes_per_rank: Count


class LinkCosts(_Part):
    """Bandwidth in bytes/s, shared by concurrent transfers; overhead_s: fixed cost of a host-to-device load."""

    host_bytes_s: Positive
    disk_bytes_s: Positive
    source_bytes_s: Positive
    overhead_s: NotNegative = 0.0


class EngineLimits(_Part):
    """max_running: requests in a batch. max_step_tokens: tokens of a step, chunked prefill included."""

    max_running: Count = 256
    max_step_tokens: Count = 2048
    max_model_len: Count = 4096


class CostModel(_Part):
    """One kind of replica. assumptions: everything in the numbers that was not measured."""

    name: str
    description: str = ""
    assumptions: list[str] = []
    step: StepCosts
    memory: MemoryCosts
    links: LinkCosts
    limits: EngineLimits = EngineLimits()

    def step_s(self, tokens: int, context_tokens: int, token_ranks: float = 0.0, adapter_bytes: float = 0.0) -> float:
        """Seconds of one engine step. token_ranks: sum over tokens of rank; adapter_bytes: of distinct adapters."""
        step = self.step
        reading_s = step.weights_read_s + step.kv_read_s * context_tokens
        base_s = step.overhead_s + max(reading_s, step.token_s * tokens)
        return base_s + step.token_rank_s * token_ranks + step.adapter_read_s * adapter_bytes

    def step_s_by_context(self, tokens: int, token_ranks: float, adapter_bytes: float) -> Callable[[int], float]:
        """``step_s`` as a function of ``context_tokens`` alone, for many steps that differ in nothing else."""
        step = self.step
        overhead_s, weights_read_s, kv_read_s = step.overhead_s, step.weights_read_s, step.kv_read_s
        arithmetic_s = step.token_s * tokens
        ranks_s, adapters_s = step.token_rank_s * token_ranks, step.adapter_read_s * adapter_bytes

        def step_s(context_tokens: int) -> float:
            reading_s = weights_read_s + kv_read_s * context_tokens
            return overhead_s + (reading_s if reading_s > arithmetic_s else arithmetic_s) + ranks_s + adapters_s

        return step_s

    def adapter_blocks(self, size_bytes: int) -> int:
        """KV blocks that an adapter of so many bytes takes."""
        return -(-size_bytes // (self.memory.block_tokens * self.memory.kv_bytes_per_token))

    @property
    def pool_tokens(self) -> int:
        """Tokens that the pool holds."""
        return self.memory.pool_blocks * self.memory.block_tokens


def load_cost_model(name_or_path: str) -> CostModel:
    """A shipped model by name, or a JSON file by path. Raises CostModelError."""
    shipped = {entry.name.removesuffix(".json"): entry for entry in _models().iterdir() if entry.name.endswith(".json")}
    source = shipped.get(name_or_path)
    if source is None and not Path(name_or_path).is_file():
        raise CostModelError(
            f"no cost model {name_or_path!r}: give the path of a JSON file, or one of {', '.join(sorted(shipped))}"
        )
    text = source.read_text("utf-8") if source is not None else Path(name_or_path).read_text("utf-8")
    try:
        return CostModel.model_validate_json(text)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
        raise CostModelError(f"cost model {name_or_path!r}: {problems}") from None


def _models() -> resources.abc.Traversable:
    return resources.files("chameleon_ray.sim") / "models"
