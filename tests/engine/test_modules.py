"""Which modules take LoRA, told from real vLLM models that are built without weights."""

import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_harness import PagedEngine
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Phi3Config,
    PreTrainedConfig,
)
from vllm import EngineArgs
from vllm.config import set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.lora.model_manager import LoRAModelManager, LRUCacheLoRAModelManager
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.qwen2_moe import Qwen2MoeForCausalLM
from vllm.model_executor.models.utils import WeightsMapper

from chameleon_ray.adapters.errors import AdapterInvalidError, AdapterModulesUnknownError
from chameleon_ray.adapters.modules import Module, ModuleTable
from chameleon_ray.adapters.validate import check_fits
from chameleon_ray.demo import DemoPaths
from chameleon_ray.engine.modules import EngineNames, _expert_shapes, describe_modules, dump_modules, merge_tables
from chameleon_ray.engine.paged.lora import PagedLoRAModelManager

TEXT = {
    "vocab_size": 640,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EYE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
SEES = PaliGemmaConfig(
    text_config={"model_type": "gemma", "head_dim": 32, **TEXT},
    vision_config={
        "model_type": "siglip_vision_model",
        "image_size": 28,
        "patch_size": 14,
        "projection_dim": 128,
        **EYE,
    },
    image_token_index=3,
    projection_dim=128,
)
Build = Callable[..., LoRAModelManager]


@pytest.fixture
def build(started_engine: PagedEngine, demo: DemoPaths, tmp_path: Path) -> Build:
    """The LoRA layers of vLLM's model for a configuration; an engine must have set up this process's groups."""

    def build(config: PreTrainedConfig, architecture: str, kind: Any = PagedLoRAModelManager) -> LoRAModelManager:
        config.architectures = [architecture]
        config.save_pretrained(tmp_path)
        for file in demo.model.glob("token*"):
            shutil.copy(file, tmp_path)
        arguments = EngineArgs(model=str(tmp_path), dtype="float32", enable_lora=True, max_model_len=512, max_loras=1)
        vllm_config = arguments.create_engine_config()
        with set_current_vllm_config(vllm_config), torch.device("meta"):
            model = initialize_model(vllm_config)
            return kind(model, 8, 64, 640, vllm_config.lora_config, torch.device("cpu"), vllm_config)

    return build


def hf_linear(config: PreTrainedConfig, made_by: Any = AutoModelForCausalLM.from_config) -> dict[str, tuple[int, int]]:
    """What ``peft`` finds in Hugging Face's model: name -> (out_features, in_features) of every linear module."""
    with torch.device("meta"):
        model = made_by(config)
    found = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {name: (module.out_features, module.in_features) for name, module in found.items() if name != "lm_head"}


def by_name(table: ModuleTable) -> dict[str, tuple[int, int]]:
    return {module.name: (module.out_features, module.in_features) for module in table.modules.values()}


def modules(names: list[str], table: ModuleTable) -> list[tuple[str, int, int]]:
    """Adapter modules of these names, with the shapes that the base model has under them."""
    return [(name, *by_name(table).get(name, (8, 8))) for name in names]


def test_the_running_demo_model_is_described_as_peft_sees_it(started_engine: PagedEngine, demo: DemoPaths) -> None:
    (dumped,) = started_engine.llm.collective_rpc("module_table")
    table = merge_tables([dumped])
    model = AutoModelForCausalLM.from_pretrained(demo.model)
    assert by_name(table) == hf_linear(model.config) and len(table.modules) == 4 * 7
    assert table == started_engine.memory.storage.layout.table


def test_a_multimodal_model_takes_adapters_of_its_language_model_by_their_full_names(build: Build) -> None:
    table = describe_modules(build(SEES, "PaliGemmaForConditionalGeneration"))
    language = "model.language_model.layers.0.self_attn"
    theirs = hf_linear(SEES, PaliGemmaForConditionalGeneration)
    spoken = {name: shape for name, shape in theirs.items() if ".language_model." in name}
    assert by_name(table) == spoken and len(spoken) == 2 * 7
    check_fits(modules(list(spoken), table), ("q_proj", "down_proj"), table)
    assert table.find(f"{language}.q_proj") == table.find("language_model.model.layers.0.self_attn.q_proj")

    with pytest.raises(
        AdapterInvalidError, match=rf"'model.layers.0.self_attn.q_proj' is no module.*'{language}.q_proj'"
    ):
        check_fits(modules(["model.layers.0.self_attn.q_proj"], table), (), table)
    seen = next(name for name in theirs if "vision_tower" in name and name.endswith("q_proj"))
    for name in (seen, "model.multi_modal_projector.linear"):
        with pytest.raises(AdapterInvalidError, match=f"'{name}' takes no adapter here: .*vision.*language model's"):
            check_fits(modules([name], table), (), table)


def test_projections_that_the_checkpoint_has_fused_stay_fused(build: Build) -> None:
    config = Phi3Config(**TEXT)
    table = describe_modules(build(config, "Phi3ForCausalLM"))
    assert by_name(table) == hf_linear(config)
    assert by_name(table)["model.layers.1.self_attn.qkv_proj"] == (128 + 2 * 64, 128)
    with pytest.raises(AdapterInvalidError, match=r"'model.layers.0.self_attn.q_proj' is no module"):
        table.find("model.layers.0.self_attn.q_proj")


def test_experts_are_told_apart_from_what_lives_in_kv_memory(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_state, "_EP", parallel_state.get_tp_group())  # The demo model's engine made none.
    config = MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2)
    manager = build(config, "MixtralForCausalLM")
    table = describe_modules(manager)
    attention = {name: shape for name, shape in hf_linear(config).items() if "self_attn" in name}
    assert attention.items() <= by_name(table).items() and len(attention) == 2 * 4
    runner = next(name for name, module in manager.model.named_modules() if isinstance(module, MoERunner))
    with pytest.raises(AdapterInvalidError, match=r"experts.3.w1' takes no adapter here: .*adapter_memory: slots"):
        table.find(f"{runner}.3.w1")

    experts = SimpleNamespace(moe_config=manager.model.get_submodule(runner).moe_config)
    assert list(_expert_shapes(experts, 6)) == [(256, 128), (128, 256), (256, 128)] * 2, "gate, down, up"


def test_in_slots_the_same_modules_take_adapters(build: Build) -> None:
    table = describe_modules(build(Phi3Config(**TEXT), "Phi3ForCausalLM", LRUCacheLoRAModelManager))
    assert by_name(table) == hf_linear(Phi3Config(**TEXT)), "the output head, which has slots, is not among them"


@pytest.mark.parametrize(
    ("mapper", "name", "engine_name"),
    [
        (
            WeightsMapper(orig_to_new_prefix={"model.text.": "text.model."}),
            "model.text.layers.0.q",
            "text.model.layers.0.q",
        ),
        (WeightsMapper(orig_to_new_substr={".attn.": ".mixer."}), "layers.0.attn.q", "layers.0.mixer.q"),
        (WeightsMapper(orig_to_new_substr={".gate_proj.": ".w1."}), "layers.0.gate_proj", "layers.0.w1"),
        (Qwen2MoeForCausalLM.hf_to_vllm_mapper.get_rename_mapper(), "layers.0.q_proj", "layers.0.q_proj"),
        (None, "layers.0.q_proj", "layers.0.q_proj"),
    ],
)
def test_renames_are_undone_for_messages(mapper: WeightsMapper | None, name: str, engine_name: str) -> None:
    names = EngineNames(mapper)
    assert names(name) == engine_name and names.undo(engine_name) == name
    assert pickle.loads(pickle.dumps(names))(name) == engine_name


def test_a_model_that_is_not_understood_refuses_adapters_with_the_reason() -> None:
    table = merge_tables([dump_modules(SimpleNamespace(lora_manager=None))])
    with pytest.raises(AdapterModulesUnknownError, match=r"not known .AttributeError: .*_adapter_manager"):
        table.find("model.layers.0.self_attn.q_proj")


def test_the_stages_of_a_pipeline_have_one_table() -> None:
    first = ModuleTable({"layers.0.q": Module("layers.0.q", 8, 4)}, str, {"eye": "it sees"})
    second = replace(first, modules={"layers.1.q": Module("layers.1.q", 8, 4)})
    merged = merge_tables([pickle.dumps(first), pickle.dumps(second)])
    assert set(merged.modules) == {"layers.0.q", "layers.1.q"} and merged.excluded == {"eye": "it sees"}
    assert merged.mark != first.mark
    assert merge_tables([pickle.dumps(first), pickle.dumps(ModuleTable(problem="odd"))]).problem == "odd"
