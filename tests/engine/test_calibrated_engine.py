"""Calibration measures a real engine: a small part of it, on the shared engine."""

from collections.abc import Iterator

import pytest
from engine_harness import PagedEngine

from chameleon_ray.calibrate.child import measure
from chameleon_ray.calibrate.live import CpuClock, LiveEngine
from chameleon_ray.calibrate.measured import CalibrationError, Effort
from chameleon_ray.calibrate.report import cost_model
from chameleon_ray.demo import DemoPaths

SMALL = Effort(repeats=2, batches=(1, 3), prompts=(16, 64), num_requests=12, num_loads=2)


@pytest.fixture
def live(engine: PagedEngine) -> Iterator[LiveEngine]:
    """On the clock that other processes cannot stop."""
    live = LiveEngine(engine.llm, seed=1, clock=CpuClock())
    yield live
    live.detach()


def test_a_live_engine_is_measured_and_its_model_simulates_the_same_workload(
    engine: PagedEngine, live: LiveEngine, demo: DemoPaths
) -> None:
    folders = [demo.adapters / name for name in demo.adapter_names()[:5]]
    measured = measure(live, folders, SMALL, seed=1)
    assert measured.adapters == [(rank, rank * 65536) for rank in (8, 16, 32, 64, 128)]
    assert measured.memory["pool_blocks"] == engine.num_blocks
    assert measured.memory["pool_blocks"] * measured.memory["block_tokens"] * measured.memory["kv_bytes_per_token"] < (
        64 << 20
    )
    assert measured.limits == {
        "max_num_seqs": 32,
        "max_num_batched_tokens": 1024,
        "max_model_len": 512,
        "watermark_share": 0.0,
    }

    assert {point.count > 1 for point in measured.steps} == {True, False}  # those of the rehearsal are single
    repeated = [point for point in measured.steps if point.count > 1]
    prompts = [point for point in repeated if point.tokens > point.requests]
    decoding = [point for point in repeated if point.tokens == point.requests]
    assert {64, 3 * 64} <= {point.tokens for point in prompts}
    assert {1, 2, 3, 4} == {point.requests for point in decoding}
    assert {point.token_ranks for point in decoding if point.requests == 3} >= {0, 3 * 8, 3 * 128}
    longest = max(decoding, key=lambda point: point.context_tokens)
    assert 3 * 64 < longest.context_tokens < 4 * (64 + 12) and longest.attended_tokens > longest.context_tokens
    assert all(0 < point.fastest_s <= point.seconds for point in measured.steps)
    assert min(point.seconds for point in prompts if point.tokens >= 192) > min(point.seconds for point in decoding)

    assert [size for size, _ in measured.loads] == [size for _, size in measured.adapters]
    assert sum(seconds for _, seconds in measured.fetches) > 0
    assert len(measured.served) >= 3
    assert all(one.arrival_s < one.first_token_s <= one.end_s for one in measured.served)
    model = cost_model("shared", measured)
    assert model.calibration is not None and model.calibration.step_fit.mean < 1
    assert {one.simulated > 0 for one in model.calibration.validation.values()} == {True}


def test_adapters_of_one_rank_cannot_be_told_apart(live: LiveEngine, demo: DemoPaths) -> None:
    with pytest.raises(CalibrationError, match="two ranks"):
        measure(live, [demo.adapters / demo.adapter_names()[0]], SMALL, seed=1)


def test_a_folder_that_is_no_adapter_is_named(live: LiveEngine, demo: DemoPaths) -> None:
    with pytest.raises(CalibrationError, match=r"model cannot be used"):
        measure(live, [demo.model], SMALL, seed=1)
