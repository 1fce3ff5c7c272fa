"""A release's files agree about its version and its licence."""

import re
from pathlib import Path

import pytest
import yaml

from chameleon_ray import __version__

ROOT = Path(__file__).parents[2]


def test_every_file_names_the_same_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == __version__
    for name in ("Dockerfile", "cluster_configs/kuberay.yaml"):
        tags = set(re.findall(r"chameleon-ray:(\d+\.\d+\.\d+)", (ROOT / name).read_text()))
        assert tags == {__version__}, name


def test_every_file_that_the_dockerfile_copies_exists() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    paths = [path for line in copied for path in line.split()]
    assert len(paths) > 8
    assert not [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize("name", ["cpu", "demo", "dev", "gpu"])
def test_locks_hold_exact_versions_once(name: str) -> None:
    lines = (ROOT / f"requirements/{name}.txt").read_text().split()
    assert lines and all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in lines)
    packages = [line.partition("==")[0].lower().replace("_", "-") for line in lines]
    assert len(set(packages)) == len(packages)
