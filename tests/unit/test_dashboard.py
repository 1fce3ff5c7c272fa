"""The Grafana dashboard is the one that the code makes, and asks for metrics that exist, as what they are."""

import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from chameleon_ray import dashboard as maker
from chameleon_ray import metrics
from chameleon_ray.metrics import Metric

ROOT = Path(__file__).parents[2]
SERVE_TAGS = {"application", "deployment", "replica"}


def dashboard() -> dict[str, Any]:
    return dict(json.loads(maker.FILE.read_text()))


def expressions() -> Iterator[str]:
    """Every PromQL expression of the dashboard, those of its variables included."""
    for panel in dashboard()["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]


def our_series() -> dict[str, Metric]:
    """The names under which Prometheus knows our metrics."""
    endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
    return {f"ray_{metric.name}{ending}": metric for metric in metrics.all_metrics() for ending in endings[metric.kind]}


def test_the_file_is_the_one_that_the_code_makes_and_shows_every_metric_of_ours() -> None:
    assert maker.FILE.read_text() == maker.dashboard(), "run: python -m chameleon_ray.reference_tables"
    shown = {name for expression in expressions() for name in re.findall(r"\bray_\w+", expression)}
    assert {metric.name for metric in metrics.all_metrics()} == {
        our_series()[name].name for name in shown & our_series().keys()
    }


def test_every_metric_declared_is_published_as_what_it_is_declared_as() -> None:
    code = "".join(path.read_text() for top in ("chameleon_ray", "deployments") for path in (ROOT / top).rglob("*.py"))
    for attribute, metric in vars(metrics).items():
        if isinstance(metric, Metric):
            used = set(re.findall(rf"metrics\.{attribute}\.(counter|gauge|histogram)\(\)", code))
            used |= {"counter" for _ in re.findall(rf"\.publish\(metrics\.{attribute},", code)}
            assert used == {metric.kind}, metric.name


def vllm_series() -> set[str]:
    """vLLM's names through Ray, from its source: importing it takes long."""
    spec = find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0], "v1/metrics/loggers.py").read_text()
    names = {f"ray_vllm_{name}" for name in re.findall(r'name="vllm:(\w+)"', source)}
    return names | {f"{name}{ending}" for name in names for ending in ("_total", "_bucket", "_count", "_sum")}


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_every_metric_asked_for_exists_with_the_tags_asked_for(expression: str) -> None:
    ours, names = our_series(), set(re.findall(r"\bray_\w+", expression))
    assert names, expression
    unknown = names - ours.keys() - vllm_series()
    assert not unknown, expression
    for opening, closing in ("()", "[]", "{}"):
        assert expression.count(opening) == expression.count(closing)
    tags = set(re.findall(r"(\w+)=~", expression))
    tags |= {tag for group in re.findall(r" by \(([\w, ]+)\)", expression) for tag in group.split(", ")}
    for name in names & ours.keys():
        assert tags - {"le"} <= SERVE_TAGS | set(ours[name].tag_keys), f"{name}: {tags}"


def test_legends_name_tags_that_are_left() -> None:
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            grouped = re.findall(r" by \(([\w, ]+)\)", target["expr"])
            kept = {tag for group in grouped for tag in group.split(", ")}
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= kept, target


def test_panels_do_not_overlap_and_say_what_they_show() -> None:
    seen: set[tuple[int, int]] = set()
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & seen and place["x"] + place["w"] <= 24, panel["title"]
        seen |= cells
        assert panel["type"] == "row" or (panel["description"] and panel["targets"])
