"""The KubeRay manifest, against KubeRay's own schema and against the rest of the repository."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from chameleon_ray import __version__

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "cluster_configs/kuberay.yaml"
SCHEMA = Path(__file__).parent / "data/kuberay_rayservice.yaml"


def strict(schema: Any) -> Any:
    """The schema, refusing unknown fields as ``kubectl apply`` does."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(part) for key, part in schema.items()}
    if "properties" in schema and schema.get("type") == "object":
        made.setdefault("additionalProperties", False)
    return made


def problems(manifest: Any) -> list[str]:
    validator = Draft202012Validator(strict(yaml.safe_load(SCHEMA.read_text())))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


@pytest.fixture
def manifest() -> Any:
    (document,) = yaml.safe_load_all(MANIFEST.read_text())
    return document


def containers(manifest: Any) -> list[Any]:
    cluster = manifest["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


def test_the_manifest_follows_kuberays_schema(manifest: Any) -> None:
    assert problems(manifest) == []


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda spec: spec.update(serveConfig="x"), "serveConfig"),
        (lambda spec: spec["rayClusterConfig"].pop("headGroupSpec"), "headGroupSpec"),
        (lambda spec: spec["rayClusterConfig"]["workerGroupSpecs"][0].pop("maxReplicas"), "maxReplicas"),
        (lambda spec: spec["rayClusterConfig"]["headGroupSpec"]["rayStartParams"].update(cpus=0), "cpus"),
        (lambda spec: spec["rayClusterConfig"]["workerGroupSpecs"][0].update(minReplicas="1"), "minReplicas"),
    ],
)
def test_the_schema_finds_faults(manifest: Any, spoil: Callable[[Any], object], named: str) -> None:
    spoilt = copy.deepcopy(manifest)
    spoil(spoilt["spec"])
    assert any(named in problem for problem in problems(spoilt))


def test_it_runs_the_image_that_the_dockerfile_makes_with_the_locked_ray(manifest: Any) -> None:
    assert {container["image"].rpartition(":")[2] for container in containers(manifest)} == {__version__}
    locks = [(ROOT / f"requirements/{name}.txt").read_text().split() for name in ("cpu", "gpu")]
    for lock in locks:
        assert f"ray=={manifest['spec']['rayClusterConfig']['rayVersion']}" in lock


def test_every_volume_that_is_mounted_exists(manifest: Any) -> None:
    cluster = manifest["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        spec = group["template"]["spec"]
        mounted = {mount["name"] for container in spec["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}
