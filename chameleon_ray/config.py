"""Everything an operator may set, in one strict model: unknown keys are errors that name the key.

``AppConfig.from_args`` takes what ``serve run`` hands to ``deployments.app:build``: the nested ``args`` mapping of a
YAML file, or the flat ``section.key=value`` strings of the command line.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator


class ConfigError(ValueError):
    """The configuration is not usable; the message names the key and says what it takes."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class ModelConfig(_Section):
    """The base model."""

    source: str = Field(description="folder of the base model in Hugging Face format, or its hub id")
    name: str | None = Field(
        default=None, description="name clients use for the base model; default: last part of `source`"
    )

    @property
    def served_name(self) -> str:
        """The base model's name in the API."""
        return self.name or Path(self.source).name


class EngineConfig(_Section):
    """One vLLM engine (per replica)."""

    adapter_memory: Literal["auto", "paged", "slots"] = Field(
        default="auto",
        description="where adapters live; `paged`: idle KV-cache memory, `slots`: vLLM's own LoRA slots, `auto`: paged "
        "on CPUs, slots on GPUs until paged has run there",
    )
    adapter_memory_share: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="`paged`: most of the KV cache that adapters may take, against cached prefixes"
    )
    adapter_host_gib: PositiveFloat = Field(
        default=4.0, description="`paged`: host memory for adapters, in GiB per GPU; the least useful leave first"
    )
    adapter_policy: Literal["chameleon", "fairshare", "lru", "gdsf", "discard"] = Field(
        default="chameleon", description="`paged`: which idle adapters leave first"
    )
    scheduler: Literal["chameleon", "paper", "fifo", "sjf", "static"] = Field(
        default="chameleon",
        description="`paged`: which waiting request runs next; `chameleon`: queues by size in one order, "
        "`paper`: queues with quotas",
    )
    scheduler_slo_s: PositiveFloat | None = Field(
        default=None, description="`paper`: the SLO that quotas aim at, in seconds; default: five mean durations"
    )
    scheduler_refresh_s: PositiveFloat = Field(
        default=300.0,
        description="pause between measurements of queues and quotas, a fifth of it while requests wait",
    )
    scheduler_max_queues: Annotated[int, Field(ge=1, le=4)] = Field(
        default=4, description="`chameleon`, `paper`: most queues that requests are split into"
    )
    request_size: Literal["product", "sum"] = Field(
        default="product", description="weighted request size: the paper's, or the sum of its three terms"
    )
    histogram_prefetch: bool = Field(
        default=False, description="`paged`: load adapters that are expected soon by the times of past requests"
    )
    max_loras: PositiveInt = Field(default=8, description="`slots`: adapter slots in GPU memory")
    max_cpu_loras: PositiveInt = Field(
        default=64, description="`slots`: adapters kept in host memory (at least `max_loras`)"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="`auto`: what the installed vLLM is built for"
    )
    dtype: str = Field(default="auto", description="weights and activations: auto, bfloat16, float16, float32")
    max_model_len: PositiveInt | None = Field(
        default=None, description="context window in tokens; default: the model's"
    )
    max_num_seqs: PositiveInt = Field(default=64, description="requests that run at once in one engine")
    max_num_batched_tokens: PositiveInt | None = Field(
        default=None, description="tokens per engine step; default: vLLM's"
    )
    kv_cache_gib: PositiveFloat | None = Field(
        default=None, description="KV cache size in GiB; default: by `gpu_memory_utilization` (CPU: 1)"
    )
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.9, description="share of GPU memory that the engine may use"
    )
    tensor_parallel_size: PositiveInt = Field(default=1, description="GPUs per replica")
    enable_prefix_caching: bool = Field(default=True, description="reuse KV blocks of equal prompt beginnings")
    enforce_eager: bool = Field(default=False, description="no CUDA graphs, no torch.compile")
    cpu_threads: PositiveInt | None = Field(
        default=None, description="compute threads per CPU engine; default: all cores"
    )
    worker_spin_s: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="seconds that a worker process polls for its next step before it sleeps; default: 0.002 on nodes "
        "with fewer cores than twice their engine processes, else vLLM's 1",
    )
    length_predictor: str = Field(
        default="history",
        min_length=1,
        description="output lengths: `history` of like requests, or a folder that `chameleon train-predictor` made",
    )
    length_predictor_timeout_s: PositiveFloat = Field(
        default=0.05, description="a trained predictor that takes longer leaves the request to the history"
    )
    seed: int = Field(default=0, description="seed of the engine's sampler")
    vllm_args: dict[str, Any] = Field(
        default_factory=dict,
        description="further vLLM server options by Python name (`tool_call_parser: hermes`); unknown ones are errors",
    )

    @model_validator(mode="after")
    def _host_holds_gpu(self) -> "EngineConfig":
        if self.max_cpu_loras < self.max_loras:
            raise ValueError(f"max_cpu_loras ({self.max_cpu_loras}) must be at least max_loras ({self.max_loras})")
        return self


class AdapterSource(_Section):
    """One adapter by name."""

    name: str = Field(description="name clients use")
    uri: str = Field(description="where its files are: a path or file:// URI")


class AdaptersConfig(_Section):
    """Which adapters exist and what is accepted as one."""

    folder: str | None = Field(default=None, description="folder whose sub-folders are adapters, named after them")
    preload: list[AdapterSource] = Field(
        default_factory=list, description="further adapters: a list of `name` and `uri`"
    )
    allowed_roots: list[str] = Field(
        default_factory=list, description="folders that run-time loads may read from (`folder` always counts)"
    )
    store_dir: str = Field(
        default="~/.cache/chameleon-ray/adapters", description="node-local store, one folder per content digest"
    )
    store_max_gib: PositiveFloat = Field(default=50.0, description="size of the store; unused adapters leave first")
    max_rank: PositiveInt = Field(default=128, description="largest LoRA rank accepted")
    max_adapter_mib: PositiveInt = Field(default=4096, description="largest weights file accepted, in MiB")
    check_finite: bool = Field(
        default=True, description="refuse adapters with NaN or infinite weights (reads all weights)"
    )
    fetch_concurrency: PositiveInt = Field(default=4, description="adapters fetched and validated at once per replica")
    retry_after_s: PositiveFloat = Field(default=5.0, description="pause before an adapter that failed is tried again")


class RedisConfig(_Section):
    """Where catalog and placement are kept."""

    url: str | None = Field(
        default=None, description="redis://… or rediss://…; default: a bundled server on the head, for one machine only"
    )
    key_prefix: str = Field(
        default="chameleon", min_length=1, description="prefix of every key and channel of this application"
    )
    heartbeat_s: PositiveFloat = Field(default=0.5, description="pause between two reports of a replica")
    heartbeat_ttl_s: PositiveFloat = Field(default=5.0, description="a replica silent for longer is taken for dead")
    timeout_s: PositiveFloat = Field(default=2.0, description="limit for one Redis call")


class RouterConfig(_Section):
    """Expected time to first token, per replica and adapter (`policy/routing.py`)."""

    host_load_gib_s: PositiveFloat = Field(default=10.0, description="host to GPU bandwidth assumed for a load")
    disk_load_gib_s: PositiveFloat = Field(default=1.0, description="disk bandwidth assumed for a load")
    source_load_gib_s: PositiveFloat = Field(
        default=0.2, description="bandwidth assumed for a fetch from an adapter's source"
    )
    load_overhead_s: PositiveFloat = Field(default=0.005, description="fixed cost assumed for any load")
    hysteresis: Annotated[float, Field(ge=0)] = Field(
        default=0.2, description="leave an adapter's replica only for one that is better by this share"
    )
    max_report_age_s: PositiveFloat = Field(default=10.0, description="placement older than this is not used any more")


class AutoscalingConfig(_Section):
    """Ray Serve autoscaling of one deployment."""

    min_replicas: Annotated[int, Field(ge=0)] = Field(default=1, description="fewest replicas")
    max_replicas: PositiveInt = Field(description="most replicas")
    target_ongoing_requests: PositiveFloat = Field(default=16.0, description="requests per replica aimed at")
    upscale_delay_s: PositiveFloat = Field(default=10.0, description="pause before replicas are added")
    downscale_delay_s: PositiveFloat = Field(default=300.0, description="pause before replicas are removed")


class ReplicasConfig(_Section):
    """The engine replicas."""

    num_replicas: PositiveInt = Field(default=1, description="number of engine replicas (without `autoscaling`)")
    autoscaling: AutoscalingConfig | None = Field(default=None, description="scale between bounds instead")
    num_cpus: Annotated[float, Field(ge=0)] = Field(default=1.0, description="CPUs that Ray reserves per replica")
    max_ongoing_requests: PositiveInt = Field(
        default=1024, description="requests inside one replica: vLLM queues, not Serve"
    )
    max_queued_requests: PositiveInt = Field(
        default=2048, description="requests an ingress holds back before it answers 503"
    )
    retry_after_s: PositiveInt = Field(default=1, description="`Retry-After` of a 503")
    health_check_period_s: PositiveFloat = Field(
        default=2.0, description="pause between two health checks of the engine"
    )
    health_check_timeout_s: PositiveFloat = Field(
        default=30.0, description="a health check without answer fails after this"
    )
    drain_timeout_s: PositiveFloat = Field(
        default=60.0, description="time that running requests get when a replica stops"
    )
    max_stream_events_per_s: PositiveInt = Field(
        default=1000, description="stream events a replica sends; above it, events carry several tokens"
    )
    request_log: str | None = Field(
        default=None,
        description="node-local folder that records every ended request, **its prompt included**; default: none",
    )
    request_log_max_mib: PositiveInt = Field(
        default=256, description="size of that folder, over all replicas of the node; the oldest records leave first"
    )


class IngressConfig(_Section):
    """The HTTP ingress."""

    num_replicas: PositiveInt = Field(default=1, description="number of ingress replicas (without `autoscaling`)")
    autoscaling: AutoscalingConfig | None = Field(default=None, description="scale between bounds instead")
    num_cpus: Annotated[float, Field(ge=0)] = Field(
        default=0.5, description="CPUs that Ray reserves per ingress replica"
    )
    max_ongoing_requests: PositiveInt = Field(default=4096, description="requests inside one ingress replica")
    max_body_mib: PositiveInt = Field(default=16, description="largest request body, in MiB")


class ApiConfig(_Section):
    """Who may call. A value `env:NAME` is read from the ingress's environment."""

    api_keys: list[str] = Field(default_factory=list, description="bearer keys of clients; none: no authentication")
    admin_key: str | None = Field(default=None, description="bearer key that opens adapter loading and unloading")
    admin_open_on_loopback: bool = Field(
        default=False, description="open adapter loading without a key to callers on this machine, for local use only"
    )

    def resolved(self) -> "ApiConfig":
        """The same with every ``env:NAME`` replaced by that variable's value. ConfigError when one is not set."""
        return self.model_copy(
            update={
                "api_keys": [_from_env(key) for key in self.api_keys],
                "admin_key": None if self.admin_key is None else _from_env(self.admin_key),
            }
        )


class AppConfig(_Section):
    """The whole application."""

    model: ModelConfig
    engine: EngineConfig = Field(default_factory=EngineConfig)
    adapters: AdaptersConfig = Field(default_factory=AdaptersConfig)
    redis: RedisConfig = Field(default_factory=RedisConfig)
    router: RouterConfig = Field(default_factory=RouterConfig)
    replicas: ReplicasConfig = Field(default_factory=ReplicasConfig)
    ingress: IngressConfig = Field(default_factory=IngressConfig)
    api: ApiConfig = Field(default_factory=ApiConfig)

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> "AppConfig":
        """The configuration from nested YAML ``args`` or flat ``section.key=value`` strings. Raises ConfigError."""
        try:
            return cls.model_validate(_nested(args))
        except ValidationError as error:
            problems = "; ".join(_explain(dict(problem)) for problem in error.errors())
            raise ConfigError(f"configuration: {problems}") from None


def _nested(args: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in args.items():
        *sections, last = str(key).split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
            if not isinstance(branch, dict):
                raise ConfigError(f"configuration: {key}: {section} is a value, not a section")
        flat = bool(sections) and isinstance(value, str)
        leaf = yaml.safe_load(value) if flat else value
        if isinstance(branch.get(last), dict) and isinstance(leaf, dict):
            branch[last] = {**leaf, **branch[last]}
        else:
            branch[last] = leaf
    return tree


def _explain(problem: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {where!r}; docs/options.md lists every option"
    if problem["type"] == "missing":
        return f"{where!r} is required"
    return f"{where!r}: {problem['msg']} (got {problem['input']!r})"


def _from_env(value: str) -> str:
    if not value.startswith("env:"):
        return value
    name = value.removeprefix("env:")
    if not (found := os.environ.get(name)):
        raise ConfigError(f"configuration: {value!r} names the environment variable {name}, which is not set")
    return found
