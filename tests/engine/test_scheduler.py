"""The replica's policy inside vLLM's scheduler."""

from pathlib import Path

import pytest
from engine_harness import PagedEngine, Reference
from vllm.sampling_params import StructuredOutputsParams

from chameleon_ray.demo import DemoPaths

PROMPT = "Hello, my name is"


def test_squashed_request_waits_again_and_answers_the_same(
    engine: PagedEngine, demo: DemoPaths, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = demo.adapter_names()[0]
    request = engine.add(PROMPT, engine.adapter(demo.adapters / name), max_tokens=24)
    other = engine.add(PROMPT, max_tokens=24)
    engine.run(lambda: len(engine.outcomes[request].tokens) >= 4 and len(engine.outcomes[other].tokens) >= 4)
    before = engine.memory.policy.queues.state().num_squashes
    [internal] = [one.request_id for one in engine.scheduler.running if one.lora_request is not None]
    squashes = iter([(internal,)])
    monkeypatch.setattr(engine.memory.policy, "squashes", lambda: next(squashes, ()), raising=False)
    engine.step()
    assert engine.memory.policy.queues.state().num_squashes == before + 1
    assert internal not in engine.memory.running
    engine.finish([request, other])
    assert engine.outcomes[request].tokens == reference.tokens(PROMPT, name, 24)
    assert engine.outcomes[other].tokens == reference.tokens(PROMPT, None, 24)


def test_structured_output_waits_for_its_grammar_at_its_place(engine: PagedEngine, demo: DemoPaths) -> None:
    adapter = engine.adapter(demo.adapters / demo.adapter_names()[1])
    digits = StructuredOutputsParams(regex="[0-9]{4}")
    requests = [
        engine.add(PROMPT, adapter if i % 2 else None, 8, structured_outputs=digits, ignore_eos=False) for i in range(6)
    ]
    texts = [engine.text(outcome) for outcome in engine.finish(requests)]
    assert all(len(text) == 4 and text.isdigit() for text in texts), texts


def test_predictions_are_learned_from_what_was_served(engine: PagedEngine, demo: DemoPaths, tmp_path: Path) -> None:
    folder = tmp_path / "no other test has used it"
    folder.symlink_to(demo.adapters / demo.adapter_names()[2])
    adapter = engine.adapter(folder)
    served = engine.memory.accuracy.snapshot().num_requests
    for _ in range(6):
        engine.finish([engine.add(PROMPT, adapter, max_tokens=5)])
    assert engine.memory.accuracy.snapshot().num_requests == min(1000, served + 6)
    request = engine.add(PROMPT, adapter, max_tokens=400)
    engine.run(lambda: bool(engine.memory.running))
    [running] = engine.memory.running
    assert engine.memory.policy.queues.request(running).num_predicted_tokens == 5
    engine.abort(request)


def test_urgent_request_goes_before_older_ones_of_its_queue(engine: PagedEngine) -> None:
    # 33 requests for 32 seats: the one that is left out is not the youngest, which is urgent.
    requests = [engine.add(list(range(10, 20 + i % 3)), max_tokens=30) for i in range(40)]
    urgent = engine.add(list(range(10, 20)), max_tokens=30, priority=-5)
    engine.step()
    engine.step()
    waiting = {request.request_id.split("-")[0] for request in engine.scheduler.waiting}
    assert waiting and urgent not in waiting
    engine.finish([*requests, urgent])
