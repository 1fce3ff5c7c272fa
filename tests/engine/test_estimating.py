"""Predicted lengths on their way to vLLM's engine, through vLLM's own OpenAI application as the replica calls it."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from predictor_logs import encoder_folder, requests, write_log

from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.config import AppConfig
from chameleon_ray.demo import DemoPaths
from chameleon_ray.engine.estimating import PREDICTED_TOKENS
from chameleon_ray.engine.server import EngineServer
from chameleon_ray.predictor.lengths import LengthFeatures
from chameleon_ray.predictor.proxy import ProxyPredictor
from chameleon_ray.predictor.request_log import LoggedRequest, read_request_logs
from chameleon_ray.predictor.train import TrainOptions, train

LIMIT_S = 300.0
STORY = "Write a long story with many chapters about bees."
YES_NO = "Answer with yes or no: is gardening interesting?"
ADAPTER = "demo-r16-01"


class Served:
    """A started ``EngineServer``, and the requests that it hands to vLLM's engine process."""

    def __init__(self, server: EngineServer, demo: DemoPaths) -> None:
        self.server = server
        self.sent: list[Any] = []
        self._folder = demo.adapters / ADAPTER
        size = (self._folder / "adapter_model.safetensors").stat().st_size
        self._record = AdapterRecord(
            name=ADAPTER, digest="0123456789abcdef" * 4, uri=str(self._folder), rank=16, size_bytes=size
        )
        core = server._engine.engine_core
        send = core.add_request_async

        async def spied(request: Any) -> None:
            self.sent.append(request)
            await send(request)

        core.add_request_async = spied

    def call(self, path: str, adapter: bool = False, **body: Any) -> Any:
        model = ADAPTER if adapter else "demo"
        content = json.dumps({"model": model, "temperature": 0, "ignore_eos": True} | body).encode()
        return self.server.call(path, content, model, *((self._record, self._folder) if adapter else (None, None)))

    async def answer(self, path: str, **body: Any) -> list[int | None]:
        """The predictions that came with the engine requests of one whole HTTP request."""
        before = len(self.sent)
        async with self.call(path, **body) as call:
            head, content = await call.head(), await call.body()
            assert head.status == 200, content
        return [(one.sampling_params.extra_args or {}).get(PREDICTED_TOKENS) for one in self.sent[before:]]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predictor")
    train([write_log(folder / "log", requests(400))], encoder_folder(), folder / "out", TrainOptions(buckets=4))
    return folder / "out"


@asynccontextmanager
async def serving(demo: DemoPaths, engine: dict[str, Any], replicas: dict[str, Any]) -> AsyncIterator[Served]:
    small = {"device": "cpu", "dtype": "float32", "max_model_len": 512, "kv_cache_gib": 0.06, "enforce_eager": True}
    config = AppConfig.from_args(
        {"model": {"source": str(demo.model), "name": "demo"}, "engine": small | engine, "replicas": replicas}
    )
    server = await EngineServer.start(config)
    try:
        yield Served(server, demo)
    finally:
        server.shutdown()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(LIMIT_S):
            await test()

    asyncio.run(bounded())


def test_predictions_reach_the_engine_and_ended_requests_the_log(
    demo: DemoPaths, predictor: Path, tmp_path: Path
) -> None:
    expected = ProxyPredictor.load(predictor, 512)
    story, yes_no = (expected.predict(LengthFeatures(None, 12, 400, prompt_text=text)) for text in (STORY, YES_NO))
    assert yes_no < 10 < 300 < story

    async def test() -> None:
        # The time limit is not what is tested here: no machine is too slow for this one.
        engine = {"length_predictor": str(predictor), "length_predictor_timeout_s": LIMIT_S}
        async with serving(demo, engine, {"request_log": str(tmp_path)}) as served:
            path, more = "/v1/completions", {"max_tokens": 3}
            assert await served.answer(path, prompt=STORY, **more) == [3]  # never more than the request may produce
            (long,) = await served.answer(path, prompt=STORY, max_tokens=400)
            assert long == story
            assert await served.answer(path, prompt=YES_NO, max_tokens=6, stream=True) == [min(6, yes_no)]
            assert await served.answer(path, prompt=[STORY, YES_NO], max_tokens=20) == [20, yes_no]
            assert await served.answer(path, prompt=YES_NO, max_tokens=20, n=2, temperature=1) == [yes_no] * 2
            assert await served.answer(path, prompt=YES_NO, max_tokens=20, adapter=True) == [yes_no]
            ids = served.sent[-1].prompt_token_ids
            assert await served.answer(path, prompt=ids, max_tokens=20) == [yes_no]  # a prompt of tokens has text too
            for stream in (False, True):
                messages = [{"role": "user", "content": YES_NO}]
                (found,) = await served.answer(
                    "/v1/chat/completions", messages=messages, max_tokens=20, stream=stream, adapter=stream
                )
                assert found is not None and 1 <= found <= 20
            claimed = {"vllm_xargs": {PREDICTED_TOKENS: 1, "other": "kept"}}
            assert await served.answer(path, prompt=STORY, max_tokens=20, **claimed) == [20]
            assert served.sent[-1].sampling_params.extra_args["other"] == "kept"
            assert served.server.length_predictions() == {"model": 11, "history": 0}
            await _check_default(served, claimed)
            async with served.call(path, prompt=STORY, max_tokens=400, stream=True) as call:  # and the client goes
                await call.head()
                await anext(call.chunks(lambda: 0.0))

    run(test)
    logged = read_request_logs([tmp_path])
    _check_log(logged)


def _check_log(logged: list[LoggedRequest]) -> None:
    assert [entry.prompt for entry in logged[:3]] == [STORY, STORY, YES_NO]
    assert [entry.output_tokens for entry in logged[:3]] == [3, 400, 6]
    assert len(logged) == 13  # ``n=2`` and the two prompts of one request count for two
    assert {entry.finish_reason for entry in logged[:-1]} == {"length"}
    gone = logged[-1]
    assert gone.finish_reason == "abort" and 0 < gone.output_tokens < 400
    assert [entry.adapter for entry in logged if entry.adapter] == [f"{ADAPTER}@{'0123456789abcdef' * 4}"] * 2
    assert all(entry.prompt_tokens > 0 and entry.max_tokens for entry in logged)
    chats = [entry.prompt for entry in logged if YES_NO in entry.prompt and entry.prompt != YES_NO]
    assert len(chats) == 2  # as the chat template renders it


async def _check_default(served: Served, claimed: dict[str, Any]) -> None:
    """As without a trained predictor: nothing is predicted here, and still no client can claim a length."""
    engine = served.server._engine
    estimator, engine.estimator = engine.estimator, None
    assert await served.answer("/v1/completions", prompt=STORY, max_tokens=4, **claimed) == [None]
    assert served.sent[-1].sampling_params.extra_args == {"other": "kept"}
    assert served.server.length_predictions() == {}
    engine.estimator = estimator
