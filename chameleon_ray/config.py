"""Everything an operator may set, in one strict model: unknown keys are errors that name the key.

``AppConfig.from_args`` takes what ``serve run`` hands to ``deployments.app:build``: the nested ``args`` mapping of a
YAML file, or the flat ``section.key=value`` strings of the command line.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)


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

    adapter_memory: Literal["auto", "paged", "slots", "stock"] = Field(
        default="auto",
        description="where adapters live; `paged`: idle KV-cache memory, `slots`: vLLM's own LoRA slots under "
        "Chameleon's policy, `stock`: vLLM untouched, for comparison, `auto`: paged on CPUs, slots on GPUs until paged "
        "has run there; what one cannot serve goes to the next in this order, with the reason in the log",
    )
    adapter_memory_share: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="`paged`: most of the KV cache that adapters may take, against cached prefixes"
    )
    adapter_host_gib: PositiveFloat = Field(
        default=4.0,
        description="`paged`, `slots`: host memory for adapters, in GiB per GPU; the least useful leave first",
    )
    adapter_policy: Literal["chameleon", "fairshare", "lru", "gdsf", "discard"] = Field(
        default="chameleon", description="`paged`, `slots`: which idle adapters leave first"
    )
    scheduler: Literal["chameleon", "paper", "fifo", "sjf", "static"] = Field(
        default="chameleon",
        description="`paged`, `slots`: which waiting request runs next; `chameleon`: queues by size in one order, "
        "`paper`: queues with quotas",
    )
    scheduler_slo_s: PositiveFloat | None = Field(
        default=None,
        description="the SLO in seconds, by which boosts (`chameleon`) and quotas (`paper`) go; "
        "default: five mean durations",
    )
    scheduler_refresh_s: PositiveFloat = Field(
        default=300.0,
        description="pause between measurements of queues and quotas, a fifth of it while requests wait",
    )
    scheduler_max_queues: Annotated[int, Field(ge=1, le=4)] = Field(
        default=4, description="`paper`: most queues that requests are split into"
    )
    request_size: Literal["product", "sum"] = Field(
        default="product", description="weighted request size: the paper's, or the sum of its three terms"
    )
    max_loras: PositiveInt = Field(default=8, description="`slots`, `stock`: adapter slots in GPU memory")
    max_cpu_loras: PositiveInt = Field(
        default=64, description="`stock`: adapters kept in host memory (at least `max_loras`)"
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
        if "max_cpu_loras" in self.model_fields_set and self.max_cpu_loras < self.max_loras:
            raise ValueError(f"max_cpu_loras ({self.max_cpu_loras}) must be at least max_loras ({self.max_loras})")
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> "EngineConfig":
        kinds = _AUTO if self.adapter_memory == "auto" else (self.adapter_memory,)
        if ignored := self.ignored_options(*kinds):
            raise ValueError(no_effect(ignored, self.adapter_memory))
        return self

    def adapter_bounds(self) -> dict[str, Any]:
        """The options by which an engine can or cannot hold an adapter."""
        return self.model_dump(include=_ADAPTER_BOUNDS)

    def ignored_options(self, *adapter_memory: str) -> list[str]:
        """The options that were set and that none of these kinds of adapter memory uses."""
        unused = (name for name, kinds in _USED_BY.items() if not set(kinds) & set(adapter_memory))
        return [name for name in unused if name in self.model_fields_set]


_POLICY_OPTIONS = (
    "adapter_host_gib",
    "adapter_policy",
    "scheduler",
    "scheduler_slo_s",
    "scheduler_refresh_s",
    "scheduler_max_queues",
    "request_size",
    "length_predictor",
    "length_predictor_timeout_s",
)
_USED_BY = {
    "adapter_memory_share": ("paged",),
    **dict.fromkeys(_POLICY_OPTIONS, ("paged", "slots")),
    "max_loras": ("slots", "stock"),
    "max_cpu_loras": ("stock",),
}
"""Option -> the kinds of ``adapter_memory`` that use it; all others are used by every kind."""
_AUTO = ("paged", "slots")
_ADAPTER_BOUNDS = {
    "adapter_memory",
    "adapter_memory_share",
    "adapter_host_gib",
    "device",
    "dtype",
    "max_model_len",
    "kv_cache_gib",
    "gpu_memory_utilization",
    "tensor_parallel_size",
    "vllm_args",
}


def no_effect(options: list[str], adapter_memory: str) -> str:
    """Says that these options of the engine do nothing, and what to do about it."""
    named = ", ".join(f"engine.{name}" for name in options)
    return f"{named}: without effect with engine.adapter_memory {adapter_memory}; leave out what is not used"


def _is_reference(value: str) -> str:
    if not re.fullmatch(r"env:\w+|file:/.+", value):
        raise ValueError("a secret is never written here: name it as env:NAME or file:/absolute/path")
    return value


SecretRef = Annotated[str, AfterValidator(_is_reference)]
"""Where a secret is: ``env:NAME`` or ``file:/absolute/path``, read on the replica's node whenever it is used."""


class _Credentials(_Section):
    anonymous: bool = Field(default=False, description="ask without credentials, for public places")


class S3Credentials(_Credentials):
    """How ``s3://`` is opened; without keys: AWS's own chain (environment, profile, instance role)."""

    type: Literal["s3"]
    key_id: SecretRef | None = None
    secret: SecretRef | None = None
    session_token: SecretRef | None = None
    endpoint_url: str | None = None
    region: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> "S3Credentials":
        if (self.key_id is None) != (self.secret is None) or (self.session_token and not self.secret):
            raise ValueError("key_id and secret go together")
        return self


class GcsCredentials(_Credentials):
    """How ``gs://`` is opened; without a service account: Google's own chain."""

    type: Literal["gs"]
    service_account: SecretRef | None = None
    endpoint_url: str | None = None


class AzureCredentials(_Credentials):
    """How ``az://`` is opened; without key, SAS token or connection string: Azure's own chain."""

    type: Literal["az"]
    account: str | None = None
    account_key: SecretRef | None = None
    sas_token: SecretRef | None = None
    connection_string: SecretRef | None = None


class HubCredentials(_Credentials):
    """How ``hf://`` is opened; without a token: huggingface_hub's own (``HF_TOKEN``, ``hf auth login``)."""

    type: Literal["hf"]
    token: SecretRef | None = None
    endpoint_url: str | None = None


Credentials = S3Credentials | GcsCredentials | AzureCredentials | HubCredentials


class AdapterSource(_Section):
    """One adapter by name."""

    name: str = Field(description="name clients use")
    uri: str = Field(description="where its files are: a path, or a file://, s3://, gs://, az:// or hf:// URI")
    credentials: str | None = Field(default=None, description="one of `adapters.credentials`")


class SourceRule(_Section):
    """A remote place that run-time loads may name."""

    uri: str = Field(description="beginning of the URIs it is about, up to and with a `/`; or one whole URI")
    credentials: str | None = Field(default=None, description="one of `adapters.credentials`")

    @field_validator("uri")
    @classmethod
    def _has_end(cls, uri: str) -> str:
        if not re.match(r"(s3|gs|az|hf)://", uri):
            raise ValueError("begin with s3://, gs://, az:// or hf://; folders belong into allowed_roots")
        return uri


class ResolveRule(_Section):
    """Names that are fetched when a request names them first."""

    pattern: str = Field(description="the names it is about: `*` stands for any characters, once")
    uri: str = Field(description="where such an adapter is; `{name}` is what `*` stands for")
    credentials: str | None = Field(default=None, description="one of `adapters.credentials`")

    @model_validator(mode="after")
    def _one_place(self) -> "ResolveRule":
        if self.pattern.count("*") != 1 or self.uri.count("{name}") != 1:
            raise ValueError("pattern needs one *, and uri one {name}")
        if not re.match(r"(s3|gs|az)://[^{]+/|hf://", self.uri):
            raise ValueError("uri must begin with s3://, gs:// or az:// and a bucket, or with hf://")
        return self

    @property
    def prefix(self) -> str:
        """What all its URIs begin with."""
        return self.uri.partition("{name}")[0]

    def uri_of(self, name: str) -> str | None:
        """Where the adapter of that name is; None when the rule is not about it."""
        before, _, after = self.pattern.partition("*")
        if len(name) <= len(before) + len(after) or not (name.startswith(before) and name.endswith(after)):
            return None
        return self.uri.replace("{name}", name[len(before) : len(name) - len(after)])


class AdaptersConfig(_Section):
    """Which adapters exist and what is accepted as one."""

    folder: str | None = Field(default=None, description="folder whose sub-folders are adapters, named after them")
    preload: list[AdapterSource] = Field(
        default_factory=list, description="further adapters: a list of `name` and `uri`"
    )
    allowed_roots: list[str] = Field(
        default_factory=list, description="folders that run-time loads may read from (`folder` always counts)"
    )
    sources: list[SourceRule] = Field(
        default_factory=list,
        description="buckets and hubs that run-time loads may name: a list of `uri`, `credentials`",
    )
    resolve: list[ResolveRule] = Field(
        default_factory=list,
        description="adapters fetched when first named: a list of `pattern`, `uri`, `credentials`; the first match "
        "counts",
    )
    credentials: dict[str, Annotated[Credentials, Field(discriminator="type")]] = Field(
        default_factory=dict, description="named credentials, by reference ([Sources](sources.md#credentials))"
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
    check_effect: Literal["files", "probe", "off"] = Field(
        default="files",
        description="`files`: refuse adapters whose weights cannot change an answer; `probe`: at a run-time load, also "
        "those with which the engine answers a short prompt as the base model does; `off`: serve them",
    )
    fetch_concurrency: PositiveInt = Field(default=4, description="adapters fetched and validated at once per replica")
    source_timeout_s: PositiveFloat = Field(
        default=30.0, description="limit for one request to a bucket or hub, at most 8 MiB; then it is tried again"
    )
    source_attempts: PositiveInt = Field(
        default=5, description="how often such a request is tried, with growing pauses, before the fetch fails"
    )
    resolve_wait_s: PositiveFloat = Field(
        default=30.0, description="`resolve`: so long a request waits for its adapter; then 503 while the fetch goes on"
    )
    prewarm: list[str] = Field(
        default_factory=list,
        description="adapters that a new replica fetches by itself, once it is ready: patterns of names in which `*` "
        "stands for any characters, the first ones first; of one pattern, those first that were asked for most",
    )
    absent_s: PositiveFloat = Field(
        default=30.0, description="`resolve`: a name without an adapter is not looked for again for so long"
    )
    refresh_s: PositiveFloat | None = Field(
        default=None,
        description="pause between looks at `folder`, `preload` and resolved adapters: new ones come, changed ones are "
        "replaced, deleted ones go; default: never",
    )
    peer_fetch: bool = Field(
        default=False, description="take adapters from nodes that have them already before their own source"
    )
    retry_after_s: PositiveFloat = Field(default=5.0, description="pause before an adapter that failed is tried again")

    @property
    def store_max_bytes(self) -> int:
        """``store_max_gib`` in bytes."""
        return int(self.store_max_gib * (1 << 30))

    @model_validator(mode="after")
    def _credentials_exist_and_fit(self) -> "AdaptersConfig":
        rules: tuple[AdapterSource | SourceRule | ResolveRule, ...] = (*self.preload, *self.sources, *self.resolve)
        for rule in rules:
            if rule.credentials is None:
                continue
            if (found := self.credentials.get(rule.credentials)) is None:
                raise ValueError(f"{rule.credentials!r} is none of adapters.credentials")
            if not rule.uri.startswith(f"{found.type}://"):
                raise ValueError(f"credentials {rule.credentials!r} are for {found.type}://, not for {rule.uri!r}")
        return self


class RedisConfig(_Section):
    """Where catalog and placement are kept."""

    url: str | None = Field(
        default=None,
        description="redis://…, rediss://… or redis+sentinel://host,host/service; default: a bundled server on the "
        "head, for one machine only",
    )
    key_prefix: str = Field(
        default="chameleon", min_length=1, description="prefix of every key and channel of this application"
    )
    heartbeat_s: PositiveFloat = Field(default=0.5, description="pause between two reports of a replica")
    heartbeat_ttl_s: PositiveFloat = Field(default=5.0, description="a replica silent for longer is taken for dead")
    timeout_s: PositiveFloat = Field(default=2.0, description="limit for one Redis call")


class RouterConfig(_Section):
    """Expected time to first token, per replica and adapter (`routing/ranking.py`)."""

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
    max_per_node: PositiveInt | None = Field(
        default=None, description="most ingress replicas on one node, so that no node takes all with it; default: any"
    )
    num_cpus: Annotated[float, Field(ge=0)] = Field(
        default=0.5, description="CPUs that Ray reserves per ingress replica"
    )
    max_ongoing_requests: PositiveInt = Field(default=4096, description="requests inside one ingress replica")
    max_body_mib: PositiveInt = Field(default=16, description="largest request body, in MiB")


class RelayConfig(_Section):
    """Requests on their way to a replica and back."""

    max_migrations: Annotated[int, Field(ge=0)] = Field(
        default=3,
        description="replicas that may die under one request before it ends with an error; 0: a begun stream ends at "
        "the first",
    )
    max_silence_s: PositiveFloat = Field(
        default=10.0,
        description="a replica that says nothing about a request for so long is taken for dead or cut off, and the "
        "request moves",
    )


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
    relay: RelayConfig = Field(default_factory=RelayConfig)
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
    if "credentials" in where:  # what was given may be a secret
        return f"{where!r}: {problem['msg']}"
    return f"{where!r}: {problem['msg']} (got {problem['input']!r})"


def _from_env(value: str) -> str:
    if not value.startswith("env:"):
        return value
    name = value.removeprefix("env:")
    if not (found := os.environ.get(name)):
        raise ConfigError(f"configuration: {value!r} names the environment variable {name}, which is not set")
    return found
