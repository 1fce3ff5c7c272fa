"""Calibration without an engine: constants are found again, a model is written with its errors, bad input is told."""

import math
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from chameleon_ray.calibrate import run as calibrate
from chameleon_ray.calibrate.measured import CalibrationError, Measured, Served
from chameleon_ray.calibrate.report import cost_model, simulate_again, summary_lines
from chameleon_ray.cli import main
from chameleon_ray.sim.costs import CostModel, StepCosts, load_cost_model
from chameleon_ray.sim.fit import FitFailed, StepPoint, fit_step, fit_transfer, nnls, step_seconds

ADDITIVE = StepCosts(
    overhead_s=0.005,
    request_s=1e-4,
    weights_read_s=0.0,
    kv_read_s=0.0,
    token_s=1e-4,
    attention_s=1e-7,
    token_rank_s=7e-7,
    adapter_read_s=1e-10,
)
ROOFLINE = StepCosts(
    overhead_s=0.003,
    request_s=5e-5,
    weights_read_s=0.02,
    kv_read_s=7e-7,
    token_s=1.3e-4,
    attention_s=1e-9,
    token_rank_s=7e-7,
    adapter_read_s=1.4e-12,
)


def points(costs, noise=0.0, count=200):
    """Steps of a random batch that decodes, some beside a prompt, with and without adapters."""
    rng = Random(1)
    made = []
    for _ in range(count):
        batch, context = rng.choice([1, 2, 4, 8, 16, 32]), rng.choice([10, 100, 500])
        prompt, rank = rng.choice([0, 0, 0, 64, 256, 1024]), rng.choice([0, 8, 64, 128])
        point = StepPoint(
            tokens=batch + prompt,
            context_tokens=batch * context,
            token_ranks=(batch + prompt) * rank,
            adapter_bytes=rank * 60_000 * rng.choice([1, 2]),
            requests=batch + (prompt > 0),
            attended_tokens=batch * context + prompt * (prompt + 1) / 2,
            seconds=1.0,
            fastest_s=1.0,
            count=5,
        )
        seconds = step_seconds(costs, point) * (1 + noise * rng.gauss(0, 1))
        made.append(replace(point, seconds=seconds, fastest_s=0.9 * seconds))
    return made


@pytest.mark.parametrize("costs", [ADDITIVE, ROOFLINE])
def test_the_constants_of_exact_steps_are_found_again(costs):
    found, error = fit_step(points(costs))
    assert found.model_dump() == pytest.approx(costs.model_dump(), rel=1e-6, abs=1e-15)
    assert error.worst < 1e-6 and error.points == 200


@pytest.mark.parametrize("costs", [ADDITIVE, ROOFLINE])
def test_noise_of_five_percent_costs_no_more_than_that(costs):
    found, error = fit_step(points(costs, noise=0.05))
    assert 0.02 < error.mean < 0.05
    exact = points(costs)
    assert max(abs(step_seconds(found, point) / point.seconds - 1) for point in exact) < 0.12


def test_nnls_keeps_what_least_squares_would_make_negative_at_zero():
    matrix = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert nnls(matrix, np.array([3.0, 2.0, 1.0])).tolist() == pytest.approx([2.0, 0.0])
    assert nnls(matrix, np.array([3.0, 5.0, 7.0])).tolist() == pytest.approx([1.0, 2.0])


def test_a_transfers_bandwidth_and_fixed_cost_are_found_again():
    sizes = (1_000_000, 4_000_000, 16_000_000)
    assert fit_transfer((size, 0.002 + size / 5e9) for size in sizes) == pytest.approx((5e9, 0.002))
    bytes_s, fixed_s = fit_transfer((size, 0.002) for size in sizes)
    assert bytes_s == pytest.approx(1e11) and fixed_s == pytest.approx(0.002)


def test_too_little_to_fit_is_an_error():
    with pytest.raises(FitFailed, match="3 kinds of step"):
        fit_step(points(ADDITIVE)[:3])
    with pytest.raises(FitFailed, match="two sizes"):
        fit_transfer([(1000, 0.1), (1000, 0.2)])


@pytest.fixture
def measured():
    """An engine that takes exactly ``ADDITIVE``, idle when each request comes."""
    served = [Served(float(n), 50, 11, -1 if n % 2 else 0, 0.0, 0.0) for n in range(20)]
    return Measured(
        engine="made-up",
        memory={
            "block_tokens": 16,
            "kv_bytes_per_token": 4096,
            "pool_blocks": 1000,
            "adapter_host_bytes": 10**9,
            "adapter_bytes_per_rank": 65536,
        },
        limits={"max_num_seqs": 8, "max_num_batched_tokens": 512, "max_model_len": 512, "watermark_share": 0.0},
        steps=points(ADDITIVE),
        loads=[(500_000, 0.001 + 500_000 / 1e9), (8_000_000, 0.001 + 8_000_000 / 1e9)],
        fetches=[(500_000, 0.01 + 500_000 / 5e8), (8_000_000, 0.01 + 8_000_000 / 5e8)],
        adapters=[(8, 524_288)],
        served=served,
        policy={"scheduler": "chameleon", "adapter_memory_share": 0.5},
    )


def with_times(measured):
    """The requests answered when the formula says: the first one after a fetch and a load."""

    def step_s(tokens, context, attended, rank):
        size_bytes = 524_288 if rank else 0
        return ADDITIVE.seconds(tokens, context, tokens * rank, size_bytes, 1, attended)

    served = []
    for n, one in enumerate(measured.served):
        rank = 8 if one.adapter >= 0 else 0
        wait_s = 0.01 + 524_288 / 5e8 + 0.001 + 524_288 / 1e9 if n == 0 else 0.0
        first_s = one.arrival_s + wait_s + step_s(50, 0, 50 * 51 / 2, rank)
        end_s = first_s + sum(step_s(1, 51 + i, 51 + i, rank) for i in range(10))
        served.append(replace(one, first_token_s=first_s, end_s=end_s))
    measured.served = served
    return measured


def test_the_simulator_with_the_fitted_model_gives_an_ideal_engines_latencies(measured):
    costs = cost_model("ideal", with_times(measured))
    assert costs.links.host_bytes_s == pytest.approx(1e9) and costs.links.disk_overhead_s == pytest.approx(0.01)
    for job, one in zip(simulate_again(costs, measured), measured.served, strict=True):
        assert job.first_token_s == pytest.approx(one.first_token_s, abs=1e-9)
        assert job.end_s == pytest.approx(one.end_s, abs=1e-9)
    assert {name: round(one.error, 6) for name, one in costs.calibration.validation.items()} == dict.fromkeys(
        [f"{what}_{how}_s" for what in ("ttft", "tbt", "e2e") for how in ("mean", "p50", "p99")], 0.0
    )
    assert costs.calibration.noise == pytest.approx(1 / 0.9 - 1)


def test_an_error_of_the_model_shows(measured):
    measured = with_times(measured)
    measured.served = [replace(one, end_s=one.end_s + (one.end_s - one.first_token_s)) for one in measured.served]
    validation = cost_model("ideal", measured).calibration.validation
    assert validation["tbt_mean_s"].error == pytest.approx(-0.5, abs=1e-6)
    assert validation["ttft_p50_s"].error == pytest.approx(0.0, abs=1e-6)


def test_the_command_writes_a_model_that_loads_and_says_how_good_it_is(measured, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "_engine", lambda arguments: with_times(measured))
    out = tmp_path / "mine.json"
    assert main(["calibrate", "--out", str(out)]) == 0
    costs = load_cost_model(str(out))
    assert costs.name == "mine" and costs.calibration.step_fit.points == 200
    assert "made-up" in (printed := capsys.readouterr().out) and "ttft_p99_s" in printed and "+0.0%" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]


def test_a_model_without_calibration_has_nothing_to_say():
    assert summary_lines(load_cost_model("a40-llama-7b")) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cpu-threads", "0"], "--cpu-threads is 0"),
        (["--kv-cache-gib", "-1"], "--kv-cache-gib is -1"),
        (["--repeats", "1"], "--repeats must be 2"),
        (["--requests", "-5"], "--requests is negative"),
        (["--out", "nowhere/model.json"], "no folder nowhere"),
        (["--model", "somewhere"], "give --model and --adapters"),
        (["--model", "somewhere", "--adapters", "nowhere"], "no folder of adapters at nowhere"),
        (["--clock", "cpu", "--cpu-threads", "2"], "--clock cpu needs --cpu-threads 1"),
    ],
)
def test_options_that_cannot_work_are_told_before_anything_starts(options, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(calibrate, "in_child", None)
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", *options]) == 1
    assert message in capsys.readouterr().err


def test_bare_kernels_need_a_cuda_device(monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["calibrate", "--kernels"]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err


def test_the_kernels_of_a_small_model_make_steps_of_every_term(demo):
    import torch

    from chameleon_ray.calibrate.kernels import RANKS, Step, measure_kernels, read_shape

    shape = read_shape(str(demo.model))
    assert shape.adapter_bytes(8, 4) == 8 * 65536  # the engine's own count for the demo's adapters
    steps = [
        Step(((1, 16 * batch),) * batch, ranks)
        for batch in (1, 2, 3)
        for ranks in ((0,) * batch, (8,) * batch, (8, 128, 16)[:batch])
    ]
    steps += [Step(((tokens, 0), (1, 40)), ranks) for tokens in (16, 32) for ranks in ((0, 0), (8, 128))]
    measured = measure_kernels(str(demo.model), device="cpu", dtype=torch.float32, steps=steps)
    assert len(measured.steps) == len(steps)
    assert {size for size, _ in measured.loads} == {shape.adapter_bytes(rank, 4) for rank in RANKS}
    for name in ("tokens", "context_tokens", "token_ranks", "adapter_bytes", "requests", "attended_tokens"):
        assert len({getattr(point, name) for point in measured.steps}) >= 3, name
    assert all(0 < point.fastest_s <= point.seconds for point in measured.steps)
    model = cost_model("kernels", measured)
    assert model.calibration.validation == {} and math.isfinite(model.step_s(100, 1000, 800, 1e6, 4, 5000))


def test_a_config_that_is_no_llamas_is_an_error(tmp_path):
    from chameleon_ray.calibrate.kernels import read_shape

    with pytest.raises(CalibrationError, match=r"config\.json"):
        read_shape(str(tmp_path))
    (tmp_path / "config.json").write_text('{"num_attention_heads": 8, "hidden_size": 64}')
    with pytest.raises(CalibrationError, match="intermediate_size"):
        read_shape(str(tmp_path))


def test_a_step_costs_what_the_formula_says():
    model = CostModel.model_validate({**load_cost_model("a40-llama-7b").model_dump(), "step": ROOFLINE.model_dump()})
    bound_by_reading = 0.003 + 4 * 5e-5 + 0.02 + 7e-7 * 2000 + 1e-9 * 3000 + 7e-7 * 800 + 1.4e-12 * 1e6
    assert model.step_s(10, 2000, 800, 1e6, 4, 3000) == pytest.approx(bound_by_reading)
    bound_by_arithmetic = 0.003 + 4 * 5e-5 + 1.3e-4 * 500 + 1e-9 * 3000
    assert model.step_s(500, 2000, 0, 0, 4, 3000) == pytest.approx(bound_by_arithmetic)
    following = [model.step_s(4, context, 800, 1e6, 4, context) for context in (2004, 2008, 2012)]
    assert model.decode_steps_s(3, 4, 2000, 800, 1e6) == pytest.approx(following)


def test_the_shipped_model_of_the_cpu_engine_was_made_by_the_command():
    model = load_cost_model("cpu-demo")
    calibration = model.calibration
    assert "vLLM" in calibration.engine and calibration.step_fit.points > 500 and len(calibration.validation) == 9
    assert calibration.step_fit.mean < 0.15
    assert (model.memory.kv_bytes_per_token, model.memory.adapter_bytes_per_rank) == (4096, 65536)
