"""The OpenAI API as OpenAI's own client uses it."""

import json
from typing import Any

import openai
import pytest

from live.service import Service

ADAPTER = "demo-r16-01"
MODELS = ("{base}", ADAPTER, "{base}:" + ADAPTER)
"""The base model, and an adapter by both of its names."""
MESSAGES: list[Any] = [{"role": "user", "content": "Hello, who are you?"}]
PROMPT = "Once upon a time"


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, service: Service) -> str:
    return str(request.param).format(base=service.base)


@pytest.fixture
def plain_name(model: str, service: Service) -> str:
    """What answers call the model, however the request did."""
    return model.removeprefix(f"{service.base}:")


def test_chat(client: openai.OpenAI, model: str, plain_name: str) -> None:
    answer = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=12, temperature=0)
    assert answer.model == plain_name
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12

    chunks = list(
        client.chat.completions.create(
            model=model,
            messages=MESSAGES,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text and text == answer.choices[0].message.content
    assert {chunk.model for chunk in chunks} == {plain_name}
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "length"
    assert chunks[-1].usage == answer.usage


def test_completions(client: openai.OpenAI, model: str, plain_name: str) -> None:
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0)
    assert answer.model == plain_name
    assert answer.usage is not None and answer.usage.completion_tokens == 12
    chunks = list(client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0, stream=True))
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text and text == answer.choices[0].text
    assert {chunk.model for chunk in chunks} == {plain_name}


def test_both_names_of_an_adapter_mean_the_same_and_not_the_base(client: openai.OpenAI, service: Service) -> None:
    texts = [
        client.completions.create(model=name, prompt=PROMPT, max_tokens=12, temperature=0).choices[0].text
        for name in (service.base, ADAPTER, f"{service.base}:{ADAPTER}")
    ]
    assert texts[1] == texts[2] != texts[0]


def test_models(client: openai.OpenAI, service: Service) -> None:
    cards = {card.id: card.to_dict() for card in client.models.list()}
    names = service.demo.adapter_names()
    assert cards.keys() == {service.base, *names}
    assert cards[service.base]["parent"] is None
    assert cards[service.base]["root"] == str(service.demo.model)
    for name in names:
        assert cards[name]["parent"] == service.base
        assert cards[name]["root"] == str(service.demo.adapters / name)

    assert client.models.retrieve(service.base).id == service.base
    assert client.models.retrieve(ADAPTER).to_dict() == cards[ADAPTER]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")


def test_logprobs_and_stop(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model=ADAPTER, messages=MESSAGES, max_tokens=12, temperature=0, logprobs=True, top_logprobs=2
    ).choices[0]
    assert whole.logprobs is not None and whole.logprobs.content is not None and whole.message.content is not None
    assert [token.top_logprobs[0].token for token in whole.logprobs.content] == [
        token.token for token in whole.logprobs.content
    ]
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in whole.logprobs.content)

    stop = whole.logprobs.content[6].token
    cut = client.chat.completions.create(model=ADAPTER, messages=MESSAGES, max_tokens=12, temperature=0, stop=[stop])
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].message.content == whole.message.content.partition(stop)[0]


def test_structured_output(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "boolean"}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=ADAPTER,
        messages=MESSAGES,
        max_tokens=100,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}},
    )
    found = json.loads(answer.choices[0].message.content or "")
    assert found["colour"] in ("red", "green") and isinstance(found["count"], bool)


def test_health_when_whole(service: Service) -> None:
    health = service.http.get("/health")
    assert health.status_code == 200
    assert health.json() == {"status": "ok", "redis": "connected", "replicas": service.num_replicas}
