"""Adapters computed on where they lie in KV memory: right answers, whatever comes and goes."""

import json
import shutil
from pathlib import Path

import pytest
from engine_harness import PagedEngine, Reference
from safetensors.numpy import load_file, save_file

from chameleon_ray.demo import DemoPaths
from chameleon_ray.policy.adapter import Tier

PROMPTS = ("Hello, my name is", "What is the capital of France?", "Once upon a time there was")
NUM_TOKENS = 8


def test_mixed_batch_answers_as_merged_weights_do_before_and_after_eviction(
    engine: PagedEngine, reference: Reference, demo: DemoPaths
) -> None:
    # 15 adapters of all ranks beside base requests in one batch. The engine's memory does not hold all 24, so in the
    # rounds between, others push them out of blocks and host memory. Prefix caching is on, prompts repeat.
    names = demo.adapter_names()
    mixed = [None, *names[:15], None]
    expected = [reference.tokens(PROMPTS[i % 3], name, NUM_TOKENS) for i, name in enumerate(mixed)]
    assert len(set(expected)) > 14, "the adapters must answer differently for this test to say anything"

    def answers(wanted: list[str | None]) -> list[tuple[int, ...]]:
        requests = [
            engine.add(PROMPTS[i % 3], name and engine.adapter(demo.adapters / name), NUM_TOKENS)
            for i, name in enumerate(wanted)
        ]
        return [outcome.tokens for outcome in engine.finish(requests)]

    assert answers(mixed) == expected
    assert answers(mixed) == expected
    answers(list(reversed(names)))
    evicted = set(names[:15]) - {name for name in names if _tier(engine, demo.adapters / name) is Tier.GPU}
    assert evicted, "memory was meant to be too small for all adapters"
    assert answers(mixed) == expected


def test_adapter_replaced_under_its_name_meets_no_old_weights_and_no_old_kv(
    engine: PagedEngine, reference: Reference, demo: DemoPaths, tmp_path: Path
) -> None:
    old, new = demo.adapter_names()[2:4]
    folder = tmp_path / "customer"
    shutil.copytree(demo.adapters / old, folder)
    prompt = PROMPTS[0] * 40  # Several blocks, so that the prefix cache would be used.
    adapter = engine.adapter(folder, "customer")
    assert engine.finish([engine.add(prompt, adapter)])[0].tokens == reference.tokens(prompt, old, 8)

    running = engine.add(prompt, adapter, max_tokens=30)
    engine.run(lambda: len(engine.outcomes[running].tokens) >= 3)
    shutil.rmtree(folder)
    shutil.copytree(demo.adapters / new, folder)
    # The same name and, as with vLLM's load_inplace, the same number.
    after = engine.finish([engine.add(prompt, adapter)])[0]
    assert after.tokens == reference.tokens(prompt, new, 8)
    assert engine.finish([running])[0].tokens == reference.tokens(prompt, old, 30)


def test_rank_and_number_of_adapters_are_not_limited_by_vllms_slot_options(
    engine: PagedEngine, demo: DemoPaths
) -> None:
    # max_loras is 1 and max_lora_rank 16 by default, and no slot tensor is allocated.
    lora = engine.llm.vllm_config.lora_config
    assert lora.max_lora_rank == 16
    slots = engine.llm.collective_rpc("apply_model", args=(_slot_elements,))
    assert slots == [0]
    big = [name for name in demo.adapter_names() if "-r128-" in name][:3]
    requests = [engine.add(PROMPTS[0], engine.adapter(demo.adapters / name)) for name in big]
    engine.run(lambda: len(engine.scheduler.running) == 3)
    engine.finish(requests)


def _slot_elements(model: object) -> int:
    return sum(
        tensor.numel()
        for module in model.modules()  # type: ignore[attr-defined]
        for name in ("lora_a_stacked", "lora_b_stacked")
        for tensor in getattr(module, name, ())
    )


def _tier(engine: PagedEngine, folder: Path) -> Tier:
    known = [k for k in engine.memory._known.values() if k.path == str(folder)]
    return engine.memory.cache.tiers()[known[-1].digest]


def _broken(source: Path, target: Path, problem: str) -> Path:
    shutil.copytree(source, target)
    weights = target / "adapter_model.safetensors"
    config = json.loads((target / "adapter_config.json").read_text())
    tensors = load_file(weights)
    first = next(name for name in tensors if name.endswith("q_proj.lora_B.weight"))
    if problem == "missing":
        weights.unlink()
    elif problem == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif problem == "wrong shape":
        save_file(tensors | {first: tensors[first][:-4]}, weights)
    elif problem == "not finite":
        tensors[first][0, 0] = float("nan")
        save_file(tensors, weights)
    elif problem == "output head":
        head = {"base_model.model.lm_head.lora_A.weight": tensors[first].T.copy()}
        head["base_model.model.lm_head.lora_B.weight"] = tensors[first].copy()
        save_file(tensors | head, weights)
    elif problem == "rank":
        grown = {name: t.repeat(40, axis=0 if "lora_A" in name else 1) for name, t in tensors.items()}
        save_file(grown, weights)
        (target / "adapter_config.json").write_text(json.dumps(config | {"r": 40 * config["r"]}))
    elif problem == "dora":
        (target / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    return target


@pytest.mark.parametrize(
    ("problem", "says"),
    [
        ("missing", "missing"),
        ("truncated", "truncated"),
        ("wrong shape", "another base model"),
        ("not finite", "finite"),
        ("output head", "lm_head"),
        ("rank", "over the bound of 256"),
        ("dora", "use_dora"),
    ],
)
def test_bad_adapter_fails_its_own_requests_only_and_can_be_repaired(
    engine: PagedEngine, reference: Reference, demo: DemoPaths, tmp_path: Path, problem: str, says: str
) -> None:
    good, other = demo.adapter_names()[0:2]
    folder = _broken(demo.adapters / good, tmp_path / f"bad-{problem}", problem)
    adapter = engine.adapter(folder, f"bad {problem}")
    requests = [
        engine.add(PROMPTS[0], adapter),
        engine.add(PROMPTS[0], engine.adapter(demo.adapters / other)),
        engine.add(PROMPTS[0], adapter),
        engine.add(PROMPTS[0]),
    ]
    bad, well, also_bad, base = engine.finish(requests)
    for outcome in (bad, also_bad):
        assert (outcome.finish_reason, outcome.tokens) == ("error", ())
        assert says in outcome.stop_reason and adapter.lora_name in outcome.stop_reason
    assert well.tokens == reference.tokens(PROMPTS[0], other, 8)
    assert base.tokens == reference.tokens(PROMPTS[0], None, 8)
    # Refused again, until there are good files.
    assert engine.finish([engine.add(PROMPTS[0], adapter)])[0].finish_reason == "error"
    shutil.rmtree(folder)
    shutil.copytree(demo.adapters / good, folder)
    assert engine.finish([engine.add(PROMPTS[0], adapter)])[0].tokens == reference.tokens(PROMPTS[0], good, 8)
