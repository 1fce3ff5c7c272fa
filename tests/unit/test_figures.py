"""A figure is declared once, at its field, and reaches everything that shows figures."""

from dataclasses import dataclass, field, replace
from typing import Any

from test_queues_api import Engine, report

from chameleon_ray import metrics, queues_view
from chameleon_ray.dashboard import dashboard
from chameleon_ray.engine.report import PolicyReport
from chameleon_ray.policy.disciplines import UNLIMITED
from chameleon_ray.policy.figures import Sample, Series, declared, level, samples, total
from chameleon_ray.reference_tables import metrics_table
from deployments.queues_api import replica_queues


@dataclass(frozen=True, slots=True)
class Lane:
    length: int = field(metadata=level("lane_length", "Of a lane."))
    limit: float = field(metadata=level("lane_limit", "0: no bound."))


@dataclass(frozen=True, slots=True)
class Road:
    lanes: tuple[Lane, ...] = field(metadata=level("lanes", "How many.", key_tag="lane"))
    crashes: dict[str, int] = field(metadata=total("crashes", "By cause.", key_tag="cause"))
    cars: int = field(metadata=total("vehicles", "car: cars.", kind="car"))
    bikes: int = field(metadata=total("vehicles", "bike: bikes.", kind="bike"))
    speed: float | None = field(metadata=level("speed", "Once something drives."))
    name: str


@dataclass(frozen=True, slots=True)
class Map:
    road: Road


def test_metrics_are_those_of_the_fields() -> None:
    assert declared(Map) == {
        "lanes": Series("lanes", "How many.", False, ()),
        "lane_length": Series("lane_length", "Of a lane.", False, ("lane",)),
        "lane_limit": Series("lane_limit", "0: no bound.", False, ("lane",)),
        "crashes": Series("crashes", "By cause.", True, ("cause",)),
        "vehicles": Series("vehicles", "car: cars. bike: bikes.", True, ("kind",)),
        "speed": Series("speed", "Once something drives.", False, ()),
    }


def test_samples_are_the_values_of_the_fields_and_what_has_no_bound_is_0() -> None:
    lanes = (Lane(3, UNLIMITED), Lane(4, float("inf")))
    found = list(samples(Map(Road(lanes, {"ice": 2}, 5, 6, None, "A1"))))
    assert found == [
        Sample("lanes", False, {}, 2),
        Sample("lane_length", False, {"lane": "0"}, 3),
        Sample("lane_limit", False, {"lane": "0"}, 0),
        Sample("lane_length", False, {"lane": "1"}, 4),
        Sample("lane_limit", False, {"lane": "1"}, 0),
        Sample("crashes", True, {"cause": "ice"}, 2),
        Sample("vehicles", True, {"kind": "car"}, 5),
        Sample("vehicles", True, {"kind": "bike"}, 6),
    ]


def test_what_is_reported_is_what_is_declared() -> None:
    policy, series = report("static"), declared(PolicyReport)
    told = list(samples(replace(policy, accuracy=replace(policy.accuracy, right_bucket_share=1.0))))
    assert {sample.name for sample in told} == series.keys() - {"chameleon_length_error_tokens"}
    for sample in told:
        assert set(sample.tags) == set(series[sample.name].tag_keys) and sample.is_total == series[sample.name].is_total


def test_a_count_of_the_queues_reaches_everything_that_shows_figures() -> None:
    """Prometheus, the endpoint's JSON, the command's table, the documentation, the dashboard."""
    policy = report("static")
    counts: dict[str, Any] = {
        one: 100 + number
        for number, one in enumerate(type(policy.queues).__dataclass_fields__)
        if one.startswith("num_")
    }
    del counts["num_running"]
    changed = replace(policy, queues=replace(policy.queues, **counts))
    answer = replica_queues("r1", Engine(changed))
    view, published = queues_view.tables([answer]), {sample.name: sample.value for sample in samples(changed)}
    assert len(counts) >= 5
    for name, count in counts.items():
        short = name.removeprefix("num_")
        (metric,) = (name for name, value in published.items() if value == count)
        assert answer["scheduler"][short] == count and f"{short} {count}" in view
        assert metrics.REPORTED[metric].kind == "counter"
        assert f"`{metric}`" in metrics_table() and f"ray_{metric}_total" in dashboard()
