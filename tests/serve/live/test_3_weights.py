"""Each adapter's own weights, at its own rank, whatever else is in the batch."""

from functools import partial

import httpx
import pytest

from chameleon_ray.random_demo import RANKS
from live.calls import complete, concurrently
from live.reference import Answer, Reference
from live.service import Service

NUM_TOKENS = 12
PROMPTS = ("What is the capital of France?", "The old captain writes letters that no one reads. Please write a query")


@pytest.fixture(scope="module")
def reference(shared_service: Service) -> Reference:
    return Reference(shared_service.demo.model)


def check(expected: Answer, response: httpx.Response) -> None:
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    expected.check(choice["token_ids"], choice["logprobs"]["token_logprobs"])


def test_greedy_answers_are_those_of_transformers_with_merged_adapters(service: Service, reference: Reference) -> None:
    names = service.demo.adapter_names()[:8]
    assert {name.split("-")[1] for name in names} == {f"r{rank}" for rank in RANKS}
    prompts = [reference.prompt_ids(prompt) for prompt in PROMPTS]
    cases = [(name, prompt) for name in (None, *names) for prompt in prompts]
    expected = [
        reference.answer(None if name is None else service.demo.adapters / name, prompt, NUM_TOKENS)
        for name, prompt in cases
    ]
    assert len({tuple(answer.token_ids) for answer in expected}) == len(cases), "the demo's answers must all differ"

    calls = [
        partial(
            complete,
            service,
            name or service.base,
            prompt=prompt,
            max_tokens=NUM_TOKENS,
            logprobs=1,
            return_token_ids=True,
        )
        for name, prompt in cases
    ]
    for response, answer in zip(concurrently(calls, clients=len(calls)), expected, strict=True):
        check(answer, response)


def test_text_prompts_are_tokenized_as_transformers_does(service: Service, reference: Reference) -> None:
    for prompt in PROMPTS:
        response = complete(service, service.base, prompt=prompt, max_tokens=1, return_token_ids=True)
        assert response.json()["choices"][0]["prompt_token_ids"] == reference.prompt_ids(prompt)


def test_the_base_model_stays_itself_among_more_adapters_than_there_are_slots(
    service: Service, reference: Reference
) -> None:
    prompts = [reference.prompt_ids(prompt) for prompt in PROMPTS]
    expected = [reference.answer(None, prompt, NUM_TOKENS) for prompt in prompts]
    names = service.demo.adapter_names()
    calls = [
        partial(complete, service, model, prompt=prompt, max_tokens=NUM_TOKENS, logprobs=1, return_token_ids=True)
        for name in names
        for prompt in prompts
        for model in (name, service.base)
    ]
    responses = concurrently(calls, clients=48)
    assert {response.status_code for response in responses} == {200}
    of_base = [response for response in responses if response.json()["model"] == service.base]
    assert len(of_base) == len(names) * len(prompts)
    for place, response in enumerate(of_base):
        check(expected[place % len(prompts)], response)
