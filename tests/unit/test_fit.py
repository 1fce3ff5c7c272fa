"""``chameleon fit``: whether and how many adapters fit, from config.json alone."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chameleon_ray.cli import main
from chameleon_ray.fit import Needs, fit
from chameleon_ray.model_shape import ModelConfigError


def config(
    model_type: str, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": model_type, "hidden_size": hidden, "intermediate_size": intermediate, "vocab_size": 128256,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "torch_dtype": "bfloat16",
    } | more  # fmt: skip


MODELS = {
    "Qwen2.5-0.5B": config("qwen2", 896, 4864, 24, 14, 2),
    "Qwen2.5-1.5B": config("qwen2", 1536, 8960, 28, 12, 2),
    "Qwen2.5-3B": config("qwen2", 2048, 11008, 36, 16, 2),
    "Qwen2.5-7B": config("qwen2", 3584, 18944, 28, 28, 4),
    "Qwen2.5-14B": config("qwen2", 5120, 13824, 48, 40, 8),
    "Qwen2.5-32B": config("qwen2", 5120, 27648, 64, 40, 8),
    "Qwen2.5-72B": config("qwen2", 8192, 29568, 80, 64, 8),
    "Qwen3-0.6B": config("qwen3", 1024, 3072, 28, 16, 8, head_dim=128),
    "Qwen3-4B": config("qwen3", 2560, 9728, 36, 32, 8, head_dim=128),
    "Qwen3-14B": config("qwen3", 5120, 17408, 40, 40, 8, head_dim=128),
    "Qwen3-32B": config("qwen3", 5120, 25600, 64, 64, 8, head_dim=128),
    "Llama-3.2-1B": config("llama", 2048, 8192, 16, 32, 8, head_dim=64),
    "Llama-3.2-3B": config("llama", 3072, 8192, 28, 24, 8, head_dim=128),
    "Llama-3.1-8B": config("llama", 4096, 14336, 32, 32, 8),
    "Llama-3.1-70B": config("llama", 8192, 28672, 80, 64, 8),
    "Llama-3.1-405B": config("llama", 16384, 53248, 126, 128, 8),
    "Mistral-7B": config("mistral", 4096, 14336, 32, 32, 8),
    "Mistral-Small-24B": config("mistral", 5120, 32768, 40, 32, 8, head_dim=128),
    "Phi-3-mini": config("phi3", 3072, 8192, 32, 32, 32),
    "Phi-4": config("phi3", 5120, 17920, 40, 40, 10),
    "Gemma-7B": config("gemma", 3072, 24576, 28, 16, 16, head_dim=256),
    "Granite-3.1-8B": config("granite", 4096, 12800, 40, 32, 8),
}


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("name", MODELS)
def test_every_common_model_fits_blocks_of_16_tokens_and_wastes_little(name: str, tp: int) -> None:
    if MODELS[name]["num_attention_heads"] % tp or (name == "Phi-4" and tp > 2):
        with pytest.raises(ModelConfigError, match="cannot be split"):
            fit(MODELS[name], name, tp=tp)
        return
    found = fit(MODELS[name], name, tp=tp)
    assert found.paged and [rank.rank for rank in found.ranks] == [8, 16, 32, 64, 128, 256]
    assert all(rank.waste <= 0.1 for rank in found.ranks if rank.rank >= 16)
    blocks = [rank.blocks for rank in found.ranks]
    assert blocks == sorted(blocks)


def test_blocks_bytes_and_adapters_of_llama_8b() -> None:
    """By hand: 1,310,720 weights of a layer at rank 16 lie in blocks of 16 * 2 * 8 * 128 numbers."""
    found = fit(MODELS["Llama-3.1-8B"], "Llama-3.1-8B", needs=Needs(40, kv_tokens=64_000))
    rank16 = found.ranks[1]
    assert (rank16.blocks, rank16.bytes, rank16.waste) == (40, 40 * 32768 * 2 * 32, 0.0)
    assert found.kv_blocks == pytest.approx((34.5 * 2**30 - 8.03e9 * 2) / (2 * 32768 * 32), rel=0.01)
    assert rank16.adapters == min(found.kv_blocks - 4000, found.kv_blocks // 2) // 40
    fewer = fit(MODELS["Llama-3.1-8B"], "Llama-3.1-8B", needs=Needs(40, kv_tokens=120_000)).ranks[1].adapters
    assert 0 < fewer < rank16.adapters
    assert fit(MODELS["Llama-3.1-8B"], "", needs=Needs(40, kv_tokens=10**9)).ranks[0].adapters == 0


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"model_type": "qwen3_moe", "num_experts": 128}, "experts"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "latent attention"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder"),
        ({"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]}, "without attention"),
        ({"model_type": "gpt", "layer_types": ["sliding_attention", "full_attention"]}, "sliding window"),
        ({"quantization_config": {"kv_cache_scheme": {"num_bits": 8}}}, "another type"),
    ],
)
def test_what_cannot_lie_in_kv_memory_is_said_with_the_reason(more: dict[str, Any], reason: str) -> None:
    found = fit(MODELS["Llama-3.1-8B"] | more, "it")
    assert not found.paged and reason in found.reason and found.ranks == ()


def test_blocks_too_small_for_anything_are_a_reason() -> None:
    found = fit(MODELS["Qwen2.5-0.5B"], "it", block_size=1, tp=2)
    assert not found.paged and "raise the KV-cache block size" in found.reason


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model_type": "alien"}, "'alien', and known are llama"),
        ({"model_type": None}, "known are llama"),
        ({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 2}, "has no 'intermediate_size'"),
    ],
)
def test_unknown_families_and_incomplete_configurations_are_errors(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message):
        fit(given, "it")


def test_a_gpu_that_holds_no_weights_is_an_error() -> None:
    with pytest.raises(ModelConfigError, match="leaves no KV memory on 1 GPUs of 24 GiB"):
        fit(MODELS["Llama-3.1-70B"], "it", needs=Needs(24))


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": MODELS["Qwen2.5-7B"]}))
    out = tmp_path / "fit.json"
    assert main(["fit", str(tmp_path), "--gpu-gib", "80", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report.keys() == {"paged", "reason", "block_size", "ranks", "kv_blocks"}
    assert (report["paged"], report["reason"], report["block_size"]) == (True, "", 16)
    assert [row["rank"] for row in report["ranks"]] == [8, 16, 32, 64, 128, 256]
    assert all(row.keys() == {"rank", "blocks", "bytes", "waste", "adapters"} for row in report["ranks"])
    assert len(capsys.readouterr().out.splitlines()) == 9


def test_the_command_refuses_with_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODELS["Llama-3.1-8B"] | {"num_experts": 8}))
    assert main(["fit", str(path)]) == 3
    assert "experts" in capsys.readouterr().out
    for arguments in ([str(tmp_path / "nowhere")], [str(path), "--tensor-parallel-size", "0"]):
        assert main(["fit", *arguments]) == 1
        assert capsys.readouterr().err.startswith("error: ")


def test_it_loads_neither_torch_nor_vllm(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODELS["Llama-3.1-8B"]))
    program = (
        "import sys; from chameleon_ray.cli import main; assert main(['fit', sys.argv[1]]) == 0\n"
        "assert not {'torch', 'vllm', 'triton', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=True, capture_output=True)
