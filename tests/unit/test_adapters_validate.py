"""What is accepted as an adapter, and what is not, with a message that says why."""

import json
import math
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import load_file as load_torch_file
from safetensors.torch import save_file as save_torch_file

from chameleon_ray.adapters import errors
from chameleon_ray.adapters.base_model import BaseModelShapes
from chameleon_ray.adapters.errors import AdapterError, AdapterInvalidError, AdapterTooLargeError
from chameleon_ray.adapters.validate import AdapterInfo, validate_adapter

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
WriteAdapter = Callable[..., Path]
Check = Callable[..., AdapterInfo]


@pytest.fixture
def check(tiny_shapes: BaseModelShapes) -> Check:
    def check(folder: Path, **changed: Any) -> AdapterInfo:
        arguments = {"shapes": tiny_shapes, "max_rank": 64, "max_bytes": 1 << 20, "check_finite": True} | changed
        return validate_adapter(folder, **arguments)

    return check


def test_describes_a_good_adapter(write_adapter: WriteAdapter, check: Check, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", rank=8)
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert check(folder) == AdapterInfo(8, size, "tiny", ("down_proj", "q_proj"))


def test_accepts_what_vllm_accepts(write_adapter: WriteAdapter, check: Check, tmp_path: Path) -> None:
    harmless = {"use_rslora": True, "lora_alpha": 0.5, "rank_pattern": {}, "modules_to_save": None, "use_dora": False}
    assert check(write_adapter(tmp_path / "config", config=harmless)).rank == 4
    assert check(write_adapter(tmp_path / "pattern", config={"target_modules": ".*_proj"})).rank == 4
    one_layer = {f"{Q0.replace('0', '1')}.lora_{half}.weight": None for half in "AB"}
    one_layer |= {key.replace("self_attn.q_proj", "mlp.down_proj"): None for key in one_layer}
    assert check(write_adapter(tmp_path / "layer", tensors=one_layer, config={"layers_to_transform": [0]})).rank == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
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
        ({"bias": "all"}, "bias"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_16"}, "path_initial_model_for_weight_conversion"),
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
        ({f"{Q0}.lora_magnitude_vector": np.ones(4, np.float32)}, "not the name of a LoRA weight"),
        ({f"{Q0}.lora_A.default.weight": np.ones((4, 32), np.float32)}, "not the name of a LoRA weight"),
        ({"lora_A.weight": np.ones((4, 32), np.float32)}, "not the name of a LoRA weight"),
        ({Q0.removeprefix("base_model.model.") + ".lora_A.weight": np.ones((4, 32), np.float32)}, "two lora_A"),
        ({"base_model.model.lm_head.lora_A.weight": np.ones((4, 32), np.float32)}, "lm_head is not supported"),
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
    with pytest.raises(AdapterInvalidError, match=r"no module 'model.layers.2.self_attn.q_proj'.*another base model"):
        check(tmp_path)
    assert check(tmp_path, shapes=BaseModelShapes()).rank == 4, "an unknown base model is not checked against"


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
        validate_adapter(tmp_path, BaseModelShapes(), max_rank=4, max_bytes=1 << 30, check_finite=True)


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
