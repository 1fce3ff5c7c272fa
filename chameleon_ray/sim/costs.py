"""Cost models: how long an engine step takes, what loads cost, how much memory there is. A small JSON format.

A step that computes ``tokens`` (prefill chunks and one per decoding request) with ``context_tokens`` of KV cache in the
batch takes

    overhead_s + request_s * requests in the step
               + max(weights_read_s + kv_read_s * context_tokens, token_s * tokens)
               + attention_s * sum over tokens of the tokens that each attends to
               + token_rank_s * sum over tokens of their adapter's rank + adapter_read_s * bytes of distinct adapters

a roofline: reading weights and KV cache, or arithmetic, whichever is longer; then attention's own arithmetic and the
LoRA kernels. ``overhead_s`` and ``request_s`` are the host's time.
"""

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
    request_s: NotNegative = 0.0
    weights_read_s: NotNegative
    kv_read_s: NotNegative
    token_s: NotNegative
    attention_s: NotNegative = 0.0
    token_rank_s: NotNegative = 0.0
    adapter_read_s: NotNegative = 0.0

    def seconds(
        self,
        tokens: int,
        context_tokens: int,
        token_ranks: float,
        adapter_bytes: float,
        requests: int,
        attended_tokens: float,
    ) -> float:
        """Of one engine step. token_ranks: sum over tokens of rank. adapter_bytes: of distinct adapters.
        attended_tokens: sum over tokens of how many tokens each attends to."""
        reading_s = self.weights_read_s + self.kv_read_s * context_tokens
        base_s = self.overhead_s + self.request_s * requests + max(reading_s, self.token_s * tokens)
        lora_s = self.token_rank_s * token_ranks + self.adapter_read_s * adapter_bytes
        return base_s + self.attention_s * attended_tokens + lora_s


class MemoryCosts(_Part):
    """pool_blocks: KV blocks of ``block_tokens`` tokens, adapters' share included.

    adapter_host_bytes: for host copies.
    """

    block_tokens: Count = 16
    kv_bytes_per_token: Count
    pool_blocks: Count
    adapter_host_bytes: Count
    adapter_bytes_per_rank: Count


class LinkCosts(_Part):
    """Bandwidth in bytes/s, shared by concurrent transfers. overhead_s: fixed cost of a host-to-device load;
    disk_overhead_s: of a fetch from disk."""

    host_bytes_s: Positive
    disk_bytes_s: Positive
    source_bytes_s: Positive
    overhead_s: NotNegative = 0.0
    disk_overhead_s: NotNegative = 0.0


class EngineLimits(_Part):
    """max_num_seqs: requests in a batch. max_num_batched_tokens: tokens of a step, chunked prefill included.

    watermark_share: of the pool, kept free when a request joins others, so that running ones can grow (vLLM's option
    ``watermark``, whose default is 0).
    """

    max_num_seqs: Count = 256
    max_num_batched_tokens: Count = 2048
    max_model_len: Count = 4096
    watermark_share: float = Field(0.01, ge=0, lt=1)


class FitError(_Part):
    """How far a fit is from what it was fitted to, as shares of the measured seconds."""

    points: Count
    mean: NotNegative
    p90: NotNegative
    worst: NotNegative


class Compared(_Part):
    """One figure of the same workload on the engine and in the simulator. error: simulated over measured, less 1."""

    measured: float
    simulated: float
    error: float


class Calibration(_Part):
    """What ``chameleon calibrate`` measured, and how well the model does on a workload it was not fitted to.

    engine: what was measured. noise: median step over the fastest of its kind, less 1: 0 on a machine of its own.
    validation: by figure; seconds.
    """

    engine: str
    noise: NotNegative
    step_fit: FitError
    validation: dict[str, Compared] = {}


class CostModel(_Part):
    """One kind of replica. assumptions: everything in the numbers that was not measured."""

    name: str
    description: str = ""
    assumptions: list[str] = []
    step: StepCosts
    memory: MemoryCosts
    links: LinkCosts
    limits: EngineLimits = EngineLimits()
    calibration: Calibration | None = None

    def step_s(
        self,
        tokens: int,
        context_tokens: int,
        token_ranks: float = 0.0,
        adapter_bytes: float = 0.0,
        requests: int = 0,
        attended_tokens: float = 0.0,
    ) -> float:
        """See ``StepCosts.seconds``."""
        return self.step.seconds(tokens, context_tokens, token_ranks, adapter_bytes, requests, attended_tokens)

    def decode_steps_s(
        self, num_steps: int, tokens: int, context_tokens: int, token_ranks: float, adapter_bytes: float
    ) -> list[float]:
        """``step_s`` of each of the steps that follow one over so much context and only decode the same requests."""
        step = self.step
        overhead_s = step.overhead_s + step.request_s * tokens
        weights_read_s, kv_read_s, attention_s = step.weights_read_s, step.kv_read_s, step.attention_s
        arithmetic_s = step.token_s * tokens
        lora_s = step.token_rank_s * token_ranks + step.adapter_read_s * adapter_bytes
        contexts = range(context_tokens + tokens, context_tokens + (num_steps + 1) * tokens, tokens)
        return [
            overhead_s
            + (reading_s if (reading_s := weights_read_s + kv_read_s * context) > arithmetic_s else arithmetic_s)
            + attention_s * context
            + lora_s
            for context in contexts
        ]

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
