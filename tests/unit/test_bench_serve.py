"""Measuring targets in turn, the search for the highest load, and the command as a whole."""

import argparse
import asyncio
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from stream_server import StreamServer, bounded, serving

from chameleon_ray.bench.load import comparison
from chameleon_ray.bench.load.client import Outcome, session
from chameleon_ray.bench.load.errors import LoadError
from chameleon_ray.bench.load.figures import Slo
from chameleon_ray.bench.load.lengths import Lengths, scaled, synthetic_lengths
from chameleon_ray.bench.load.measure import Bench, Load, Progress
from chameleon_ray.bench.load.prompts import PLAIN_WORDS, Prompts
from chameleon_ray.bench.load.search import RateSearch, SearchOptions, Verdict, find_highest
from chameleon_ray.bench.load.show import table
from chameleon_ray.bench.load.targets import Target
from chameleon_ray.bench.load.workload import Workload
from chameleon_ray.bench.serve import add_arguments, run

OPTIONS = SearchOptions(start_per_s=1.0, max_per_s=100.0, precision=0.05)


def search(capacities: Mapping[str, float], options: SearchOptions = OPTIONS) -> tuple[dict[str, RateSearch], int]:
    """Targets that hold up to a sharp limit; the searches and the number of probes."""
    probes = 0

    async def probe(rates: Mapping[str, float]) -> dict[str, Verdict]:
        nonlocal probes
        probes += 1
        assert probes < 50
        return {name: Verdict.HELD if rate <= capacities[name] else Verdict.FAILED for name, rate in rates.items()}

    return asyncio.run(find_highest({name: RateSearch(options) for name in capacities}, probe)), probes


@pytest.mark.parametrize("capacity", [0.21, 0.99, 1.0, 7.3, 99.0])
def test_the_search_ends_just_below_the_capacity(capacity: float) -> None:
    found = search({"x": capacity})[0]["x"]
    assert capacity / 1.05 <= found.held_per_s <= capacity < found.failed_per_s <= found.held_per_s * 1.05
    assert not found.is_client_limited


def test_targets_are_searched_side_by_side() -> None:
    both, probes = search({"x": 7.3, "y": 0.4})
    assert probes == max(search({"x": 7.3})[1], search({"y": 0.4})[1])
    assert both["y"].held_per_s < 0.4 < both["y"].failed_per_s


def test_the_search_ends_at_the_highest_and_the_lowest_load() -> None:
    top = search({"x": 1e9})[0]["x"]
    assert (top.held_per_s, top.failed_per_s) == (100.0, None)
    bottom = search({"x": 0.0})[0]["x"]
    assert bottom.held_per_s is None
    assert bottom.failed_per_s == pytest.approx(1 / 32)


def test_what_a_late_client_measured_is_measured_again_and_then_refused() -> None:
    noisy = RateSearch(OPTIONS)
    noisy.report(1.0, Verdict.CLIENT_LATE)
    assert (noisy.next_rate(), noisy.failed_per_s) == (1.0, None)
    noisy.report(1.0, Verdict.HELD)
    for _ in range(3):
        assert noisy.next_rate() == 2.0
        noisy.report(2.0, Verdict.CLIENT_LATE)
    assert (noisy.held_per_s, noisy.failed_per_s, noisy.is_client_limited) == (1.0, 2.0, True)


def test_the_search_finds_the_capacity_of_a_simulated_server() -> None:
    """Requests of 0.1 s each, one after the other: with a lenient limit it holds almost up to 10 requests/s."""
    one = Lengths(np.array([10]), np.array([5]))
    workload = Workload(one, {"m": None}, {"m": 1.0}, seed=4)
    slo = Slo("ttft", 2.0, 99.0)

    async def probe(rates: Mapping[str, float]) -> dict[str, Verdict]:
        verdicts = {}
        for name, rate in rates.items():
            free_s, outcomes = 0.0, []
            for plan in workload.poisson(0, rate, duration_s=500.0):
                start_s = max(plan.at_s, free_s)
                free_s = start_s + 0.1
                outcomes.append(Outcome(plan, ttft_s=free_s - plan.at_s, e2e_s=free_s - plan.at_s))
            verdicts[name] = Verdict.HELD if slo.is_held(outcomes) else Verdict.FAILED
        return verdicts

    found = asyncio.run(find_highest({"x": RateSearch(OPTIONS)}, probe))["x"]
    assert 8.0 < found.held_per_s < 10.2


@pytest.mark.parametrize("wrong", [(0.0, 1.0, 0.1), (2.0, 1.0, 0.1), (1.0, 2.0, 0.0)])
def test_impossible_searches_are_refused(wrong: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="give"):
        SearchOptions(*wrong)


class Diary(Progress):
    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ended: list[Outcome] = []

    def begin(self, target: str, what: str, num_requests: int) -> None:
        self.begun.append(target)

    def done(self, outcome: Outcome) -> None:
        self.ended.append(outcome)


def make_workload(model: str) -> Workload:
    return Workload(scaled(synthetic_lengths(0), 200), {model: None}, {model: 1.0}, seed=1)


def test_windows_alternate_between_targets_and_all_get_the_same_requests() -> None:
    async def test() -> None:
        one, other, diary = StreamServer(gap_s=0.0), StreamServer(gap_s=0.0), Diary()
        prompts = Prompts(PLAIN_WORDS, 1.0, 0.0, nonce=1)
        async with serving(one), serving(other), session({}, 60.0) as opened:
            targets = [Target("x", one.url), Target("y", other.url)]
            bench = Bench(targets, make_workload("m"), prompts, opened, diary)
            load = Load(rate_per_s=40.0, num_windows=3, window_s=0.3, drain_limit_s=60.0)
            results = await bench.loaded({"x": load, "y": load})
        assert diary.begun == ["x", "y", "y", "x", "x", "y"]
        plans = {name: [[o.plan for o in w.outcomes] for w in windows] for name, windows in results.items()}
        assert plans["x"] == plans["y"]
        assert len(diary.ended) == sum(map(len, plans["x"] + plans["y"])) > 20
        bodies = [body["prompt"] for body in one.requests + other.requests if len(body["prompt"].split()) > 8]
        assert len(set(bodies)) == len(bodies)

    bounded(test)


def test_a_target_that_cannot_hold_any_more_is_left_alone() -> None:
    async def test() -> None:
        server = StreamServer()
        async with serving(server), session({}, 60.0) as opened:
            prompts = Prompts(PLAIN_WORDS, 1.0, 0.0, nonce=1)
            bench = Bench([Target("x", server.url)], make_workload("busy"), prompts, opened, Progress())
            load = Load(rate_per_s=40.0, num_windows=50, window_s=0.3, drain_limit_s=60.0)
            results = await bench.loaded({"x": load}, stop_below=Slo("ttft", 1.0, 99.0))
        assert len(results["x"]) == 1

    bounded(test)


def test_a_burst_tells_the_rate_of_what_is_answered_in_time() -> None:
    async def test() -> None:
        server = StreamServer(first_token_s=0.1, gap_s=0.0)
        async with serving(server), session({}, 60.0) as opened:
            prompts = Prompts(PLAIN_WORDS, 1.0, 0.0, nonce=1)
            bench = Bench([Target("x", server.url)], make_workload("m"), prompts, opened, Progress())
            rates = await bench.burst(["x"], 20, limit_s=60.0)
            assert 0 < rates["x"] <= 20 / 0.1
            assert len(server.requests) == 20
            broken = Bench([Target("x", server.url)], make_workload("busy"), prompts, opened, Progress())
            with pytest.raises(LoadError, match=r"x answers nothing .*http_503"):
                await broken.burst(["x"], 3, limit_s=60.0)

    bounded(test)


def test_after_cutting_requests_short_the_next_window_waits_for_the_server() -> None:
    async def test() -> None:
        server = StreamServer()
        async with serving(server), session({}, 60.0) as opened:
            prompts = Prompts(PLAIN_WORDS, 1.0, 0.0, nonce=1)
            bench = Bench([Target("x", server.url)], make_workload("stuck"), prompts, opened, Progress())
            load = Load(rate_per_s=40.0, num_windows=1, window_s=0.3, drain_limit_s=1.0)
            (window,) = (await bench.loaded({"x": load}))["x"]
        assert any(outcome.error == "unfinished" for outcome in window.outcomes)
        assert len(server.requests) == len(window.outcomes) + 1
        assert server.requests[-1]["max_tokens"] == 1

    bounded(test)


def test_a_target_that_fails_without_load_stops_the_benchmark() -> None:
    async def test() -> None:
        server = StreamServer()
        async with serving(server), session({}, 60.0) as opened:
            prompts = Prompts(PLAIN_WORDS, 1.0, 0.0, nonce=1)
            bench = Bench([Target("x", server.url)], make_workload("busy"), prompts, opened, Progress())
            with pytest.raises(LoadError, match=r"busy: http_503: .*overloaded"):
                await bench.warm_up(["busy"])
            with pytest.raises(LoadError, match="http_503"):
                await bench.unloaded(1)

    bounded(test)


@contextmanager
def running(*servers: StreamServer) -> Iterator[None]:
    """Servers in a thread, for a command with an event loop of its own."""
    ready, ending, loop = threading.Event(), asyncio.Event(), asyncio.new_event_loop()

    async def serve() -> None:
        async with serving(servers[0]), serving(servers[1]):
            ready.set()
            await ending.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(60.0)
        yield
    finally:
        loop.call_soon_threadsafe(ending.set)
        thread.join(60.0)
        loop.close()


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(words))


def test_the_command_measures_searches_and_writes_everything_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "WINDOW_SLOS", 1)
    cards = [{"id": "base", "max_model_len": 100}]
    cards += [{"id": f"a-r{rank}-{number}", "parent": "base"} for rank in (8, 64) for number in range(2)]
    one, other = StreamServer(models=cards, gap_s=0.0), StreamServer(models=cards, gap_s=0.0)
    file = tmp_path / "figures.json"
    with running(one, other):
        targets = ["--target", f"x={one.url}", "--target", f"y={other.url}/v1"]
        # objectives that a busy machine meets as well; the search tries one load and is content
        easy = ["--slo-s", "2", "--slo-percent", "1", "--max-late-ms", "60000", "--start-rate", "20"]
        sizes = ["--window-s", "0.5", "--num-windows", "1", "--unloaded-requests", "4", "--min-requests", "1"]
        search_too = ["--find-max", "--max-rate", "20", "--rates", "40", "--json", str(file)]
        assert command(*targets, *easy, *sizes, *search_too) == 0
    printed = capsys.readouterr().out
    results = json.loads(file.read_text())
    assert results["complete"]
    assert results["slo"] == {"metric": "ttft", "limit_s": 2.0, "percent": 1.0}
    assert [(load["target"], load["rate_per_s"]) for load in results["loads"]] == [
        ("x", 40.0),
        ("y", 40.0),
        ("x", 20.0),
        ("y", 20.0),
    ]
    for load in results["loads"]:
        assert load["failed"] == load["short_answers"] == 0
        assert load["ttft"]["p50_ms"] >= 20
        assert set(load["by_rank"]) <= {"8", "64"}
        assert sum(group["requests"] for group in load["by_class"].values()) == load["requests"] > 0
    assert results["highest_load"]["x"] == {"held_per_s": 20.0, "failed_per_s": None, "client_limited": False}
    assert set(results["unloaded"]) == {"x", "y"}
    assert "y at 40 requests/s" in printed
    assert "rank 64" in printed
    assert "x: holds the SLO at 20 requests/s, the highest load tried" in printed
    assert {body["model"] for body in one.requests} == {card["id"] for card in cards[1:]}


def test_bad_input_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--target", "x") == 1
    assert command("--target", "http://127.0.0.1:9") == 1
    assert command("--target", "http://127.0.0.1:9", "--target", "http://127.0.0.1:9") == 1
    assert command("--json", "no/such/folder/f.json") == 1
    errors = capsys.readouterr().err
    assert "cannot write no/such/folder/f.json" in errors
    assert "--target x: give http://" in errors
    assert "/v1/models lists no models" in errors
    assert "two targets have the same name" in errors


FIGURES = {"requests": 0, "failed": 0, "slo_share": None} | {
    metric: {"mean_ms": 5.0, "p50_ms": 4.0, "p90_ms": 6.0, "p99_ms": 9.0, "max_ms": 10.0}
    for metric in ("ttft", "tbt", "e2e", "lateness")
}


def test_whatever_casts_doubt_on_a_measurement_is_in_the_table() -> None:
    figures = FIGURES | {
        "requests_per_s": 1.0,
        "output_tokens_per_s": 1.0,
        "client_cpu_share": 0.5,
        "errors": {"http_503": 3},
        "error_examples": {"http_503": "overloaded"},
        "short_answers": 2,
        "prompt_tokens_off_percent": 12.0,
        "client_late": True,
        "by_class": {},
        "by_rank": {"0": FIGURES | {"requests": 1}},
    }
    text = table("x", figures, 0.05)
    for part in ("FAILED 3 x http_503: overloaded", "SHORT: 2", "12% off", "CLIENT LATE", "rank unknown"):
        assert part in text
