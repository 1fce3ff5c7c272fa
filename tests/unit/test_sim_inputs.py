"""Cost models and workloads: what is accepted, what is refused with which words, and how well they fit."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from chameleon_ray.sim.costs import CostModelError, load_cost_model
from chameleon_ray.sim.grid import load_grid
from chameleon_ray.sim.scenario import Scenario, simulate
from chameleon_ray.sim.workload import (
    AdapterMix,
    Bursts,
    TraceError,
    WorkloadConfig,
    generate,
    load_trace,
    make_adapters,
    sample_lengths,
)

TRACE = os.environ.get("CHAMELEON_AZURE_TRACE", "")
HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.fixture
def small_trace(tmp_path):
    path = tmp_path / "trace.csv"
    lines = (f"2023-11-16 18:00:{second:02}.{second}000000,{100 + second},{second + 1}\n" for second in range(10))
    path.write_text(HEAD + "".join(lines))
    return path


def test_the_a40_model_gives_the_published_ttfts():
    model = load_cost_model("a40-llama-7b")
    for rank, published_s in {8: 0.074, 16: 0.078, 32: 0.088, 64: 0.107, 128: 0.144}.items():
        size_bytes = rank * model.memory.adapter_bytes_per_rank
        ttft_s = size_bytes / model.links.host_bytes_s + model.step_s(512, 0, 512 * rank, size_bytes)
        assert ttft_s == pytest.approx(published_s, abs=0.001)


def test_a_step_is_bound_by_reading_or_by_arithmetic():
    model = load_cost_model("a40-llama-7b")
    step = model.step
    assert model.step_s(1, 0) == pytest.approx(step.overhead_s + step.weights_read_s)
    assert model.step_s(2000, 0) == pytest.approx(step.overhead_s + 2000 * step.token_s)
    assert model.step_s(1, 10_000) == pytest.approx(step.overhead_s + step.weights_read_s + 10_000 * step.kv_read_s)


def test_the_a40_model_has_both_published_shares_of_the_rank_128_ttft():
    model = load_cost_model("a40-llama-7b")
    size_bytes = 128 * model.memory.adapter_bytes_per_rank
    load_s = size_bytes / model.links.host_bytes_s
    ttft_s = load_s + model.step_s(512, 0, 512 * 128, size_bytes)
    assert load_s / ttft_s == pytest.approx(0.175, abs=0.005)
    assert 1 - 512 * model.step.token_s / ttft_s == pytest.approx(0.60, abs=0.005)


def test_bad_cost_models_are_named(tmp_path):
    with pytest.raises(CostModelError, match="a40-llama-7b"):
        load_cost_model("nothing-like-it")
    good = load_cost_model("a40-llama-7b").model_dump()
    path = tmp_path / "model.json"
    for change, message in (
        ({"colour": "red"}, "colour: Extra inputs"),
        ({"links": {**good["links"], "host_bytes_s": 0}}, "links.host_bytes_s"),
        ({"memory": {**good["memory"], "pool_blocks": None}}, "memory.pool_blocks"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(CostModelError, match=message):
            load_cost_model(str(path))
    path.write_text("{")
    with pytest.raises(CostModelError, match="Invalid JSON"):
        load_cost_model(str(path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workload": {"requests_per_s": 1.0}, "polcy": {}}, "polcy"),
        ({"workload": {"requests_per_s": 0.0}}, "requests_per_s"),
        ({"workload": {"requests_per_s": 1.0, "duration_s": 10.0, "warmup_s": 10.0}}, "warmup_s"),
        ({"workload": {"requests_per_s": 1.0, "trace_arrivals": True}}, "trace_arrivals"),
        ({"workload": {"requests_per_s": 1.0}, "policy": {"scheduler": "lifo"}}, "chameleon, .*fifo"),
        ({"workload": {"requests_per_s": 1.0}, "policy": {"adapter_policy": "mru"}}, "lru"),
        ({"workload": {"requests_per_s": 1.0, "adapters": {"ranks": []}}}, "at least one"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        Scenario.model_validate(settings)


def test_a_trace_is_read_with_its_times(small_trace):
    rows = load_trace(small_trace)
    assert len(rows) == 10
    assert (rows[0].time_s, rows[0].num_prompt_tokens, rows[0].num_output_tokens) == (0.0, 100, 1)
    assert rows[3].time_s == pytest.approx(3.3)


def test_a_trace_that_is_broken_names_the_line(tmp_path):
    path = tmp_path / "trace.csv"
    for text, message in (
        ("TIMESTAMP,ContextTokens\n", "GeneratedTokens"),
        (HEAD, "no requests"),
        (HEAD + "2023-11-16 18:00:00.0,5,5\n2023-11-16 18:00:00.0,many,5\n", "line 3"),
        (HEAD + "2023-11-16 18:00:00.0,0,5\n", "at least one token"),
    ):
        path.write_text(text)
        with pytest.raises(TraceError, match=message):
            load_trace(path)
    with pytest.raises(TraceError, match="no trace"):
        load_trace(tmp_path / "absent.csv")


def test_trace_arrivals_keep_the_rhythm_at_the_rate_asked_for(small_trace):
    config = WorkloadConfig(
        requests_per_s=4.0, duration_s=20.0, warmup_s=0.0, trace=str(small_trace), trace_arrivals=True
    )
    requests = generate(config, [], 4096, seed=0)
    assert len(requests) == pytest.approx(80, abs=2)
    assert [r.num_prompt_tokens for r in requests[:11]] == [*range(100, 110), 100]
    gaps = np.diff([r.arrival_s for r in requests[:10]])
    assert gaps == pytest.approx(np.full(9, gaps[0]), rel=1e-6)


@pytest.mark.skipif(not TRACE, reason="set CHAMELEON_AZURE_TRACE to AzureLLMInferenceTrace_conv.csv to check the fit")
def test_the_fit_is_as_close_to_the_azure_trace_as_the_docs_say():
    rows = load_trace(Path(TRACE))
    fitted = sample_lengths(200_000, np.random.default_rng(0))
    real = [row.num_prompt_tokens for row in rows], [row.num_output_tokens for row in rows]
    for ours, theirs, largest_gap in zip(fitted, real, (0.075, 0.035), strict=True):
        points = np.unique(theirs)
        shares = [np.searchsorted(np.sort(v), points, side="right") / len(v) for v in (ours, theirs)]
        assert np.abs(shares[0] - shares[1]).max() < largest_gap
        assert ours.mean() == pytest.approx(np.mean(theirs), rel=0.02)


def test_poisson_arrivals_with_bursts_have_the_stated_rates():
    config = WorkloadConfig(
        requests_per_s=20.0, duration_s=2000.0, bursts=Bursts(every_s=100.0, length_s=10.0, factor=5.0)
    )
    times = np.array([request.arrival_s for request in generate(config, [], 4096, seed=1)])
    in_burst = times % 100 < 10
    assert in_burst.sum() / 200 == pytest.approx(100, rel=0.03)
    assert (~in_burst).sum() / 1800 == pytest.approx(20, rel=0.03)


def test_adapters_are_asked_for_as_the_mix_says():
    mix = AdapterMix(count=100, exponent=1.0, base_share=0.2)
    adapters = make_adapters(mix, 1000)
    config = WorkloadConfig(requests_per_s=100.0, duration_s=300.0, adapters=mix)
    requests = generate(config, adapters, 4096, seed=2)
    with_adapter = [r.adapter for r in requests if r.adapter is not None]
    assert 1 - len(with_adapter) / len(requests) == pytest.approx(0.2, abs=0.01)
    for rank in mix.ranks:
        of_rank = [adapter.digest for adapter in with_adapter if adapter.rank == rank]
        assert len(of_rank) / len(with_adapter) == pytest.approx(0.2, abs=0.015)
        counts = sorted((of_rank.count(digest) for digest in set(of_rank)), reverse=True)
        assert counts[0] / counts[1] == pytest.approx(2.0, rel=0.15)


def test_drift_moves_popularity_on():
    mix = AdapterMix(count=10, ranks=[8], exponent=3.0, drift_s=50.0)
    adapters = make_adapters(mix, 1000)
    config = WorkloadConfig(requests_per_s=20.0, duration_s=100.0, warmup_s=0.0, adapters=mix)
    requests = generate(config, adapters, 4096, seed=0)

    def favourite(start_s, end_s):
        asked = [r.adapter.digest for r in requests if r.adapter and start_s <= r.arrival_s < end_s]
        return max(set(asked), key=asked.count)

    assert favourite(0, 50) == adapters[0].digest
    assert favourite(50, 100) == adapters[1].digest


def test_the_example_scenario_runs_and_its_commented_settings_exist(tmp_path):
    example = Path(__file__).parents[2] / "docs" / "scenarios" / "example.yaml"
    points = load_grid(example)
    assert len(points) == 4
    workload = points[0].scenario.workload.model_copy(update={"duration_s": 12.0, "warmup_s": 2.0})
    result = simulate(points[0].scenario.model_copy(update={"workload": workload}))
    assert result.summary()["finished"] == result.summary()["requests"] > 0

    trace = tmp_path / "azure_llm_conv_2023.csv"
    trace.write_text(HEAD + "2023-11-16 18:00:01.5,100,20\n2023-11-16 18:00:02.5,50,10\n")
    without_bursts = "".join(line for line in example.read_text().splitlines(True) if "bursts:" not in line)
    uncommented = without_bursts.replace("# trace: ", f"trace: {tmp_path}/").replace("# trace_arr", "trace_arr")
    scenario = tmp_path / "scenario.yaml"
    scenario.write_text(uncommented.replace("# predictor_acc", "predictor_acc"))
    point = load_grid(scenario)[0].scenario
    assert point.workload.trace_arrivals and point.policy.predictor_accuracy == 0.8
    assert {request.num_prompt_tokens for request in generate(point.workload, [], 1000, 0)} == {34, 17}
