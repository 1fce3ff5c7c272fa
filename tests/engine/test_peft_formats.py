"""Adapters as the ``peft`` library writes them: what is accepted answers as with ``peft``, what is refused says why."""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_harness import PagedEngine, Reference
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model, save_as_lora
from peft.tuners.lora import LoraGAConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from chameleon_ray.adapters.catalog import AdapterLibrary
from chameleon_ray.adapters.errors import AdapterError
from chameleon_ray.adapters.modules import ModuleTable
from chameleon_ray.adapters.peft_config import LoraConfig as ServedConfig
from chameleon_ray.config import AdaptersConfig, ModelConfig
from chameleon_ray.demo import DemoPaths
from chameleon_ray.engine.modules import merge_tables

PROMPT, NUM_TOKENS = "Once upon a time there was", 6
STRENGTH = 1.2
"""Of an adapter's part of a projection, relative to the base model's: enough to change what the model says."""
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
PATTERNS = {
    "rank_pattern": {"layers.0.self_attn.q_proj": 2, "model.layers.3.mlp.down_proj": 7, "v_proj": 6},
    "alpha_pattern": {"k_proj": 50, "layers.1.mlp.up_proj": 1},
}
REGULAR = {
    "rank_pattern": {r"^model\.layers\.[01]\..*_proj": 9, r"self_attn\.(q|k)_proj": 2, "o_proj": 16},
    "alpha_pattern": {r"layers\.\d\.mlp\..*": 3, r".*\.2\..*": 40},
}
PLAIN: dict[str, dict[str, Any]] = {
    "rank-1": {"r": 1},
    "rank-3": {"r": 3},
    "rank-5": {"r": 5, "lora_alpha": 1},
    "rank-256": {"r": 256, "target_modules": ATTENTION},
    "rslora": {"use_rslora": True},
    "patterns": PATTERNS,
    "regular-patterns": REGULAR,
    "rslora-with-patterns": {"use_rslora": True, **REGULAR},
    "some-layers": {"layers_to_transform": [0, 2]},
    "one-layer-by-pattern": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "regular-targets": {"target_modules": r".*\.[12]\.(self_attn\.q_proj|mlp\..*_proj)"},
    "all-linear": {"target_modules": "all-linear"},
    "excluded-modules": {"exclude_modules": ["layers.1.self_attn.q_proj", "down_proj"]},
    "one-module": {"target_modules": ["model.layers.1.mlp.down_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "lora-ga": {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
}


class Trainer:
    """Adapters of the demo model, "trained" with random numbers."""

    def __init__(self, demo: DemoPaths, folder: Path) -> None:
        self._demo = demo
        self.folder = folder

    def model(self, config: Any = None, **options: Any) -> PeftModel:
        """The demo model with a LoRA of rank 8 of all projections, but for what is given."""
        base = AutoModelForCausalLM.from_pretrained(self._demo.model, dtype=torch.float32)
        chosen = {"r": 8, "lora_alpha": 16, "target_modules": ALL, "task_type": "CAUSAL_LM"} | options
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return train(get_peft_model(base, config or LoraConfig(**chosen)))

    def save(self, name: str, **options: Any) -> Path:
        self.model(**options).save_pretrained(self.folder / name)
        return self.folder / name


def train(model: PeftModel) -> PeftModel:
    """Give each projection's LoRA as much weight as the projection itself has, whatever its rank and scale."""
    rng = torch.Generator().manual_seed(len(model.peft_config["default"].to_dict().__repr__()))
    for module in model.modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            scaled = STRENGTH / module.scaling["default"] / a.shape[0] ** 0.5
            with torch.no_grad():
                a.copy_(torch.randn(a.shape, generator=rng) / a.shape[1] ** 0.5)
                b.copy_(torch.randn(b.shape, generator=rng) * scaled)
    return model


def _half(dtype: torch.dtype) -> Callable[[Trainer], tuple[Path, Path]]:
    def save(trainer: Trainer) -> tuple[Path, Path]:
        folder = trainer.folder / str(dtype)
        trainer.model(use_rslora=True).to(dtype).save_pretrained(folder)
        assert {weight.dtype for weight in load_file(folder / "adapter_model.safetensors").values()} == {dtype}
        return folder, folder

    return save


def _hub_cache(trainer: Trainer) -> tuple[Path, Path]:
    saved, cache = trainer.save("hub-upload", r=4), trainer.folder / "hub" / "models--someone--adapter"
    snapshot = cache / "snapshots" / "0e9e39f249a16976918f6564b8830bc894c89659"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(saved.iterdir()):
        shutil.move(file, cache / "blobs" / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    return snapshot, snapshot


def _trainer_folder(trainer: Trainer) -> tuple[Path, Path]:
    folder = trainer.save("run/checkpoint-500", r=4, lora_alpha=4)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (folder / name).write_bytes(os.urandom(100))
    (folder / "trainer_state.json").write_text("{}")
    return folder, folder


def _model_state(trainer: Trainer) -> tuple[Path, Path]:
    """What a training loop of one's own saves: the model's state, with the adapter's name in it."""
    model = trainer.model(r=6, **PATTERNS)
    model.save_pretrained(reference := trainer.folder / "state-reference")
    shutil.copytree(reference, by_hand := trainer.folder / "state")
    state = {name: weight.clone() for name, weight in model.state_dict().items() if "lora_" in name}
    assert any(name.endswith(".lora_A.default.weight") for name in state)
    save_file(state, by_hand / "adapter_model.safetensors")
    return by_hand, reference


def _converted_pissa(trainer: Trainer) -> tuple[Path, Path]:
    base = AutoModelForCausalLM.from_pretrained(trainer._demo.model, dtype=torch.float32)
    pissa = LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, init_lora_weights="pissa", task_type="CAUSAL_LM")
    model = get_peft_model(base, pissa)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(initial := trainer.folder / "pissa-initial")
    folder = trainer.folder / "pissa-converted"
    train(model).save_pretrained(folder, path_initial_model_for_weight_conversion=str(initial))
    return folder, folder


def _converted_loha(trainer: Trainer) -> tuple[Path, Path]:
    torch.manual_seed(0)
    model = trainer.model(
        LoHaConfig(r=4, alpha=400, target_modules=ATTENTION, init_weights=False, task_type="CAUSAL_LM")
    )
    save_as_lora(folder := trainer.folder / "loha-converted", model, rank=8)
    return folder, folder


OTHERS: dict[str, Callable[[Trainer], tuple[Path, Path]]] = {
    "float16": _half(torch.float16),
    "bfloat16": _half(torch.bfloat16),
    "hub-cache": _hub_cache,
    "trainer-folder": _trainer_folder,
    "model-state": _model_state,
    "converted-pissa": _converted_pissa,
    "converted-loha": _converted_loha,
}
WARNED = {"lora-ga": "init_lora_weights is 'lora_ga'"}


@pytest.fixture(scope="module")
def trainer(demo: DemoPaths, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return Trainer(demo, tmp_path_factory.mktemp("peft"))


@pytest.fixture(scope="module")
def library(started_engine: PagedEngine, demo: DemoPaths, trainer: Trainer) -> AdapterLibrary:
    """The adapter library of a replica with this engine."""
    table: Future[ModuleTable] = Future()
    table.set_result(merge_tables(started_engine.llm.collective_rpc("module_table")))
    config = AdaptersConfig(
        allowed_roots=[str(trainer.folder)], store_dir=str(trainer.folder / "store"), max_rank=256, folder=None
    )
    return AdapterLibrary(config, ModelConfig(source=str(demo.model)), table)


@pytest.fixture(scope="module")
def saved(trainer: Trainer) -> Iterator[Callable[[str], tuple[Path, Path]]]:
    def save(kind: str) -> tuple[Path, Path]:
        if kind in PLAIN:
            return (folder := trainer.save(kind, **PLAIN[kind])), folder
        return OTHERS[kind](trainer)

    yield save


@pytest.mark.parametrize("kind", [*PLAIN, *OTHERS])
def test_accepted_adapters_answer_as_with_peft(
    engine: PagedEngine,
    reference: Reference,
    library: AdapterLibrary,
    saved: Callable[[str], tuple[Path, Path]],
    kind: str,
) -> None:
    folder, by_peft = saved(kind)
    record = library.inspect(kind, str(folder))
    assert [warning for warning in record.warnings if WARNED.get(kind, "?") not in warning] == []
    assert len(record.warnings) == (kind in WARNED)
    with library.use(record) as stored:
        request = engine.add(PROMPT, engine.adapter(stored, kind), NUM_TOKENS)
        (outcome,) = engine.finish([request])
    expected = reference.tokens(PROMPT, str(by_peft), NUM_TOKENS)
    assert expected != reference.tokens(PROMPT, None, NUM_TOKENS), "it must change the answer for this to say anything"
    assert (outcome.stop_reason, outcome.tokens) == (None, expected)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora.*train without DoRA, or merge it"),
    "lora-bias": ({"lora_bias": True}, "lora_bias.*lora_bias=False, or merge it"),
    "bias": ({"bias": "all"}, "bias 'all'.*bias='none', or merge it"),
    "modules-to-save": ({"modules_to_save": ["lm_head"]}, "modules_to_save.*or merge it"),
    "embedding": ({"target_modules": [*ATTENTION, "embed_tokens"]}, "embed_tokens.*train without them, or merge it"),
    "head": ({"target_modules": [*ATTENTION, "lm_head"]}, "lm_head.*train without them, or merge it"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices.*or merge it"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens.*train a plain LoRA"),
    "pissa": ({"init_lora_weights": "pissa"}, "'pissa' belongs to a changed base.*path_initial_model_for_weight"),
    "olora": ({"init_lora_weights": "olora"}, "'olora' belongs to a changed base.*path_initial_model_for_weight"),
    "replicated": ({"layer_replication": [[0, 4], [2, 4]]}, "layer_replication.*without replicated layers"),
    "too-large": ({"r": 257, "target_modules": ["q_proj"]}, r"rank 257 is over .*max_rank = 256"),
    "alpha-0": ({"lora_alpha": 0}, "changes nothing .lora_alpha is 0"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_adapters_say_why_and_what_to_do(trainer: Trainer, library: AdapterLibrary, kind: str) -> None:
    options, message = REFUSED[kind]
    model = trainer.model(**options) if kind != "alpha-0" else trainer.model()
    model.save_pretrained(folder := trainer.folder / f"refused-{kind}")
    if kind == "alpha-0":
        _edit(folder, **options)
    with pytest.raises(AdapterError, match=message) as refused:
        library.inspect(kind, str(folder))
    assert 400 <= refused.value.http_status < 500


def test_refuses_what_was_never_trained_other_methods_and_pickles(trainer: Trainer, library: AdapterLibrary) -> None:
    base = AutoModelForCausalLM.from_pretrained(trainer._demo.model, dtype=torch.float32)
    fresh = get_peft_model(base, LoraConfig(r=4, target_modules=ALL, task_type="CAUSAL_LM"))
    fresh.save_pretrained(trainer.folder / "fresh")
    with pytest.raises(AdapterError, match=r"lora_A or lora_B is zero in every module.*Save it after training"):
        library.inspect("fresh", str(trainer.folder / "fresh"))
    other = trainer.model(IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]))
    other.save_pretrained(trainer.folder / "ia3")
    with pytest.raises(AdapterError, match=r"peft_type is 'IA3'.*save_as_lora"):
        library.inspect("ia3", str(trainer.folder / "ia3"))
    trainer.model().save_pretrained(trainer.folder / "pickle", safe_serialization=False)
    with pytest.raises(AdapterError, match=r"adapter_model\.bin is a pickle.*safe_serialization=True"):
        library.inspect("pickle", str(trainer.folder / "pickle"))


@pytest.mark.parametrize(
    ("edit", "warning"),
    [
        ({"base_model_name_or_path": "someone/another-model"}, "names the base model 'someone/another-model'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is ignored"),
        ({"megatron_config": {"hidden_size": 256}}, "megatron_config is ignored"),
        ({"option_of_tomorrow": 1}, "not known here are ignored: option_of_tomorrow"),
    ],
)
def test_odd_configurations_are_served_with_a_warning(
    trainer: Trainer, library: AdapterLibrary, edit: dict[str, Any], warning: str
) -> None:
    folder = trainer.save(f"odd-{next(iter(edit))}", r=2)
    _edit(folder, **edit)
    (found,) = library.inspect("odd", str(folder)).warnings
    assert warning in found


def test_peft_writes_no_option_that_is_not_known_here(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"]).to_dict()
    everything = {name: value or True for name, value in config.items()}
    refused = {"use_dora", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config", "lora_bias"}
    refused |= {"alora_invocation_tokens", "modules_to_save", "trainable_token_indices", "target_parameters"}
    refused |= {"layer_replication", "rank_pattern", "alpha_pattern"}
    known = {name: value for name, value in everything.items() if name not in refused} | {"target_modules": ["q_proj"]}
    known |= {"peft_type": "LORA", "bias": "none", "base_model_name_or_path": "x", "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(known, default=str))
    assert [warning for warning in ServedConfig.read(tmp_path).warnings if "not known" in warning] == []


@pytest.mark.parametrize(
    "key", ["q_proj", "0.q_proj", "layers.0.q_proj", ".*q_proj", r"layers\.\d+\.q_proj", "^q_proj", "model", "q.proj"]
)
def test_patterns_match_as_in_peft(tmp_path: Path, key: str) -> None:
    written = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"], "rank_pattern": {key: 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    config = ServedConfig.read(tmp_path)
    names = ["model.layers.0.q_proj", "model.layers.10.q_proj", "layers.0.q_proj", "model.layers.0.my_q_proj", "q_proj"]
    for name in names:
        assert (config.rank_of(name) == 2) is (get_pattern_key([key], name) == key), name


def _edit(folder: Path, **options: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
