"""A replica's policy as metrics: real reports of real caches and queues, and counters as strict as Ray's."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import pytest
from cache_driver import Driver
from queue_room import queues, request, step
from ray.serve.metrics import Counter, Gauge, Histogram

from chameleon_ray import metrics
from chameleon_ray.engine.report import WAITING_FOR, MemoryLimits, PolicyEvents, PolicyReport
from chameleon_ray.metrics import Metric
from chameleon_ray.policy.adapter import Adapter, Tier
from chameleon_ray.policy.admission import QueuesState, QueueState
from chameleon_ray.policy.cache_types import EvictReason
from chameleon_ray.policy.disciplines import UNLIMITED
from chameleon_ray.predictor.lengths import PredictionAccuracy
from deployments.policy_metrics import PolicyMetrics

ADAPTERS = [Adapter(f"{number:064x}", 8, 1000) for number in range(6)]


class Series:
    """What Prometheus would see: (name, tags) -> value; of a histogram its observations."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], Any] = {}
        self.num_increments = 0

    def __call__(self, name: str, **tags: str) -> Any:
        return self.values.get((name, self._tags(tags)))

    def total(self, metric: Metric) -> float:
        return sum(value for (name, _), value in self.values.items() if name == metric.name)

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.values}

    def make(self, kind: type, metric: Metric) -> Any:
        assert metric.kind == kind.__name__.lower(), metric
        return {Counter: _Counter, Gauge: _Gauge, Histogram: _Histogram}[kind](self, metric)

    def key(self, metric: Metric, tags: Mapping[str, str]) -> tuple[str, str]:
        assert set(tags) == set(metric.tag_keys), f"{metric.name} has the tags {metric.tag_keys}, not {tags}"
        assert all(isinstance(value, str) for value in tags.values())
        return metric.name, self._tags(tags)

    @staticmethod
    def _tags(tags: Mapping[str, str]) -> str:
        return ",".join(f"{name}={tags[name]}" for name in sorted(tags))


class _Made:
    def __init__(self, series: Series, metric: Metric) -> None:
        self._series = series
        self._metric = metric


class _Counter(_Made):
    def inc(self, value: float, tags: Mapping[str, str]) -> None:
        assert value > 0, "Ray's counters refuse an increment of 0"
        key = self._series.key(self._metric, tags)
        self._series.values[key] = self._series.values.get(key, 0) + value
        self._series.num_increments += 1


class _Gauge(_Made):
    def set(self, value: float, tags: Mapping[str, str]) -> None:
        self._series.values[self._series.key(self._metric, tags)] = value


class _Histogram(_Made):
    def observe(self, value: float, tags: Mapping[str, str]) -> None:
        assert self._metric.boundaries, "Ray's histograms need buckets"
        self._series.values.setdefault(self._series.key(self._metric, tags), []).append(value)


@pytest.fixture
def series(monkeypatch: pytest.MonkeyPatch) -> Series:
    made = Series()
    monkeypatch.setattr(metrics, "_make", made.make)
    return made


class Engine:
    """A real cache and real queues behind what the publisher asks an ``EngineServer``."""

    def __init__(self, scheduler: str = "static") -> None:
        self.tiers: dict[str, Tier] = {}
        self.predicted: dict[str, int] = {}
        self.driver = Driver(4, adapter_host_bytes=4000)
        self.cache = self.driver.cache
        self.queues = queues(scheduler, max_num_seqs=8)
        self.accuracy = PredictionAccuracy()
        self.events = PolicyEvents()
        self.num_inspection_failures = 0
        for adapter in ADAPTERS:
            self.cache.add(adapter, 2)

    def length_predictions(self) -> Mapping[str, int]:
        return self.predicted

    def take_policy_events(self) -> PolicyEvents:
        events, self.events = self.events, PolicyEvents()
        return events

    def policy_report(self) -> tuple[PolicyReport, float] | None:
        """As it comes out of the engine: through plain data."""
        cache = asdict(self.cache.stats())
        data = {
            "cache": cache | {"evictions": {str(reason): count for reason, count in cache["evictions"].items()}},
            "queues": asdict(self.queues.state()),
            "predictions": asdict(self.accuracy.snapshot()),
            "waiting": dict.fromkeys(WAITING_FOR, 0) | {"turn": self.queues.num_waiting},
            "oldest_waiting_s": 2.5,
            "limits": asdict(MemoryLimits(block_bytes=500, max_blocks=4, num_blocks=8, adapter_host_bytes=4000)),
            "num_inspection_failures": self.num_inspection_failures,
        }
        return PolicyReport.of(data), 0.0

    def use(self, number: int, now_s: float) -> None:
        """One request for an adapter, from its arrival to its end, with whatever has to be loaded and evicted."""
        digest, request_id = ADAPTERS[number].digest, f"{number}-{now_s}"
        self.driver.enqueue(request_id, digest, now_s)
        while self.cache.state(digest) != "resident":
            held = self.cache.stats().blocks_held
            plan = self.cache.plan([digest], 8 - held, now_s)
            self.cache.commit(plan, now_s)
            for name in plan.fetch:
                self.cache.fetched(name)
            for name in plan.load:
                self.cache.loaded(name)
        self.driver.acquire(request_id, now_s)
        self.driver.release(request_id, now_s)


def test_cache_counts_and_gauges(series: Series) -> None:
    engine, published = Engine(), PolicyMetrics()
    for now_s, number in enumerate((0, 0, 1, 2, 3)):
        engine.use(number, float(now_s))
    published.publish(engine, engine.tiers)
    stats = engine.cache.stats()
    assert (series("chameleon_adapter_hits"), series("chameleon_adapter_misses")) == (1, 4)
    assert series("chameleon_adapter_evictions", reason="share_bound") == stats.evictions[EvictReason.SHARE_BOUND] == 2
    assert series("chameleon_adapter_blocks") == 4 and series("chameleon_adapter_bytes") == 2000
    assert series("chameleon_adapter_blocks_limit") == 4
    assert series("chameleon_adapter_host_bytes") == stats.host_bytes_held > 0
    assert series("chameleon_adapter_loads", stage="load") == stats.loads == 4
    assert series("chameleon_adapter_loads", stage="fetch") == stats.fetches == 4
    assert series("chameleon_adapter_loads_in_flight", stage="load") == 0
    assert series("chameleon_oldest_waiting_s") == 2.5


def test_the_same_report_again_counts_nothing_twice(series: Series) -> None:
    engine, published = Engine(), PolicyMetrics()
    engine.use(0, 0.0)
    engine.predicted = {"model": 3, "history": 0}
    published.publish(engine, engine.tiers)
    increments, before = series.num_increments, dict(series.values)
    published.publish(engine, engine.tiers)
    assert (series.num_increments, series.values) == (increments, before)
    assert series("chameleon_length_predictions", source="model") == 3
    assert series("chameleon_length_predictions", source="history") is None, "a counter of 0 was not counted"
    engine.use(0, 1.0)
    engine.predicted = {"model": 5, "history": 1}
    published.publish(engine, engine.tiers)
    assert series("chameleon_adapter_hits") == 1
    assert series("chameleon_length_predictions", source="model") == 5
    assert series("chameleon_length_predictions", source="history") == 1


def test_loads_under_way_and_failures_by_stage(series: Series) -> None:
    engine, published = Engine(), PolicyMetrics()
    first, second = ADAPTERS[0].digest, ADAPTERS[1].digest
    for digest in (first, second):
        engine.driver.enqueue(f"for {digest}", digest, 0.0)
    plan = engine.cache.plan([first, second], 8, 0.0)
    engine.cache.commit(plan, 0.0)
    published.publish(engine, engine.tiers)
    assert series("chameleon_adapter_loads_in_flight", stage="fetch") == 2
    engine.cache.fetched(first)
    engine.cache.commit(engine.cache.plan([first], 8, 0.0), 0.0)
    engine.cache.failed(second)
    engine.num_inspection_failures = 2
    published.publish(engine, engine.tiers)
    assert series("chameleon_adapter_loads_in_flight", stage="fetch") == 0
    assert series("chameleon_adapter_loads_in_flight", stage="load") == 1
    engine.cache.failed(first)
    published.publish(engine, engine.tiers)
    stages = ("inspection", "fetch", "load")
    assert [series("chameleon_adapter_load_failures", stage=stage) for stage in stages] == [2, 1, 1]


def test_queues_by_index_and_what_is_gone_is_zero(series: Series) -> None:
    engine, published = Engine("static"), PolicyMetrics()
    for number, tokens in enumerate((10, 60, 110, 160, 190)):
        engine.queues.add(request(f"r{number}", tokens), 0.0)
    engine.queues.refresh(0.0)
    assert len(step(engine.queues, 1.0, max_admitted=2)) == 2
    published.publish(engine, engine.tiers)
    state = engine.queues.state()
    assert len(state.queues) == series("chameleon_queues") == 4
    assert series.total(metrics.REPORTED["chameleon_queue_waiting"]) == state.num_admissions + 1 == 3
    assert series.total(metrics.REPORTED["chameleon_queue_running"]) == 2
    for index, queue in enumerate(state.queues):
        tag = str(index)
        assert series("chameleon_queue_waiting", queue=tag) == queue.num_waiting
        assert series("chameleon_queue_quota_tokens", queue=tag) == queue.quota_tokens > 0
        assert series("chameleon_queue_used_tokens", queue=tag) == queue.used_tokens
        assert series("chameleon_queue_cutoff", queue=tag) == (queue.max_size if index < 3 else 0)
    assert series("chameleon_admissions") == 2
    assert series("chameleon_queue_refreshes") == state.num_refreshes >= 1
    assert series("chameleon_quota_minima_scale") == 1.0
    assert series("chameleon_waiting_requests", reason="turn") == 3
    assert series("chameleon_waiting_requests", reason="load") == 0

    engine.queues = queues("fifo")
    engine.queues.add(request("next", 30), 0.0)
    engine.queues.add(request("last", 30), 0.0)
    step(engine.queues, max_admitted=1)
    published.publish(engine, engine.tiers)
    assert series("chameleon_queues") == 1
    expected = {"waiting": 1, "running": 1, "used_tokens": 30, "quota_tokens": 0, "cutoff": 0}
    for name, first in expected.items():
        shown = [series(f"chameleon_queue_{name}", queue=str(index)) for index in range(4)]
        assert shown == [first, 0, 0, 0], name


def test_bypasses_squashes_holds_and_a_scale_below_one(series: Series) -> None:
    published, report = PolicyMetrics(), Engine().policy_report()
    assert report is not None
    queue = QueueState(5.0, 1, 0, 2, UNLIMITED, 100, 50)
    state = QueuesState(
        (queue,), 2, 0.25, num_admissions=9, num_bypasses=4, num_squashes=2, num_refreshes=3, num_holds=1
    )
    published.publish_report(replace(report[0], queues=state))
    counts = ("admissions", "bypasses", "squashes", "queue_refreshes", "holds", "quota_minima_scale")
    assert [series(f"chameleon_{name}") for name in counts] == [9, 4, 2, 3, 1, 0.25]


def test_durations_go_into_the_histogram_of_their_stage_or_queue_once(series: Series) -> None:
    engine, published = Engine(), PolicyMetrics()
    engine.events.record({"waited": [[0, 0.5], [3, 2.0], [7, 9.0]], "seconds": {"fetch": [0.25, 0.75], "load": [0.01]}})
    published.publish(engine, engine.tiers)
    published.publish(engine, engine.tiers)
    assert series("chameleon_adapter_load_s", stage="fetch") == [0.25, 0.75]
    assert series("chameleon_adapter_load_s", stage="load") == [0.01]
    assert series("chameleon_queue_wait_s", queue="0") == [0.5]
    assert series("chameleon_queue_wait_s", queue="3") == [2.0, 9.0], "no more than four values of the tag"


def test_accuracy_only_once_there_is_one(series: Series) -> None:
    engine, published = Engine(), PolicyMetrics()
    published.publish(engine, engine.tiers)
    assert series("chameleon_length_accuracy") is None
    engine.accuracy.record(10, 12)
    engine.accuracy.record(10, 100)
    published.publish(engine, engine.tiers)
    assert series("chameleon_length_accuracy") == 0.5
    assert series("chameleon_length_error_tokens") == 46.0


def test_adapters_by_tier(series: Series) -> None:
    engine, published = Engine(), PolicyMetrics()
    engine.tiers = {"a": Tier.GPU, "b": Tier.DISK, "c": Tier.DISK}
    published.publish(engine, engine.tiers)
    assert [series("chameleon_adapters", tier=tier) for tier in ("gpu", "host", "disk")] == [1, 0, 2]
    engine.tiers = {"a": Tier.HOST}
    published.publish(engine, engine.tiers)
    assert [series("chameleon_adapters", tier=tier) for tier in ("gpu", "host", "disk")] == [0, 1, 0]


def test_without_a_report_nothing_is_claimed_about_cache_and_queues(
    series: Series, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine()
    monkeypatch.setattr(engine, "policy_report", lambda: None)
    PolicyMetrics().publish(engine, engine.tiers)
    assert series.names == {"chameleon_adapters"}


def test_tags_take_few_values_and_rays_own_classes_take_what_is_published() -> None:
    """Ray checks names and tags itself; a recorder of the test's own could be too kind."""
    engine, published = Engine(), PolicyMetrics()
    engine.use(0, 0.0)
    engine.predicted = {"model": 1}
    engine.accuracy.record(1, 1)
    engine.events.record({"waited": [[0, 0.0]], "seconds": {"fetch": [0.0], "load": [0.5]}})
    published.publish(engine, engine.tiers)
    allowed = {"queue", "reason", "stage", "tier", "source", "outcome"}
    named: defaultdict[str, int] = defaultdict(int)
    for metric in metrics.all_metrics():
        named[metric.name] += 1
        assert set(metric.tag_keys) <= allowed, metric
    assert max(named.values()) == 1
