"""The random model and adapters: distinct, reproducible answers, and made only once."""

import hashlib
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from chameleon_ray.demo import DemoError, DemoPaths
from chameleon_ray.random_demo import RANKS, make_random_demo

BASE = "__base__"
"""What PEFT calls the model without an adapter."""
PROMPT = [{"role": "user", "content": "Hello, who are you?"}]


def _digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _load(demo: DemoPaths, dtype: torch.dtype) -> PeftModel:
    """The base model with all adapters, each under its name."""
    base = AutoModelForCausalLM.from_pretrained(demo.model, dtype=dtype)
    names = demo.adapter_names()
    options = {"autocast_adapter_dtype": False}
    model = PeftModel.from_pretrained(base, str(demo.adapters / names[0]), adapter_name=names[0], **options)
    for name in names[1:]:
        model.load_adapter(str(demo.adapters / name), adapter_name=name, **options)
    return model.to(dtype).eval()


def test_greedy_answers_are_distinct_and_independent_of_rounding(demo: DemoPaths) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.model)
    prompt = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    names = [*demo.adapter_names(), BASE]
    batch = {name: tensor.repeat(len(names), 1) for name, tensor in prompt.items()}

    def answer(dtype: torch.dtype) -> dict[str, str]:
        with torch.inference_mode():
            tokens = _load(demo, dtype).generate(**batch, adapter_names=names, max_new_tokens=24, do_sample=False)
        return dict(zip(names, tokenizer.batch_decode(tokens[:, prompt["input_ids"].shape[1] :]), strict=True))

    answers = answer(torch.float32)
    assert answers == answer(torch.float64)
    beginnings = {text[:20] for text in answers.values()}
    assert len(beginnings) == 25, answers
    assert all(text.isascii() and text.isprintable() for text in answers.values())


def test_adapters_are_what_peft_reads_with_all_ranks(demo: DemoPaths) -> None:
    configs = [LoraConfig.from_pretrained(str(demo.adapters / name)) for name in demo.adapter_names()]
    assert len(configs) == 24 and {config.r for config in configs} == set(RANKS)
    assert all(f"-r{config.r}-" in name for name, config in zip(demo.adapter_names(), configs, strict=True))
    assert all(len(config.target_modules) == 7 for config in configs)
    assert sorted(path.name for path in demo.adapters.iterdir()) == sorted(demo.adapter_names())


def test_same_bytes_every_time_and_made_only_once(demo: DemoPaths, tmp_path: Path) -> None:
    said: list[str] = []
    again = make_random_demo(tmp_path / "demo", progress=said.append)
    assert len(said) == 2 and said[0].startswith("Making")
    digests = _digests(again.model.parent)
    assert digests == _digests(demo.model.parent)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]

    (again.model / "touched").touch()
    make_random_demo(tmp_path / "demo", progress=said.append)
    assert said[2:] == [f"{tmp_path / 'demo'} holds a random model and 24 adapters"]
    assert (again.model / "touched").exists()

    make_random_demo(tmp_path / "demo", force=True, progress=said.append)
    assert _digests(again.model.parent) == digests
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_never_overwrites_a_folder_that_is_no_demo(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    for force in (False, True):
        with pytest.raises(DemoError, match="another folder"):
            make_random_demo(tmp_path, force=force)
    assert (tmp_path / "thesis.txt").read_text() == "precious"
