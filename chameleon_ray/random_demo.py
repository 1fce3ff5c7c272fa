"""A model and 24 adapters of random weights, made from a seed in seconds: for tests and benchmarks, where speed counts.

Answers are word salad, but every weight matters: each layer adds about as much to the residual stream as the embedding
does, and an adapter changes each of its projections by about its own size. A serving system that mixes up, drops or
wrongly scales any part of an adapter gives another answer.

Float32 is stored (and is what ``engine.dtype: float32`` should compute with to compare tokens): the gap between the
best and the second-best token is far above float32's rounding, so greedy answers do not depend on who computes them
or on what else is in the batch; with bfloat16 they would. Sizes: the model 11 MB, the adapters 78 MB.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from chameleon_ray.demo import DemoPaths, make_once

VERSION = 1
"""Grows when the content changes, so that what older code has made is made again."""
FOLDER = Path(".chameleon/random-demo")
"""Where benchmarks keep it, below the current folder."""
SEED = 2025
RANKS = (8, 16, 32, 64, 128)
NUM_ADAPTERS = 24
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_MODEL_NAME = "chameleon-demo"
_HIDDEN, _INTERMEDIATE, _LAYERS, _HEADS, _KV_HEADS = 256, 512, 4, 8, 4
_KV_WIDTH = _HIDDEN // _HEADS * _KV_HEADS
_VOCAB = 640
_MODULES = {  # name in a layer -> (out_features, in_features, gain of a random weight)
    "self_attn.q_proj": (_HIDDEN, _HIDDEN, 1.7),  # attention scores of deviation 3: each head prefers some tokens
    "self_attn.k_proj": (_KV_WIDTH, _HIDDEN, 1.7),
    "self_attn.v_proj": (_KV_WIDTH, _HIDDEN, 1.0),
    "self_attn.o_proj": (_HIDDEN, _HIDDEN, 1.5),  # makes up for averaging over positions
    "mlp.gate_proj": (_INTERMEDIATE, _HIDDEN, 1.0),
    "mlp.up_proj": (_INTERMEDIATE, _HIDDEN, 1.0),
    "mlp.down_proj": (_HIDDEN, _INTERMEDIATE, 1.7),  # makes up for silu(gate) * up being below one
}
_LOGIT_DEVIATION = 4.0
_ADAPTER_STRENGTH = 0.7  # root mean square of an adapter's part of a projection, where the base model's is the gain
_SPECIAL = ("<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_TEXT = """
A chameleon changes its colour to fit the place it is in, and a language model changes its voice with an adapter. One
base model stays in memory; many small adapters come and go, each trained for one customer, one task, one language or
one style. When a question arrives, the router looks for the machine that already holds the right adapter, because
loading takes time and time is what people notice first. Popular adapters stay near the compute, rare ones wait on
disk, and nobody should ever stand in line behind somebody who talks all day. Short requests are quick, long requests
are patient, and both must be treated fairly. The scheduler sorts them into queues, gives every queue a share of the
tokens, and lets a small one pass when a large one has to wait for memory. Morning in the garden: the sun climbs over
the wall, green leaves turn to gold, a bird sings twice and the cat pretends to sleep. Rivers run to the sea, ships
bring tea, salt, paper and stories; the old captain writes letters that no one reads. What is the capital of France?
Paris, said the teacher. How do I bake bread? Take flour, water, yeast and salt, and then take your time. Please write
a query that counts the orders of each customer in the last month, sorted by total. Hello, my name is Ada, and I would
like to know more about the weather in the mountains. Once upon a time there was a king who had three daughters and
one horse. Red, blue, yellow, black, white, brown, purple; one, two, three, four, five, six, seven, eight, nine, ten.
"""


def adapter_name(index: int) -> str:
    """``demo-r<rank>-<index>``; ranks cycle through RANKS."""
    return f"demo-r{RANKS[index % len(RANKS)]}-{index:02d}"


@dataclass(frozen=True, slots=True)
class LinkedAdapter:
    """An adapter to serve: its folder and its rank."""

    path: Path
    rank: int


def link_adapters(demo: DemoPaths, folder: Path, count: int) -> dict[str, LinkedAdapter]:
    """``count`` adapters in ``folder`` by name, ranks in turn: the demo's files, linked. To engines they differ."""
    sources = demo.adapter_names()
    sources = sources[: len(sources) // len(RANKS) * len(RANKS)]
    adapters = {}
    for number in range(count):
        rank = RANKS[number % len(RANKS)]
        path = folder / f"demo-r{rank}-{number:03d}"
        path.mkdir()
        for file in (demo.adapters / sources[number % len(sources)]).iterdir():
            (path / file.name).symlink_to(file)
        adapters[path.name] = LinkedAdapter(path, rank)
    return adapters


def make_random_demo(
    folder: Path = FOLDER, *, force: bool = False, progress: Callable[[str], None] = print
) -> DemoPaths:
    """Make the model and the adapters in ``folder`` unless they are there; see ``make_once``. Raises DemoError."""
    names = tuple(adapter_name(index) for index in range(NUM_ADAPTERS))

    def build(target: Path) -> None:
        _write_model(target / "model")
        for index, name in enumerate(names):
            _write_adapter(target / "adapters" / name, index)

    marker: dict[str, str | int] = {"demo": "random", "version": VERSION, "seed": SEED}
    what = f"a random model and {NUM_ADAPTERS} adapters"
    made = make_once(folder, marker, what, build, force=force, progress=progress)
    return DemoPaths(made / "model", made / "adapters", names)


def _write_model(folder: Path) -> None:
    tokenizer = _make_tokenizer()
    config = LlamaConfig(
        vocab_size=_VOCAB,
        hidden_size=_HIDDEN,
        intermediate_size=_INTERMEDIATE,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        num_key_value_heads=_KV_HEADS,
        max_position_embeddings=2048,
        tie_word_embeddings=False,  # tied, a random model mostly repeats its last token
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = {name: torch.from_numpy(array) for name, array in _model_weights(tokenizer).items()}
    model.load_state_dict(weights, strict=True, assign=True)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in _SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT.replace("\n", " ")], trainer)
    if tokenizer.get_vocab_size() != _VOCAB:
        raise AssertionError(f"the demo's text gives {tokenizer.get_vocab_size()} tokens, not {_VOCAB}")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|begin|>",
        eos_token="<|end|>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = _CHAT_TEMPLATE
    return wrapped


def _model_weights(tokenizer: PreTrainedTokenizerFast) -> dict[str, npt.NDArray[np.float32]]:
    rng = np.random.default_rng([SEED, 0])
    weights = {
        "model.embed_tokens.weight": _normal(rng, (_VOCAB, _HIDDEN), 1.0),
        "model.norm.weight": np.ones(_HIDDEN, np.float32),
    }
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{norm}.weight"] = np.ones(_HIDDEN, np.float32)
        for module, (out, width, gain) in _MODULES.items():
            weights[f"{prefix}{module}.weight"] = _normal(rng, (out, width), gain / width**0.5)
    head = _normal(rng, (_VOCAB, _HIDDEN), _LOGIT_DEVIATION / _HIDDEN**0.5)
    # Greedy answers are readable words and end where the request's max_tokens says: special tokens and lone bytes get
    # the logit 0, far below the best of hundreds of words.
    for token, index in tokenizer.get_vocab().items():
        text = tokenizer.decode([index])
        if token in _SPECIAL or len(text.strip()) < 2 or not text.isascii():
            head[index] = 0.0
    weights["lm_head.weight"] = head
    return weights


def _write_adapter(folder: Path, index: int) -> None:
    rank = RANKS[index % len(RANKS)]
    rng = np.random.default_rng([SEED, 1 + index])
    alpha = 2 * rank
    tensors = {}
    for layer in range(_LAYERS):
        for module, (out, width, gain) in _MODULES.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            # The product alpha / rank * B @ A @ x has the root mean square strength * gain for x of root mean square 1.
            tensors[f"{prefix}.lora_A.weight"] = _normal(rng, (rank, width), 1 / width**0.5)
            deviation = _ADAPTER_STRENGTH * gain / (alpha / rank) / rank**0.5
            tensors[f"{prefix}.lora_B.weight"] = _normal(rng, (out, rank), deviation)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.dumps(_peft_config(rank, alpha), indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(config)


def _peft_config(rank: int, alpha: int) -> dict[str, Any]:
    """The fields that PEFT's ``LoraConfig.save_pretrained`` writes for a plain adapter and that mean something here."""
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": _MODEL_NAME,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": list(TARGET_MODULES),
        "target_parameters": None,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _normal(rng: np.random.Generator, shape: tuple[int, int], deviation: float) -> npt.NDArray[np.float32]:
    return (rng.standard_normal(shape) * deviation).astype(np.float32)
