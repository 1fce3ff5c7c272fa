"""Predicted lengths on their way to vLLM's engine, through vLLM's own OpenAI application as the replica calls it."""

import json
import time
from pathlib import Path
from typing import Any

from served_engine import LIMIT_S, ServedEngine

from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.demo import DemoPaths
from chameleon_ray.engine.estimating import PREDICTED_TOKENS
from chameleon_ray.predictor.lengths import LengthFeatures
from chameleon_ray.predictor.proxy import ProxyPredictor
from chameleon_ray.predictor.request_log import LoggedRequest, read_request_logs

NUM_LOGGED = 13
STORY = "Write a long story with many chapters about bees."
YES_NO = "Answer with yes or no: is gardening interesting?"
ADAPTER = "demo-r16-01"


class Called:
    """Requests to the engine, as clients make them."""

    def __init__(self, served: ServedEngine, demo: DemoPaths) -> None:
        self.server, self.sent = served.server, served.sent
        self._folder = demo.adapters / ADAPTER
        size = (self._folder / "adapter_model.safetensors").stat().st_size
        self._record = AdapterRecord(
            name=ADAPTER, digest="0123456789abcdef" * 4, uri=str(self._folder), rank=16, size_bytes=size
        )

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


def test_predictions_reach_the_engine_and_ended_requests_the_log(
    demo: DemoPaths, served: ServedEngine, predictor: Path, request_log: Path
) -> None:
    called = Called(served, demo)
    expected = ProxyPredictor.load(predictor, 512)
    story, yes_no = (expected.predict(LengthFeatures(None, 12, 400, prompt_text=text)) for text in (STORY, YES_NO))
    assert yes_no < 10 < 300 < story

    async def test() -> None:
        path, more = "/v1/completions", {"max_tokens": 3}
        assert await called.answer(path, prompt=STORY, **more) == [3]  # never more than the request may produce
        (long,) = await called.answer(path, prompt=STORY, max_tokens=400)
        assert long == story
        assert await called.answer(path, prompt=YES_NO, max_tokens=6, stream=True) == [min(6, yes_no)]
        assert await called.answer(path, prompt=[STORY, YES_NO], max_tokens=20) == [20, yes_no]
        assert await called.answer(path, prompt=YES_NO, max_tokens=20, n=2, temperature=1) == [yes_no] * 2
        assert await called.answer(path, prompt=YES_NO, max_tokens=20, adapter=True) == [yes_no]
        ids = called.sent[-1].prompt_token_ids
        assert await called.answer(path, prompt=ids, max_tokens=20) == [yes_no]  # a prompt of tokens has text too
        for stream in (False, True):
            messages = [{"role": "user", "content": YES_NO}]
            (found,) = await called.answer(
                "/v1/chat/completions", messages=messages, max_tokens=20, stream=stream, adapter=stream
            )
            assert found is not None and 1 <= found <= 20
        claimed = {"vllm_xargs": {PREDICTED_TOKENS: 1, "other": "kept"}}
        assert await called.answer(path, prompt=STORY, max_tokens=20, **claimed) == [20]
        assert called.sent[-1].sampling_params.extra_args["other"] == "kept"
        assert called.server.length_predictions() == {"model": 11, "history": 0}
        await _check_default(called, claimed)
        async with called.call(path, prompt=STORY, max_tokens=400, stream=True) as call:  # and the client goes
            await call.head()
            await anext(call.chunks(lambda: 0.0))

    with served.predicting():
        served.run(test)
    _check_log(_logged(request_log))


def _logged(folder: Path) -> list[LoggedRequest]:
    """All that was put on record; a thread writes it."""
    deadline_s = time.monotonic() + LIMIT_S
    while len(logged := read_request_logs([folder])) < NUM_LOGGED:
        assert time.monotonic() < deadline_s, logged
        time.sleep(0.05)
    return logged


def _check_log(logged: list[LoggedRequest]) -> None:
    assert [entry.prompt for entry in logged[:3]] == [STORY, STORY, YES_NO]
    assert [entry.output_tokens for entry in logged[:3]] == [3, 400, 6]
    assert len(logged) == NUM_LOGGED  # ``n=2`` and the two prompts of one request count for two
    assert {entry.finish_reason for entry in logged[:-1]} == {"length"}
    gone = logged[-1]
    assert gone.finish_reason == "abort" and 0 < gone.output_tokens < 400
    assert [entry.adapter for entry in logged if entry.adapter] == [f"{ADAPTER}@{'0123456789abcdef' * 4}"] * 2
    assert all(entry.prompt_tokens > 0 and entry.max_tokens for entry in logged)
    chats = [entry.prompt for entry in logged if YES_NO in entry.prompt and entry.prompt != YES_NO]
    assert len(chats) == 2  # as the chat template renders it


async def _check_default(called: Called, claimed: dict[str, Any]) -> None:
    """As without a trained predictor: nothing is predicted here, and still no client can claim a length."""
    engine = called.server._engine
    estimator, engine.estimator = engine.estimator, None
    assert await called.answer("/v1/completions", prompt=STORY, max_tokens=4, **claimed) == [None]
    assert called.sent[-1].sampling_params.extra_args == {"other": "kept"}
    assert called.server.length_predictions() == {}
    engine.estimator = estimator
