"""A trained predictor beside running requests: batches, time limits, cancellation, and the requests put on record."""

import asyncio
import stat
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest
import torch
from predictor_logs import encoder_folder, requests, write_log

from chameleon_ray.config import AppConfig, ConfigError
from chameleon_ray.predictor import proxy as proxy_module
from chameleon_ray.predictor.encoder import Encoder
from chameleon_ray.predictor.errors import PredictorError
from chameleon_ray.predictor.estimator import EndedOutput, LengthEstimator, make_estimator
from chameleon_ray.predictor.lengths import LengthFeatures
from chameleon_ray.predictor.proxy import ProxyPredictor
from chameleon_ray.predictor.request_log import NUM_FILES, LoggedRequest, RequestLogWriter, read_request_logs
from chameleon_ray.predictor.saved import load_predictor
from chameleon_ray.predictor.train import TrainOptions, train

LONG_S = 60.0
HISTORY_TOKENS = 77


class GatedEncoder(Encoder):
    """The real encoder; while the gate is closed, forward passes wait in their thread."""

    def __init__(self, folder: Path, window: int) -> None:
        super().__init__(folder, window)
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.batches: list[list[str]] = []
        self.threads: set[int] = set()
        self.failure: Exception | None = None

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        self.batches.append(list(texts))
        self.threads.add(threading.get_ident())
        self.entered.set()
        assert self.gate.wait(LONG_S)
        if self.failure is not None:
            raise self.failure
        return super().embed(texts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("predictor")
    log = write_log(made / "log.jsonl", requests(120))
    train([log], encoder_folder(), made / "out", TrainOptions(buckets=3, epochs=10, window=32))
    return made / "out"


@pytest.fixture
def encoder(folder: Path) -> GatedEncoder:
    return GatedEncoder(encoder_folder(), 32)


@pytest.fixture
def predictor(folder: Path, encoder: GatedEncoder) -> ProxyPredictor:
    _, head, description = load_predictor(folder)
    made = ProxyPredictor(encoder, head, description, max_model_len=8192)
    for _ in range(10):
        made.observe(asked("x"), HISTORY_TOKENS)
    assert HISTORY_TOKENS not in description.bucket_tokens
    return made


def asked(prompt: str | None) -> LengthFeatures:
    return LengthFeatures("a", 12, 4096, prompt_text=prompt)


def run(test: Callable[[], Awaitable[None]], predictor: ProxyPredictor, encoder: GatedEncoder) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(LONG_S):
            await test()

    try:
        asyncio.run(bounded())
    finally:
        encoder.gate.set()
        predictor.close()


async def entered(encoder: GatedEncoder) -> None:
    assert await asyncio.to_thread(encoder.entered.wait, LONG_S)


def test_requests_that_arrive_while_one_batch_runs_form_the_next(
    predictor: ProxyPredictor, encoder: GatedEncoder
) -> None:
    prompts = [entry.prompt for entry in requests(40, seed=3)]

    async def test() -> None:
        first = asyncio.create_task(predictor.predict_soon(asked(prompts[0]), LONG_S))
        await entered(encoder)
        rest = [asyncio.create_task(predictor.predict_soon(asked(prompt), LONG_S)) for prompt in prompts[1:]]
        await asyncio.sleep(0)
        encoder.gate.set()
        found = await asyncio.gather(first, *rest)
        sizes = [len(batch) for batch in encoder.batches]
        assert sizes == [1, proxy_module.MAX_BATCH, proxy_module.MAX_BATCH, 39 - 2 * proxy_module.MAX_BATCH]
        assert found == [predictor.predict(asked(prompt)) for prompt in prompts]
        assert predictor.num_from_model == 40 and predictor.num_from_history == 0

    run(test, predictor, encoder)


def test_the_encoder_runs_outside_the_event_loops_thread(predictor: ProxyPredictor, encoder: GatedEncoder) -> None:
    async def test() -> None:
        answer = asyncio.create_task(predictor.predict_soon(asked("Summarise briefly."), LONG_S))
        await entered(encoder)  # the loop goes on although the encoder stands still
        encoder.gate.set()
        await answer
        assert encoder.threads and threading.get_ident() not in encoder.threads

    run(test, predictor, encoder)


def test_a_late_prediction_is_replaced_by_the_historys_and_later_ones_are_on_time(
    predictor: ProxyPredictor, encoder: GatedEncoder
) -> None:
    async def test() -> None:
        late = [predictor.predict_soon(asked(f"late {i}"), 0.01) for i in range(5)]
        assert await asyncio.gather(*late) == [HISTORY_TOKENS] * 5
        assert predictor.num_from_history == 5
        again = asyncio.create_task(predictor.predict_soon(asked("again"), LONG_S))
        await asyncio.sleep(0)
        encoder.gate.set()
        assert await again != HISTORY_TOKENS
        assert encoder.batches[-1] == ["again"]  # of those that gave up, what had not begun is not run
        assert predictor.num_from_model == 1

    run(test, predictor, encoder)


def test_requests_that_cannot_be_served_in_time_hold_up_nobody(folder: Path, encoder: GatedEncoder) -> None:
    _, head, description = load_predictor(folder)
    predictor = ProxyPredictor(encoder, head, description, max_model_len=8192, s_per_token=0.5)
    prompt = "word " * 20  # 27 tokens by estimate: 13 s

    async def test() -> None:
        first = asyncio.create_task(predictor.predict_soon(asked(prompt + "first"), LONG_S / 10))
        await entered(encoder)  # tried although the estimate is against it
        hopeless = asyncio.create_task(predictor.predict_soon(asked(prompt + "hopeless"), LONG_S / 10))
        patient = [asyncio.create_task(predictor.predict_soon(asked(f"{prompt}{i}"), LONG_S)) for i in range(16)]
        await asyncio.sleep(0)
        encoder.gate.set()
        await asyncio.gather(first, hopeless, *patient)
        assert encoder.batches[0] == [prompt + "first"]
        assert 1 <= len(encoder.batches[1]) < 16  # together they would be late
        assert not any(prompt + "hopeless" in batch for batch in encoder.batches)
        assert predictor.num_from_history == 1 and predictor.num_from_model == 17

    run(test, predictor, encoder)


def test_a_cancelled_request_is_left_out_and_harms_nobody(predictor: ProxyPredictor, encoder: GatedEncoder) -> None:
    async def test() -> None:
        running = asyncio.create_task(predictor.predict_soon(asked("running"), LONG_S))
        await entered(encoder)
        gone = asyncio.create_task(predictor.predict_soon(asked("gone"), LONG_S))
        stays = asyncio.create_task(predictor.predict_soon(asked("stays"), LONG_S))
        await asyncio.sleep(0)
        running.cancel()
        gone.cancel()
        encoder.gate.set()
        assert await stays == predictor.predict(asked("stays"))
        assert encoder.batches[:2] == [["running"], ["stays"]]
        assert running.cancelled() and gone.cancelled()

    run(test, predictor, encoder)


def test_too_many_waiting_and_prompts_without_text_go_to_history_at_once(
    predictor: ProxyPredictor, encoder: GatedEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_module, "MAX_WAITING", 2)

    async def test() -> None:
        running = asyncio.create_task(predictor.predict_soon(asked("running"), LONG_S))
        await entered(encoder)
        waiting = [asyncio.create_task(predictor.predict_soon(asked(f"{i}"), LONG_S)) for i in range(2)]
        await asyncio.sleep(0)
        assert await predictor.predict_soon(asked("one too many"), LONG_S) == HISTORY_TOKENS
        assert await predictor.predict_soon(asked(None), LONG_S) == HISTORY_TOKENS
        encoder.gate.set()
        await asyncio.gather(running, *waiting)

    run(test, predictor, encoder)


def test_an_encoder_that_fails_costs_no_request(
    predictor: ProxyPredictor, encoder: GatedEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    encoder.gate.set()
    estimator = LengthEstimator(predictor, None, LONG_S)

    async def test() -> None:
        encoder.failure = RuntimeError("broken")
        assert [await estimator.estimate(asked("a")), await estimator.estimate(asked("b"))] == [HISTORY_TOKENS] * 2
        assert caplog.text.count("the length predictor failed") == 1
        encoder.failure = None
        assert await estimator.estimate(asked("c")) != HISTORY_TOKENS
        assert estimator.counts() == {"model": 1, "history": 2}

    run(test, predictor, encoder)


def test_only_outputs_that_ended_teach_the_history_but_all_are_logged(
    predictor: ProxyPredictor, encoder: GatedEncoder, tmp_path: Path
) -> None:
    encoder.gate.set()
    estimator = LengthEstimator(predictor, RequestLogWriter(tmp_path, "r", 1 << 20), LONG_S)
    for _ in range(40):
        estimator.observe(asked("p"), "name@digest", EndedOutput(9, "abort"))
    assert predictor.history.predict(asked("p")) == HISTORY_TOKENS
    for _ in range(40):
        estimator.observe(asked("p"), None, EndedOutput(9, "stop"))
    assert predictor.history.predict(asked("p")) == 9
    estimator.close()
    entries = read_request_logs([tmp_path])
    assert [entry.finish_reason for entry in entries] == ["abort"] * 40 + ["stop"] * 40
    assert entries[0].model_dump(exclude={"time_s"}) == {
        "adapter": "name@digest",
        "prompt": "p",
        "prompt_tokens": 12,
        "max_tokens": 4096,
        "output_tokens": 9,
        "finish_reason": "abort",
    }


def test_the_log_keeps_within_its_bound_and_keeps_the_latest(tmp_path: Path) -> None:
    folder, bound = tmp_path / "log", 40_000
    entries = list(requests(2000))
    for first, name in ((0, "first"), (1000, "second")):  # one replica after another on the same node
        writer = RequestLogWriter(folder, name, bound)
        for entry in entries[first : first + 1000]:
            writer.write(entry)
        writer.close()
        assert writer.num_dropped == 0
    sizes = [path.stat().st_size for path in folder.iterdir()]
    line = max(len(entry.model_dump_json()) + 1 for entry in entries)
    assert sum(sizes) <= bound + NUM_FILES * line and len(sizes) > 2
    kept = read_request_logs([folder])
    assert kept == entries[-len(kept) :] and len(kept) > 100
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_a_full_disk_loses_lines_but_never_a_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = RequestLogWriter(tmp_path, "r", NUM_FILES)  # a new file for every line
    (entry, *more) = requests(3)
    tmp_path.joinpath("requests-r-1.jsonl").mkdir()  # so the next one cannot be opened, the one after it can
    for one in (entry, *more):
        writer.write(one)
    writer.close()
    assert writer.num_dropped == 1
    assert read_request_logs([tmp_path / "requests-r-2.jsonl"]) == [more[-1]]
    assert caplog.text.count("the request log loses lines") == 1


def test_a_torn_last_line_is_left_out_and_logs_are_merged_by_time(tmp_path: Path) -> None:
    entries = list(requests(10))
    write_log(tmp_path / "a.jsonl", entries[1::2])
    torn = write_log(tmp_path / "b.jsonl", entries[::2])
    with torn.open("a") as file:
        file.write('{"time_s": 1.0, "ada')
    assert read_request_logs([tmp_path]) == entries
    with pytest.raises(PredictorError, match=r"no \*.jsonl"):
        (tmp_path / "empty").mkdir()
        read_request_logs([tmp_path / "empty"])


def test_logged_requests_are_checked_field_by_field() -> None:
    with pytest.raises(ValueError, match="prompt_tokens"):
        LoggedRequest.model_validate_json('{"prompt_tokens": -1}')


def config(**sections: dict[str, object]) -> AppConfig:
    return AppConfig.from_args({"model": {"source": "some/model"}, **sections})


def test_the_configuration_says_what_is_made(folder: Path, tmp_path: Path) -> None:
    assert make_estimator(config(), 2048, "r") is None
    both = make_estimator(
        config(engine={"length_predictor": str(folder)}, replicas={"request_log": str(tmp_path / "log")}), 2048, "r"
    )
    assert both is not None and both.proxy is not None
    both.close()
    assert [path.name for path in (tmp_path / "log").iterdir()] == ["requests-r-0.jsonl"]
    logging_only = make_estimator(config(replicas={"request_log": str(tmp_path / "log")}), 2048, "s")
    assert logging_only is not None and logging_only.counts() == {}
    assert asyncio.run(logging_only.estimate(asked("p"))) is None
    logging_only.close()


def test_what_is_configured_but_missing_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine.length_predictor: .*predictor.json: not readable"):
        make_estimator(config(engine={"length_predictor": str(tmp_path)}), 2048, "r")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"replicas.request_log: .* cannot be written"):
        make_estimator(config(replicas={"request_log": str(tmp_path / "file")}), 2048, "r")
