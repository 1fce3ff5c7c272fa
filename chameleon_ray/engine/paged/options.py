"""The settings, the vLLM arguments that keep adapters in KV memory, and what cannot be served so.

Imports no vLLM: the arguments are plain values, for ``AsyncEngineArgs``, ``LLM(...)`` or the command line.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from chameleon_ray.policy.cache_types import CacheConfig
from chameleon_ray.policy.disciplines import DISCIPLINES, QueueOptions
from chameleon_ray.policy.eviction import PAPER_WEIGHTS, Weights
from chameleon_ray.policy.replica import ReplicaConfig
from chameleon_ray.policy.sizing import SizingOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PACKAGE = "chameleon_ray.engine.paged"
CONNECTOR = "PagedConnector"
SETTINGS_KEY = "chameleon"


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the engine around the policy can do. block_size: tokens of one KV block. max_num_seqs: requests at once."""

    block_size: int
    max_num_seqs: int
    max_model_len: int

    @classmethod
    def of(cls, vllm_config: "VllmConfig") -> "EngineLimits":
        """Those of a vLLM configuration."""
        return cls(
            vllm_config.cache_config.block_size,
            vllm_config.scheduler_config.max_num_seqs,
            vllm_config.model_config.max_model_len,
        )


@dataclass(frozen=True, slots=True)
class PagedSettings:
    """What an operator decides about adapters under our policy; vLLM carries it in ``additional_config``.

    adapter_memory_share: most of the KV pool's blocks that adapters may hold; without meaning for adapters in slots.
    adapter_host_bytes: most bytes of host copies per tensor-parallel rank, page-locked on a GPU machine.
    max_rank: adapters of a larger rank are refused; sizes scratch memory, costs no work.
    readers: background threads that read adapters, per rank.
    check_finite: refuse adapters with NaN or infinite weights; for those that nobody has looked at before.
    retry_after_s: what requests for an adapter that could not be read or loaded are told to wait.
    adapter_policy, frequency_weight, recency_weight, size_weight, frequency_window_s, prefetch: see
    ``policy.cache_types.CacheConfig``.
    scheduler: which waiting request runs next, a name in ``policy.disciplines.DISCIPLINES``.
    request_size: see ``policy.sizing.SizingOptions``.
    scheduler_max_queues, k_rule, scheduler_slo_s, scheduler_refresh_s: see ``policy.disciplines.QueueOptions``.
    trust_predictions: requests carry their predicted output length (``predictor.lengths.PREDICTED_TOKENS``); only where
    no client can set it.
    """

    adapter_memory_share: float = 0.5
    adapter_host_bytes: int = 4 << 30
    max_rank: int = 256
    readers: int = 2
    check_finite: bool = True
    retry_after_s: float = 5.0
    adapter_policy: str = "chameleon"
    frequency_weight: float = PAPER_WEIGHTS.frequency
    recency_weight: float = PAPER_WEIGHTS.recency
    size_weight: float = PAPER_WEIGHTS.size
    frequency_window_s: float = 300.0
    prefetch: bool = True
    scheduler: str = "chameleon"
    request_size: Literal["product", "sum"] = "product"
    scheduler_max_queues: int = 4
    k_rule: Literal["elbow", "min_wcss"] = "elbow"
    scheduler_slo_s: float | None = None
    scheduler_refresh_s: float = 300.0
    trust_predictions: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.adapter_memory_share <= 1:
            raise ValueError(f"adapter_memory_share must be over 0 and at most 1, not {self.adapter_memory_share}")
        for name in ("adapter_host_bytes", "max_rank", "readers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.scheduler not in DISCIPLINES:
            raise ValueError(f"scheduler must be one of {', '.join(DISCIPLINES)}, not {self.scheduler!r}")

    @classmethod
    def of(cls, vllm_config: "VllmConfig") -> "PagedSettings":
        """Those that a vLLM configuration carries. Raises ValueError for an unknown name."""
        extra = vllm_config.additional_config
        given = extra.get(SETTINGS_KEY, {}) if isinstance(extra, Mapping) else {}
        known = {field.name for field in fields(cls)}
        for name in given:
            if name not in known:
                raise ValueError(f"additional_config.{SETTINGS_KEY}: unknown setting {name!r}; known: {sorted(known)}")
        return cls(**given)

    def cache_config(self, num_blocks: int) -> CacheConfig:
        """For a pool of so many blocks. Of these vLLM never uses one, and one is left for a request: an adapter that
        fits alone could not be used."""
        return self._cache_config(max(1, min(int(self.adapter_memory_share * num_blocks), num_blocks - 2)))

    def _cache_config(self, max_blocks: int) -> CacheConfig:
        return CacheConfig(
            max_blocks=max_blocks,
            adapter_host_bytes=self.adapter_host_bytes,
            adapter_policy=self.adapter_policy,
            weights=Weights(self.frequency_weight, self.recency_weight, self.size_weight),
            frequency_window_s=self.frequency_window_s,
            max_fetches=2 * self.readers,
            prefetch=self.prefetch,
        )

    def replica_config(self, num_blocks: int, block_bytes: int, limits: EngineLimits) -> ReplicaConfig:
        """For a pool of so many blocks, each of so many bytes over all layers of one rank."""
        queues = self._queues(num_blocks * limits.block_size, max(1, block_bytes // limits.block_size), limits)
        return ReplicaConfig(self.cache_config(num_blocks), queues, self.scheduler, limits.block_size)

    def slots_config(self, num_slots: int, num_kv_tokens: int, limits: EngineLimits) -> ReplicaConfig:
        """For so many adapters in slots, beside a KV cache for so many tokens."""
        queues = self._queues(num_kv_tokens, None, limits)
        cache = self._cache_config(num_slots)
        return ReplicaConfig(cache, queues, self.scheduler, limits.block_size, shares_kv=False)

    def _queues(self, total_tokens: int, kv_token_bytes: int | None, limits: EngineLimits) -> QueueOptions:
        return QueueOptions(
            total_tokens=total_tokens,
            sizing=SizingOptions(kv_token_bytes=kv_token_bytes, request_size=self.request_size),
            max_num_seqs=limits.max_num_seqs,
            scheduler_max_queues=self.scheduler_max_queues,
            k_rule=self.k_rule,
            scheduler_slo_s=self.scheduler_slo_s,
            scheduler_refresh_s=self.scheduler_refresh_s,
        )


def paged_arguments(settings: PagedSettings | None = None) -> dict[str, Any]:
    """vLLM arguments, by their Python names, to set beside ``enable_lora=True``."""
    return {
        "scheduler_cls": f"{PACKAGE}.scheduler.ChameleonScheduler",
        "worker_cls": f"{PACKAGE}.worker.PagedWorker",
        "kv_transfer_config": {
            "kv_connector": CONNECTOR,
            "kv_connector_module_path": f"{PACKAGE}.connector",
            "kv_role": "kv_both",
        },
        "additional_config": {SETTINGS_KEY: asdict(settings or PagedSettings())},
    }


def unsupported_reason(vllm_config: "VllmConfig") -> str | None:
    """Why this configuration cannot keep adapters in KV memory; None when nothing is known against it.

    What only the loaded model shows is found by the worker, which then raises PagedUnsupportedError.
    """
    model, parallel, lora = vllm_config.model_config, vllm_config.parallel_config, vllm_config.lora_config
    if lora is None:
        return "LoRA is not enabled"
    if (reason := foreign_connector(vllm_config, CONNECTOR)) is not None:
        return reason
    kv_dtype = vllm_config.cache_config.cache_dtype
    # Reason -> whether it applies; every one has been read in vLLM 0.30, none is tried and seen to fail.
    reasons = {
        "layers without attention keep no KV blocks": model.is_hybrid or model.is_attention_free,
        "an encoder's and a decoder's KV caches differ": model.is_encoder_decoder,
        "latent attention (MLA) keeps rows that are too short": model.use_mla,
        "the stages of a pipeline are not implemented": parallel.pipeline_parallel_size > 1,
        "context parallelism spreads a block over ranks": max(
            parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size
        )
        > 1,
        "fully sharded LoRA cuts A as well": lora.fully_sharded_loras,
        "LoRA on the vision tower is computed outside the language model": lora.enable_tower_connector_lora,
        "a draft model's layers share the KV blocks": vllm_config.speculative_config is not None,
        f"a KV cache in {kv_dtype} holds no {lora.lora_dtype} weights": kv_dtype not in ("auto", _name(model.dtype)),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def foreign_connector(vllm_config: "VllmConfig", own: str) -> str | None:
    """Why adapters cannot be moved if vLLM's KV connector is not ``own``, alone; None when it is.

    Ours in a MultiConnector beside another one is not implemented: a step's orders and results would come wrapped, and
    blocks that the other one still reads after a request would have to be kept from adapters.
    """
    found = vllm_config.kv_transfer_config and vllm_config.kv_transfer_config.kv_connector
    return None if found == own else f"the KV connector is {found}: only without kv_transfer_config is it ours"


def lift_slot_limits(vllm_config: "VllmConfig") -> None:
    """Let a step use as many adapters as it has requests: ``max_loras`` limits slots, and there are none."""
    vllm_config.lora_config.max_loras = vllm_config.scheduler_config.max_num_seqs


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def paged_words(settings: PagedSettings | None = None) -> list[str]:
    """The same as words of vLLM's command line. None holds a blank, so that a shell may split them without quotes."""
    words = []
    for name, value in paged_arguments(settings).items():
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        words += [f"--{name.replace('_', '-')}", text]
    return words


def parse_settings(assignments: Sequence[str]) -> PagedSettings:
    """Settings from ``name=value`` texts. Raises ValueError, which names what is wrong and what is known."""
    known = {field.name for field in fields(PagedSettings)}
    given: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name not in known:
            raise ValueError(f"{assignment!r} is not NAME=VALUE with one of the names {', '.join(sorted(known))}")
        try:
            given[name] = json.loads(text)
        except json.JSONDecodeError:
            given[name] = text
    try:
        return PagedSettings(**given)
    except TypeError as error:
        raise ValueError(f"{', '.join(assignments)}: {error}") from None
