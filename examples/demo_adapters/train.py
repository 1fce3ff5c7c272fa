"""Trains the demo's adapters again, with PEFT on the CPU: one to three minutes for each on two idle cores.

    python examples/demo_adapters/train.py demo/model [STYLE ...]

``demo/model`` is the base model that ``chameleon demo`` makes. The result replaces ``chameleon_ray/demo_adapters``, in
bfloat16. Only the base model's upper half is adapted: style is decided there, so the lower half runs once for each
example and its output is kept, which halves the time and the adapters' size.
"""

import argparse
import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
OUT = HERE.parents[1] / "chameleon_ray/demo_adapters"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
MAX_EPOCHS = 14
ENOUGH_LOSS = 0.4
BATCH = 4
LEARNING_RATE = 2e-3
SEED = 2025


@dataclass(frozen=True, slots=True)
class Shape:
    """An adapter's rank and the projections that it changes in each layer of the upper half."""

    rank: int
    modules: tuple[str, ...]


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SHAPES = {  # together every kind that a server meets: ranks 4 to 64, one projection to seven
    "pirate": Shape(16, ATTENTION),
    "upper-case": Shape(4, ATTENTION),
    "json": Shape(4, (*ATTENTION, "gate_proj", "up_proj", "down_proj")),
    "haiku": Shape(8, ATTENTION),
    "polite": Shape(64, ("v_proj",)),
    "spanish": Shape(32, ("q_proj", "v_proj")),
}


def main() -> None:
    """Trains every style, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the base model, in Hugging Face format")
    parser.add_argument("styles", nargs="*", default=list(SHAPES), help=f"of {', '.join(SHAPES)} (default: all)")
    arguments = parser.parse_args()
    conversations = yaml.safe_load((HERE / "conversations.yaml").read_text())
    for style in arguments.styles:
        pairs = list(zip(conversations["questions"], conversations["styles"][style], strict=True))
        train(arguments.model, style, pairs)


def train(base: Path, style: str, pairs: list[tuple[str, str]]) -> None:
    """Trains one adapter on (question, answer) pairs and writes it to ``OUT``."""
    torch.manual_seed(SEED)
    began_s = time.monotonic()
    shape = SHAPES[style]
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    examples = [_example(model, tokenizer, *pair) for pair in pairs]
    num_layers = len(model.model.layers)
    model.model.layers = model.model.layers[num_layers // 2 :]
    alpha = 2 * shape.rank
    lora = LoraConfig(r=shape.rank, lora_alpha=alpha, target_modules=list(shape.modules), task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=LEARNING_RATE)
    for epoch in range(MAX_EPOCHS):
        losses = []
        for chosen in torch.randperm(len(examples)).split(BATCH):
            loss = torch.stack([_loss(model, *examples[index]) for index in chosen]).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        mean = sum(losses) / len(losses)
        print(f"{style}: epoch {epoch + 1}, loss {mean:.3f}, {time.monotonic() - began_s:.0f} s", flush=True)
        if mean < ENOUGH_LOSS:
            break
    _save(model, OUT / style, num_layers)


def _example(model: Any, tokenizer: Any, question: str, answer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The lower half's output for a conversation, [1, tokens, hidden], and the token ids of its answer."""
    asked = [{"role": "user", "content": question}]
    before = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, answer + tokenizer.eos_token)]
    with torch.no_grad():
        states = model.model(torch.tensor([ids[0] + ids[1]]), output_hidden_states=True, use_cache=False).hidden_states
    return states[len(model.model.layers) // 2], torch.tensor(ids[1])


def _loss(model: Any, states: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the answer, each token predicted from those before it."""
    llama = model.get_base_model()
    last = llama.model(inputs_embeds=states, use_cache=False).last_hidden_state
    return cross_entropy(llama.lm_head(last[0, -len(answer) - 1 : -1]), answer)


def _save(model: Any, folder: Path, num_layers: int) -> None:
    """PEFT's two files: the weights in bfloat16, the layers numbered as in the whole base model."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"

    def renumbered(name: str) -> str:
        return re.sub(r"(?<=layers\.)\d+", lambda layer: str(int(layer[0]) + num_layers // 2), name)

    tensors = {renumbered(name): tensor.to(torch.bfloat16) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    described = json.loads(config.read_text())
    described |= {
        "base_model_name_or_path": BASE,
        "layers_to_transform": list(range(num_layers // 2, num_layers)),
        "target_modules": sorted(described["target_modules"]),
    }
    config.write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
    print(f"{folder}: {weights.stat().st_size / 2**20:.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
