"""The shipped cluster configurations, and what is said about wrong ones."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from chameleon_ray.config import AppConfig, ConfigError

CONFIGS = Path(__file__).parents[2] / "cluster_configs"
FILES = sorted(path for path in CONFIGS.rglob("*.yaml"))
MODEL = {"source": "some/model"}


def serve_configs(path: Path) -> list[dict[str, Any]]:
    """The Serve configurations in a file: the file itself, or those inside KubeRay's RayService resources."""
    found = []
    for document in yaml.safe_load_all(path.read_text()):
        if isinstance(document, dict) and document.get("kind") == "RayService":
            found.append(yaml.safe_load(document["spec"]["serveConfigV2"]))
        elif isinstance(document, dict) and "applications" in document:
            found.append(document)
    return found


SHIPPED = [pytest.param(config, id=str(path.relative_to(CONFIGS))) for path in FILES for config in serve_configs(path)]


def test_there_are_configurations() -> None:
    assert (CONFIGS / "local.yaml") in FILES
    assert all(serve_configs(path) for path in FILES if path.parent == CONFIGS), "a file without a Serve configuration"


@pytest.mark.parametrize("config", SHIPPED)
def test_shipped_configurations_are_valid(config: dict[str, Any]) -> None:
    deployed = ServeDeploySchema.model_validate(config)
    assert deployed.applications
    for application in deployed.applications:
        assert application.import_path == "deployments.app:build"
        settings = AppConfig.from_args(application.args)
        assert settings.model.source


def test_the_local_configuration_is_closed_to_other_machines() -> None:
    (config,) = serve_configs(CONFIGS / "local.yaml")
    assert config["http_options"]["host"] == "127.0.0.1"


def test_adapter_management_is_not_open_without_a_key_where_others_can_reach_it() -> None:
    for path in FILES:
        for config in serve_configs(path):
            for application in config["applications"]:
                api = AppConfig.from_args(application["args"]).api
                if api.admin_open_on_loopback:
                    assert config["http_options"]["host"] == "127.0.0.1", path
                assert api.admin_key is None or api.admin_key.startswith("env:"), f"{path} holds a key"


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({}, "'model' is required"),
        ({"model": {}}, "'model.source' is required"),
        ({"model": MODEL, "modle": {}}, "unknown key 'modle'"),
        ({"model": MODEL, "engine": {"max_lora": 8}}, "unknown key 'engine.max_lora'"),
        ({"model": MODEL, "engine": {"max_loras": "8"}}, "'engine.max_loras'"),
        ({"model": MODEL, "engine": {"max_loras": 0}}, "'engine.max_loras'"),
        (
            {"model": MODEL, "engine": {"adapter_memory": "stock", "max_loras": 8, "max_cpu_loras": 4}},
            "max_cpu_loras (4)",
        ),
        ({"model": MODEL, "engine": {"max_cpu_loras": 100}}, "engine.max_cpu_loras: without effect"),
        ({"model": MODEL, "engine": {"adapter_memory": "paged", "max_loras": 8}}, "engine.max_loras: without effect"),
        (
            {"model": MODEL, "engine": {"adapter_memory": "slots", "adapter_memory_share": 0.5}},
            "engine.adapter_memory_share: without effect with engine.adapter_memory slots",
        ),
        (
            {"model": MODEL, "engine": {"adapter_memory": "stock", "scheduler": "fifo", "adapter_policy": "lru"}},
            "engine.adapter_policy, engine.scheduler: without effect",
        ),
        ({"model": MODEL, "adapters": {"preload": [{"name": "a"}]}}, "'adapters.preload.0.uri' is required"),
        ({"model": MODEL, "replicas": {"autoscaling": {}}}, "'replicas.autoscaling.max_replicas' is required"),
        ({"model": MODEL, "redis": {"key_prefix": ""}}, "'redis.key_prefix'"),
        ({"model.source": "some/model", "engine.max_loras": "many"}, "'engine.max_loras'"),
        ({"model.source": "some/model", "model.source.x": "1"}, "source is a value"),
    ],
)
def test_errors_name_the_key(args: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AppConfig.from_args(args)
    assert named in str(caught.value)


def test_command_line_arguments_say_the_same_as_a_file() -> None:
    nested = AppConfig.from_args(
        {"model": {"source": "some/model", "name": "m"}, "engine": {"max_loras": 4, "enforce_eager": True}}
    )
    flat = {"model.source": "some/model", "model.name": "m", "engine.max_loras": "4", "engine.enforce_eager": "true"}
    assert AppConfig.from_args(flat) == nested


def test_replicas_know_from_the_dump_what_an_operator_has_set() -> None:
    given = {"model": MODEL, "engine": {"adapter_memory": "slots", "max_loras": 8}}
    config = AppConfig.from_args(given)
    read = AppConfig.model_validate(config.model_dump(mode="json", exclude_unset=True))
    assert read == config and read.engine.ignored_options("paged") == ["max_loras"]
