"""What is accepted as an adapter, and what is not, with a message that says why."""

import json
import math
import pickle
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file
from safetensors.torch import save_file as save_torch_file

from chameleon_ray.adapters import errors
from chameleon_ray.adapters.checkpoint import read_checkpoint
from chameleon_ray.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterModulesUnknownError,
    AdapterTooLargeError,
)
from chameleon_ray.adapters.modules import ModuleTable
from chameleon_ray.adapters.validate import AdapterInfo, Rules, foreign_base_warning, read_info, validate_adapter

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
WriteAdapter = Callable[..., Path]
Check = Callable[..., AdapterInfo]


@pytest.fixture
def check(tiny_table: ModuleTable) -> Check:
    def check(folder: Path, table: ModuleTable = tiny_table, **changed: Any) -> AdapterInfo:
        return validate_adapter(folder, table, replace(Rules(max_rank=64, max_bytes=1 << 20), **changed))

    return check


def test_describes_a_good_adapter(write_adapter: WriteAdapter, check: Check, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", rank=8)
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert check(folder) == AdapterInfo(
        rank=8,
        size_bytes=size,
        base_model="tiny",
        warnings=(),
        modules=(
            ("model.layers.0.mlp.down_proj", 32, 24),
            ("model.layers.0.self_attn.q_proj", 16, 32),
            ("model.layers.1.mlp.down_proj", 32, 24),
            ("model.layers.1.self_attn.q_proj", 16, 32),
        ),
        shape=(
            ("model.layers.0.mlp.down_proj", 8),
            ("model.layers.0.self_attn.q_proj", 8),
            ("model.layers.1.mlp.down_proj", 8),
            ("model.layers.1.self_attn.q_proj", 8),
        ),
        targets=("down_proj", "q_proj"),
    )


HARMLESS: dict[str, dict[str, Any]] = {
    "empty": {"rank_pattern": {}, "modules_to_save": None, "use_dora": False, "alora_invocation_tokens": None},
    "rslora": {"use_rslora": True, "lora_alpha": 0.5},
    "pattern of targets": {"target_modules": ".*_proj"},
    "lora_ga": {"init_lora_weights": "lora_ga"},
    "eva": {"init_lora_weights": "eva", "eva_config": {"rho": 2}},
    "fan in": {"fan_in_fan_out": True},
    "megatron": {"megatron_config": {"x": 1}},
}


@pytest.mark.parametrize("config", HARMLESS.values(), ids=HARMLESS)
def test_accepts(write_adapter: WriteAdapter, check: Check, tmp_path: Path, config: dict[str, Any]) -> None:
    assert check(write_adapter(tmp_path, config=config)).rank == 4


@pytest.mark.parametrize(
    "config", [{"layers_to_transform": 0}, {"layers_to_transform": [0]}, {"exclude_modules": ["layers.1.mlp"]}]
)
def test_accepts_adapters_of_some_layers(
    write_adapter: WriteAdapter, check: Check, tmp_path: Path, config: dict[str, Any]
) -> None:
    one_layer = {f"{Q0.replace('0', '1')}.lora_{half}.weight": None for half in "AB"}
    one_layer |= {key.replace("self_attn.q_proj", "mlp.down_proj"): None for key in one_layer}
    assert check(write_adapter(tmp_path, tensors=one_layer, config=config)).rank == 4


def test_accepts_the_names_of_a_model_state(write_adapter: WriteAdapter, check: Check, tmp_path: Path) -> None:
    file = write_adapter(tmp_path) / "adapter_model.safetensors"
    plain = check(tmp_path)
    for old, new in ((".weight", ".default.weight"), ("base_model.model.", "")):
        save_file({key.replace(old, new): weight for key, weight in load_file(file).items()}, file)
        assert check(tmp_path).modules == plain.modules


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"init_lora_weights": "lora_ga"}, "path_initial_model_for_weight_conversion"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is ignored"),
        ({"megatron_config": {"x": 1}}, "megatron_config is ignored"),
        ({"shiny_new_option": 3, "unsloth": ""}, "not known here are ignored: shiny_new_option$"),
    ],
)
def test_warns_of_options(
    write_adapter: WriteAdapter, check: Check, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    (warning,) = check(write_adapter(tmp_path, config=config)).warnings
    assert re.search(message, warning)


@pytest.mark.parametrize(
    ("named", "is_foreign"),
    [
        ("", False),
        ("meta/Tiny-1B", False),
        ("/models/tiny-1b/", False),
        ("prod", False),
        ("/cache/hub/models--meta--Tiny-1B/snapshots/0e9e39f249a1/", False),
        ("/cache/hub/models--meta--Tiny-8B/snapshots/0e9e39f249a1/", True),
        ("meta/Tiny-8B", True),
    ],
)
def test_warns_of_a_foreign_base_model(named: str, is_foreign: bool) -> None:
    warning = foreign_base_warning(named, ("prod", "/models/tiny-1b"))
    assert (warning is not None) is is_foreign
    assert warning is None or (named in warning and "prod" in warning)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "only LORA.*save_as_lora"),
        ({"r": 0}, "positive integer"),
        ({"r": "8"}, "positive integer"),
        ({"r": True}, "positive integer"),
        ({"r": 8}, "not rank 8"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": math.nan}, "lora_alpha"),
        ({"lora_alpha": -math.inf}, "lora_alpha"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": [1]}, "target_modules"),
        ({"bias": "all"}, "bias.*merge"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"use_dora": True}, "use_dora.*merge"),
        ({"use_qalora": True}, "use_qalora.*train without"),
        ({"use_bdlora": {"x": 1}}, "use_bdlora.*save_as_lora"),
        ({"kasa_config": {"beta": 1}}, "kasa_config.*save_as_lora"),
        ({"monteclora_config": {"x": 1}}, "monteclora_config.*train without"),
        ({"arrow_config": {"x": 1}}, "arrow_config.*train without"),
        ({"lora_bias": True}, "lora_bias.*merge"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save.*merge"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices.*merge"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters.*target modules"),
        ({"layer_replication": [[0, 1]]}, "layer_replication.*train without"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens.*plain LoRA"),
        ({"init_lora_weights": "pissa_niter_16"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "changed base model"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must map"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern must map.*positive integers"),
        ({"rank_pattern": {"q_proj": 2.0}}, "rank_pattern must map.*positive integers"),
        ({"rank_pattern": {"q_proj": 2}}, "not rank 2"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern must map.*numbers"),
        ({"alpha_pattern": {"q_proj": math.inf}}, "alpha_pattern must map.*numbers"),
        ({"alpha_pattern": {"(q_proj": 8}}, "not a regular expression"),
        ({"alpha_pattern": {"(.*a)*b": 8}}, "repeats too much"),
        ({"alpha_pattern": {".*" * 5 + "b": 8}}, "repeats too much"),
    ],
)
def test_refuses_configurations(
    write_adapter: WriteAdapter, check: Check, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterInvalidError, match=message):
        check(write_adapter(tmp_path, config=config))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "\xff\xfe", "[" * 100_000])
def test_refuses_what_is_no_json_object(write_adapter: WriteAdapter, check: Check, tmp_path: Path, text: str) -> None:
    write_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(AdapterInvalidError, match="save_pretrained"):
        check(tmp_path)


def test_refuses_too_large(write_adapter: WriteAdapter, check: Check, tmp_path: Path) -> None:
    write_adapter(tmp_path, rank=16)
    with pytest.raises(AdapterTooLargeError, match=r"rank 16 is over .*max_rank = 8"):
        check(tmp_path, max_rank=8)
    with pytest.raises(AdapterTooLargeError, match="max_adapter_mib"):
        check(tmp_path, max_bytes=100)
    (tmp_path / "adapter_config.json").write_text(" " * (1 << 20) + "{}")
    with pytest.raises(AdapterTooLargeError, match="PEFT configuration"):
        check(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{Q0}.lora_B.weight": None}, "no lora_B weight"),
        ({f"{Q0}.lora_A.weight": None}, "no lora_A weight"),
        ({f"{Q0}.lora_A.weight": None, f"{Q0}.lora_B.weight": None}, "target module .*layers.0.* has no weights"),
        ({f"{Q0}.lora_A.weight": np.ones((2, 32), np.float32)}, "not rank 4"),
        ({f"{Q0}.lora_A.weight": np.ones((4, 8), np.float32)}, "q_proj.* 8 inputs .*another base model"),
        ({f"{Q0}.lora_B.weight": np.ones((8, 4), np.float32)}, "q_proj.* 8 outputs.*another base model"),
        ({f"{Q0}.lora_A.weight": np.ones(128, np.float32)}, "not rank 4"),
        ({f"{Q0}.lora_A.weight": np.ones((4, 32), np.int8)}, "is I8; float32"),
        ({f"{Q0}.lora_magnitude_vector": np.ones(4, np.float32)}, "DoRA.*merge it"),
        ({f"{Q0}.lora_A.default.weight": np.ones((4, 32), np.float32)}, "two lora_A"),
        ({f"{Q0}.lora_A.other.weight": np.ones((4, 32), np.float32)}, "not the name of a LoRA weight"),
        ({f"{Q0}.lora_B.bias": np.ones(16, np.float32)}, "biases are not served.*merge it"),
        ({"lora_A.weight": np.ones((4, 32), np.float32)}, "not the name of a LoRA weight"),
        ({Q0.removeprefix("base_model.model.") + ".lora_A.weight": np.ones((4, 32), np.float32)}, "two lora_A"),
        ({"base_model.model.lm_head.lora_A.weight": np.ones((4, 32), np.float32)}, "lm_head.*merge it"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 9), np.float32)}, "embed_tokens"),
    ],
)
def test_refuses_weights(
    write_adapter: WriteAdapter, check: Check, tmp_path: Path, tensors: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterInvalidError, match=message):
        check(write_adapter(tmp_path, tensors=tensors))


def test_refuses_modules_that_the_base_does_not_have(write_adapter: WriteAdapter, check: Check, tmp_path: Path) -> None:
    deeper = Q0.replace("layers.0", "layers.2")
    weights = {f"{deeper}.lora_A.weight": np.ones((4, 32), np.float32)}
    weights |= {f"{deeper}.lora_B.weight": np.ones((16, 4), np.float32)}
    write_adapter(tmp_path, tensors=weights)
    with pytest.raises(
        AdapterInvalidError,
        match=r"'model.layers.2.self_attn.q_proj' is no module .* nearest .*'model.layers.\d.self_attn.q_proj'",
    ):
        check(tmp_path)


def test_refuses_everything_where_the_modules_are_not_known(
    write_adapter: WriteAdapter, check: Check, tmp_path: Path
) -> None:
    with pytest.raises(AdapterModulesUnknownError, match=r"cannot be loaded: .*no LoRA layer for Thing"):
        check(write_adapter(tmp_path), table=ModuleTable(problem="no LoRA layer for Thing"))


def test_refuses_modules_that_take_no_adapter_with_the_reason(
    write_adapter: WriteAdapter, check: Check, tmp_path: Path, tiny_table: ModuleTable
) -> None:
    eye = "base_model.model.eye.layers.0.q_proj"
    weights = {f"{eye}.lora_A.weight": np.ones((4, 8), np.float32)}
    weights |= {f"{eye}.lora_B.weight": np.ones((8, 4), np.float32)}
    with pytest.raises(AdapterInvalidError, match=r"'eye.layers.0.q_proj' takes no adapter here: it sees"):
        check(write_adapter(tmp_path, tensors=weights), table=replace(tiny_table, excluded={"eye": "it sees"}))


def test_knows_modules_by_the_models_renames(
    write_adapter: WriteAdapter, check: Check, tmp_path: Path, tiny_table: ModuleTable
) -> None:
    def rename(name: str) -> str:
        return name.removeprefix("model.language_model.").removeprefix("model.")

    modules = {
        rename(name): replace(module, name=f"model.language_model.{rename(name)}")
        for name, module in tiny_table.modules.items()
    }
    table = ModuleTable(modules, rename)
    file = write_adapter(tmp_path) / "adapter_model.safetensors"
    weights = load_file(file)
    assert check(tmp_path, table=table).rank == 4, "an older spelling"
    new = {key.replace("model.layers.", "model.language_model.layers."): weight for key, weight in weights.items()}
    save_file(new, file)
    assert check(tmp_path, table=table).rank == 4
    save_file({key.replace("model.layers.", "language.layers."): weight for key, weight in weights.items()}, file)
    with pytest.raises(AdapterInvalidError, match=r"is no module .* nearest .*'model\.language_model\.layers"):
        check(tmp_path, table=table)
    save_file(new | {key: weight for key, weight in weights.items() if "layers.0.self_attn" in key}, file)
    with pytest.raises(AdapterInvalidError, match="are the same module"):
        check(tmp_path, table=table)


ATTENTION0 = {f"{Q0}.lora_A.weight": np.ones((2, 32), np.float32), f"{Q0}.lora_B.weight": np.ones((16, 2), np.float32)}


@pytest.mark.parametrize(
    "pattern",
    [
        {"layers.0.self_attn.q_proj": 2},
        {"model.layers.0.self_attn.q_proj": 2},
        {r"^model\.layers\.0\.self_attn\.(k|q)_proj": 2},
        {r"layers\.0\..*q_proj": 2, "q_proj": 4},
    ],
)
def test_ranks_and_scales_follow_the_patterns(
    write_adapter: WriteAdapter, check: Check, tmp_path: Path, pattern: dict[str, int]
) -> None:
    config = {"rank_pattern": pattern, "alpha_pattern": {"down_proj": 5, "1.self_attn.q_proj": 3}, "lora_alpha": 8}
    folder = write_adapter(tmp_path, tensors=ATTENTION0, config=config)
    assert check(folder).rank == 4
    pairs = read_checkpoint(folder).pairs
    assert {name.removeprefix("model.layers."): (pair.rank, pair.scale) for name, pair in pairs.items()} == {
        "0.self_attn.q_proj": (2, 8 / 2),
        "1.self_attn.q_proj": (4, 3 / 4),
        "0.mlp.down_proj": (4, 5 / 4),
        "1.mlp.down_proj": (4, 5 / 4),
    }
    write_adapter(tmp_path, tensors=ATTENTION0, config=config | {"use_rslora": True})
    scales = {pair.scale for pair in read_checkpoint(folder).pairs.values()}
    assert scales == {8 / 2**0.5, 3 / 2, 5 / 2}
    with pytest.raises(AdapterInvalidError, match="not rank 4"):
        check(write_adapter(tmp_path, tensors=ATTENTION0, config=config | {"rank_pattern": {"layers.0.q_proj": 2}}))


@pytest.mark.parametrize(
    ("changed", "config"),
    [({"lora_B": 0.0}, {}), ({"lora_A": -0.0}, {}), ({}, {"lora_alpha": 0}), ({}, {"alpha_pattern": {".*_proj": 0}})],
)
@pytest.mark.parametrize("check_finite", [True, False])
def test_refuses_adapters_without_effect(
    write_adapter: WriteAdapter,
    check: Check,
    tmp_path: Path,
    changed: dict[str, float],
    config: dict[str, Any],
    check_finite: bool,
) -> None:
    file = write_adapter(tmp_path, config=config) / "adapter_model.safetensors"
    weights = load_file(file)
    nothing = {key: weight * changed.get(key.split(".")[-2], 1.0) for key, weight in weights.items()}
    save_file(nothing, file)
    with pytest.raises(AdapterInvalidError, match=r"changes nothing .*check_effect: off"):
        check(tmp_path, check_finite=check_finite)
    assert check(tmp_path, check_finite=check_finite, check_effect=False).rank == 4
    if changed:
        key = f"{Q0.replace('0', '1')}.lora_{{}}.weight"
        save_file(nothing | {key.format(half): weights[key.format(half)] for half in "AB"}, file)
        assert check(tmp_path, check_finite=check_finite).rank == 4, "one module is enough"


def test_an_adapter_without_effect_in_any_module_alone(
    write_adapter: WriteAdapter, check: Check, tmp_path: Path
) -> None:
    file = write_adapter(tmp_path) / "adapter_model.safetensors"
    by_turns = {key: weight * (("q_proj" in key) == ("lora_A" in key)) for key, weight in load_file(file).items()}
    save_file(by_turns, file)
    with pytest.raises(AdapterInvalidError, match="zero in every module"):
        check(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_refuses_weights_that_are_not_finite(
    write_adapter: WriteAdapter, check: Check, tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    file = write_adapter(tmp_path) / "adapter_model.safetensors"
    weights = {key: weight.to(dtype) for key, weight in load_torch_file(file).items()}
    weight = weights[f"{Q0}.lora_A.weight"]
    weight.fill_(torch.finfo(dtype).max)
    save_torch_file(weights, file)
    assert check(tmp_path).rank == 4, "the largest finite number is finite"
    weight[-1, -1] = value
    save_torch_file(weights, file)
    with pytest.raises(AdapterInvalidError, match="NaN or infinite"):
        check(tmp_path)
    assert check(tmp_path, check_finite=False).rank == 4


def test_finds_nan_beyond_the_first_chunk(tmp_path: Path) -> None:
    wide = np.ones((4, 1_000_000), np.float32)
    wide[3, -1] = math.nan
    weights = {f"{Q0}.lora_A.weight": wide, f"{Q0}.lora_B.weight": np.ones((16, 4), np.float32)}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterInvalidError, match="NaN"):
        read_info(tmp_path, Rules(max_rank=4, max_bytes=1 << 30))


class _Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/chameleon-pickle-was-executed"),))


def _header(text: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + body


def _damaged(good: bytes) -> Iterator[bytes]:
    yield b""
    yield good[:7]
    yield good[:100]
    yield good[:-1]
    yield good + b"\0"
    yield pickle.dumps(_Harm())
    yield struct.pack("<Q", 1 << 62) + good[8:]
    end = 8 + int.from_bytes(good[:8], "little")
    header = json.loads(good[8:end]) | {"__metadata__": {"format": 1}}  # valid but for safetensors' own reader
    yield _header(json.dumps(header).encode(), good[end:])
    yield _header(b"{}")
    yield _header(b"[]")
    yield _header(b"nonsense")
    yield _header(b"[" * 100_000)
    yield _header(b'{"a": null}')
    yield _header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}')
    yield _header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}', b"\0" * 8)
    yield _header(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', b"\0" * 4)
    yield _header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', b"\0" * 8)
    yield _header(b'{"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}', b"\0" * 4)
    entry = b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    yield _header(b"{" + entry + b"," + entry + b"}", b"\0" * 4)


def test_refuses_files_that_are_no_whole_safetensors(write_adapter: WriteAdapter, check: Check, tmp_path: Path) -> None:
    file = write_adapter(tmp_path) / "adapter_model.safetensors"
    for content in _damaged(file.read_bytes()):
        file.write_bytes(content)
        with pytest.raises(AdapterInvalidError, match="adapter_model"):
            check(tmp_path)
    assert not Path("/tmp/chameleon-pickle-was-executed").exists()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_an_adapter_error_or_harmless(
    write_adapter: WriteAdapter, check: Check, tmp_path: Path, data: st.DataObject
) -> None:
    file = write_adapter(tmp_path) / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, header_end) | st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    content = content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))]
    file.write_bytes(content)
    try:
        assert check(tmp_path).rank == 4
    except AdapterError as error:
        assert str(error)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200), as_header=st.booleans())
def test_random_bytes_are_an_adapter_error(
    write_adapter: WriteAdapter, check: Check, tmp_path: Path, content: bytes, as_header: bool
) -> None:
    file = write_adapter(tmp_path) / "adapter_model.safetensors"
    file.write_bytes(_header(content) if as_header else content)
    with pytest.raises(AdapterError):
        check(tmp_path)


def test_errors_survive_pickling() -> None:
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AdapterError)]
    kinds = [kind for kind in classes if kind.__init__ is AdapterError.__init__]
    assert len(kinds) >= 8
    for kind in kinds:
        copy = pickle.loads(pickle.dumps(kind("what to do")))
        assert type(copy) is kind and str(copy) == "what to do"
        assert 400 <= copy.http_status < 600 and copy.code.startswith("adapter_")
    assert len({kind.code for kind in kinds}) == len(kinds)
