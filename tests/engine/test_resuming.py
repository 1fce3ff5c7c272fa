"""Answers begun in one engine and gone on with in another, through vLLM's own OpenAI application."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from served_engine import ServedEngine
from transformers import AutoTokenizer
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import RequestState

from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.demo import DemoPaths
from chameleon_ray.engine.resuming import ResumeError, continued, replayed
from chameleon_ray.predictor.lengths import PREDICTED_TOKENS
from chameleon_ray.progress import NO_PROGRESS, OutputStep, Progress, created_of, joined, with_created

NUM_TOKENS = 24
REQUEST_ID = "same-in-both"
ADAPTER = "demo-r16-01"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = {"messages": [{"role": "user", "content": "Tell me a story."}]}
PROMPT = {"prompt": "Once upon a time"}


class Called:
    """Requests to the engine, as clients make them."""

    def __init__(self, served: ServedEngine, demo: DemoPaths) -> None:
        self._server, self.sent = served.server, served.sent
        self._folder = demo.adapters / ADAPTER
        self.tokenizer = AutoTokenizer.from_pretrained(demo.model)

    async def parts(
        self, path: str, earlier: Progress = NO_PROGRESS, adapter: bool = False, **fields: Any
    ) -> list[tuple[bytes, Progress]]:
        """The answer in chunks with what has been made since the last; of a stream, all that there is."""
        model, record, folder = "demo", None, None
        if adapter:
            model, folder = ADAPTER, self._folder
            record = AdapterRecord(name=ADAPTER, digest="5a" * 32, uri=str(folder), rank=16, size_bytes=1)
        defaults = {"model": model, "temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
        content = json.dumps(defaults | fields).encode()
        async with self._server.call(path, content, model, record, folder, REQUEST_ID, earlier) as call:
            parts = [(chunk, call.take_progress()) async for chunk in call.chunks(lambda: 0.0)]
            assert (await call.head()).status == 200, parts
        return parts

    async def check(self, path: str, **fields: Any) -> tuple[bytes, Progress]:
        """Fails unless the stream is the same, to the byte, wherever another engine goes on with it."""
        fields = {"stream": True, "stream_options": {"include_usage": True}} | fields
        parts = await self.parts(path, **fields)
        whole, created = b"".join(chunk for chunk, _ in parts), created_of(parts[0][0])
        made = joined(progress for _, progress in parts)
        assert created is not None and made.has_ended and not made.obstacle
        for seam in {1, len(parts) // 2, len(parts)}:
            sent_before, earlier = parts[:seam], joined(progress for _, progress in parts[:seam])
            num_before = len(self.sent)
            resumed = await self.parts(path, earlier, **fields)
            content = with_created(b"".join(chunk for chunk, _ in resumed), created)
            assert content.startswith(b"".join(chunk for chunk, _ in sent_before)), (seam, earlier)
            assert answer_of(content) == answer_of(whole), (seam, earlier)
            rest = joined(progress for _, progress in resumed)
            assert earlier.token_ids + rest.token_ids == made.token_ids
            if earlier.has_ended:
                assert len(self.sent) == num_before, "nothing was left to make"
                continue
            (sent,) = self.sent[num_before:]
            assert sent.prompt_token_ids[-len(earlier.token_ids) :] == earlier.token_ids
            assert sent.sampling_params.max_tokens == NUM_TOKENS - len(earlier.token_ids)
            assert sent.sampling_params.min_tokens == max(0, fields.get("min_tokens", 0) - len(earlier.token_ids))
        return whole, made


def answer_of(stream: bytes) -> tuple[str, Any, Any]:
    """What a stream amounts to, however its tokens are spread over events: text, last choice without it, usage."""
    choice, usage = last(stream)
    return "".join(texts(stream)), (choice["finish_reason"], choice["stop_reason"]), usage


def texts(stream: bytes) -> list[str]:
    """The text of each event."""
    events = [line.removeprefix("data: ") for line in stream.decode().split("\n\n") if line]
    return [
        text
        for event in events
        if event != "[DONE]"
        for choice in json.loads(event)["choices"]
        for text in [_text(choice)]
    ]


def _text(choice: dict[str, Any]) -> str:
    return str(choice["text"] if "text" in choice else choice["delta"].get("content") or "")


def last(stream: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last choice, and the usage."""
    *_, choice, usage, done = [line.removeprefix("data: ") for line in stream.decode().split("\n\n") if line]
    assert done == "[DONE]"
    return json.loads(choice)["choices"][0], json.loads(usage)["usage"]


async def check_streams(called: Called) -> None:
    whole, made = await called.check(COMPLETIONS, **PROMPT)
    choice, usage = last(whole)
    assert choice["finish_reason"] == "length" and usage["completion_tokens"] == NUM_TOKENS == len(made.token_ids)
    await called.check(COMPLETIONS, adapter=True, **PROMPT)
    await called.check(CHAT, adapter=True, **MESSAGES)
    await called.check(COMPLETIONS, min_tokens=20, echo=True, return_token_ids=True, **PROMPT)


async def check_stop_strings(called: Called) -> None:
    """One that spans two tokens, and one token that ends the output."""
    whole, made = await called.check(COMPLETIONS, **PROMPT)
    pieces = [called.tokenizer.decode([token_id]) for token_id in made.token_ids]
    assert "".join(pieces) == "".join(texts(whole))
    first = next(place for place in range(4, 18) if pieces[place].strip() and pieces[place + 1].strip())
    stop = pieces[first][-1] + pieces[first + 1][:1]
    stopped, ended = await called.check(COMPLETIONS, stop=[stop], **PROMPT)
    choice, usage = last(stopped)
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] == stop
    assert "".join(texts(stopped)) == "".join(pieces).partition(stop)[0]
    assert usage["completion_tokens"] == len(ended.token_ids) < NUM_TOKENS
    await called.check(COMPLETIONS, stop=[stop], include_stop_str_in_output=True, **PROMPT)
    stopped, _ = await called.check(COMPLETIONS, stop_token_ids=[made.token_ids[9]], **PROMPT)
    assert last(stopped)[0]["stop_reason"] == made.token_ids[9]


async def check_whole_answers(called: Called) -> None:
    ((content, _),) = await called.parts(COMPLETIONS, return_token_ids=True, **PROMPT)
    undisturbed = json.loads(content)
    streamed = await called.parts(COMPLETIONS, stream=True, **PROMPT)
    made = joined(progress for _, progress in streamed)
    earlier = Progress(made.prompt_digest, made.steps[:15])
    ((content, rest),) = await called.parts(COMPLETIONS, earlier, return_token_ids=True, **PROMPT)
    assert len(called.sent[-1].prompt_token_ids) == undisturbed["usage"]["prompt_tokens"] + len(earlier.token_ids)
    assert json.loads(content) | {"created": 0} == undisturbed | {"created": 0}
    assert rest.token_ids == []  # it has ended: nothing for others to go on with


async def check_sampling(called: Called) -> None:
    """What is sampled goes on from where it was, with what is left to make."""
    sampled = {"temperature": 1.0, "stream": True} | PROMPT
    parts = await called.parts(COMPLETIONS, **sampled)
    made = joined(progress for _, progress in parts)
    earlier = Progress(made.prompt_digest, made.steps[:11])
    resumed = await called.parts(COMPLETIONS, earlier, **sampled)
    before = texts(b"".join(chunk for chunk, _ in parts))[:11]  # one event for each step
    assert texts(b"".join(chunk for chunk, _ in resumed))[:11] == before
    assert len(earlier.token_ids + joined(progress for _, progress in resumed).token_ids) == NUM_TOKENS


async def check_obstacles(called: Called) -> None:
    cases = {
        "several choices": {"n": 2, "temperature": 1.0},
        "log-probabilities": {"logprobs": 1},
        "structured output": {"structured_outputs": {"choice": ["yes", "no"]}},
        "presence or frequency penalty": {"presence_penalty": 0.5},
        "bad words": {"bad_words": ["time"]},
        "several prompts": {"prompt": ["one", "two"]},
    }
    for obstacle, fields in cases.items():
        parts = await called.parts(COMPLETIONS, stream=True, **(PROMPT | fields))
        made = joined(progress for _, progress in parts)
        assert (made.obstacle, made.steps) == (obstacle, ()), obstacle
    made = joined([progress for _, progress in await called.parts(COMPLETIONS, stream=True, **PROMPT)])
    other = Progress(b"of another prompt", made.steps[:5])
    refused = b"".join([chunk for chunk, _ in await called.parts(COMPLETIONS, other, stream=True, **PROMPT)])
    assert b'"error"' in refused and b'"choices"' not in refused


TEXT = "naïve 😀 costs 5 € — 日本語, then END of it"


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY])
@pytest.mark.parametrize("min_tokens", [0, 1000])
@pytest.mark.parametrize("stop", [None, ["then END"]])
def test_output_state_is_the_same_wherever_a_character_or_stop_string_is_cut(
    demo: DemoPaths, kind: RequestOutputKind, min_tokens: int, stop: list[str] | None
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.model)
    token_ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    prompt_ids = tokenizer("Once upon a time")["input_ids"]
    assert len(token_ids) > len(TEXT.split())
    params = SamplingParams(max_tokens=len(token_ids) + 1, min_tokens=0, stop=stop, output_kind=kind)
    params.min_tokens = min_tokens  # above max_tokens: no stop string counts

    def new_state() -> RequestState:
        request = EngineCoreRequest("1-a", prompt_ids, None, params, None, 0.0, None, None, None, external_req_id="1")
        return RequestState.from_new_request(tokenizer, request, None, None, 0, None, False, 1)

    def go_on(state: RequestState, rest: list[int]) -> list[Any]:
        """What the tokens bring, one by one, up to a stop string or the last."""
        assert state.detokenizer is not None
        seen: list[Any] = []
        for place, token_id in enumerate(rest):
            stopped = state.detokenizer.update([token_id], False)
            is_last = place + 1 == len(rest)
            reason = FinishReason.STOP if stopped else FinishReason.LENGTH if is_last else None
            if (output := state.make_request_output([token_id], None, reason, stopped)) is not None:
                seen.append((output.outputs[0].text, list(output.outputs[0].token_ids), output.outputs[0].stop_reason))
            if stopped:
                break
        return seen

    undisturbed = go_on(new_state(), token_ids)
    text = "".join(text for text, _, _ in undisturbed)
    stops = stop is not None and not min_tokens
    assert text == (TEXT.partition("then END")[0] if stops else TEXT)
    num_made = len(undisturbed) if kind == RequestOutputKind.DELTA else len(undisturbed[0][1])
    for seam in range(1, num_made):
        state = new_state()
        outputs = replayed(state, tuple(OutputStep((token_id,)) for token_id in token_ids[:seam]))
        before = [(output.outputs[0].text, list(output.outputs[0].token_ids), None) for output in outputs]
        assert before + go_on(state, token_ids[seam:]) == undisturbed, seam


def test_what_is_left_of_a_request() -> None:
    params = SamplingParams(max_tokens=10, min_tokens=4, extra_args={PREDICTED_TOKENS: 3, "other": 1})
    request = EngineCoreRequest("1", [7, 8], None, params, None, 0.0, None, None, None)
    for num_tokens, left in ((1, (9, 3, 2)), (4, (6, 0, 1)), (9, (1, 0, 1))):
        token_ids = list(range(num_tokens))
        rest = continued(request, token_ids)
        assert rest.prompt_token_ids == [7, 8, *token_ids]
        sampling = rest.sampling_params
        assert sampling is not None and sampling.extra_args is not None
        assert (sampling.max_tokens, sampling.min_tokens, sampling.extra_args[PREDICTED_TOKENS]) == left
        assert sampling.extra_args["other"] == 1
    with pytest.raises(ResumeError, match="all tokens"):
        continued(request, list(range(10)))
    assert request.prompt_token_ids == [7, 8] and params.max_tokens == 10 and params.extra_args[PREDICTED_TOKENS] == 3


@pytest.mark.parametrize(
    "check", [check_streams, check_stop_strings, check_whole_answers, check_sampling, check_obstacles]
)
def test_an_answer_goes_on_in_another_engine_as_if_nothing_had_happened(
    demo: DemoPaths, served: ServedEngine, check: Callable[[Called], Awaitable[None]]
) -> None:
    served.run(lambda: check(Called(served, demo)))
