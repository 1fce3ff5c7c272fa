"""The Triton kernels on a real GPU: results, no waiting for the device, CUDA graphs, torch.compile."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from chameleon_kernels import apply_lora
from chameleon_kernels.testing import check_against_reference, make_batch, make_layer, popularity, self_check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RANK_MIX = [8, 16, 32, 64, 128, 256]
ODD_SHAPES = {"qkv": (50, (37, 19, 19)), "five": (50, (3, 20, 9, 11, 130))}


@contextmanager
def device_waits_are_errors() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["uniform", "skewed", "one", "none"])
@pytest.mark.parametrize("num_tokens", [1, 64, 300, 2000])
def test_matches_the_reference(dtype: torch.dtype, kind: str, num_tokens: int) -> None:
    layer = make_layer(RANK_MIX, dtype=dtype, device="cuda")
    token_adapter = popularity(kind, num_tokens, len(RANK_MIX), np.random.default_rng(num_tokens))
    check_against_reference(apply_lora, layer, make_batch(layer, token_adapter), dtype, padding=3)


@pytest.mark.parametrize("page_elems", [136, 264, 600])
def test_odd_widths_rows_at_page_ends_many_slices_and_lower_ranks(page_elems: int) -> None:
    layer = make_layer([3, [1, 17, 0, 5, 0, 2, 33, 0], [0] * 7 + [4]], ODD_SHAPES, page_elems, device="cuda")
    check_against_reference(apply_lora, layer, make_batch(layer, [0, 1, 1, -1, 2, 1, 0] * 4), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_check_at_start_passes(dtype: torch.dtype) -> None:
    self_check("cuda", dtype)


def test_a_graph_of_a_step_without_adapters_holds_no_launch_of_ours_and_a_warm_up_steps_does() -> None:
    layer = make_layer(RANK_MIX, dtype=torch.bfloat16, device="cuda")
    batch, part = make_batch(layer, [0] * 8), layer.parts["o_proj"]
    x, y = (torch.zeros(8, 256, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    apply_lora(y, x, layer.kv, batch, part)
    for update, changes in ((lambda: batch.update([-1] * 8, ()), False), (lambda: batch.update_for_capture(8), True)):
        update()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y.add_(0)
            apply_lora(y, x, layer.kv, batch, part)
        batch.update([0] * 8, layer.adapters)
        x.fill_(1.0)
        y.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert bool(y.any()) == changes


def test_neither_update_nor_apply_waits_for_the_device() -> None:
    layer = make_layer(RANK_MIX, dtype=torch.bfloat16, device="cuda")
    batch = make_batch(layer, [0, 1, 2, -1], max_tokens=64)
    part = layer.parts["qkv_proj"]
    x = torch.randn(4, part.in_features, dtype=torch.bfloat16, device="cuda")
    y = torch.zeros(4, part.out_features, dtype=torch.bfloat16, device="cuda")
    apply_lora(y, x, layer.kv, batch, part)
    with device_waits_are_errors():
        for _ in range(2):
            batch.update([3, 4, -1, 5], layer.adapters)
            apply_lora(y, x, layer.kv, batch, part)


def test_a_captured_graph_follows_the_metadata() -> None:
    layer = make_layer(RANK_MIX, dtype=torch.bfloat16, device="cuda")
    part = layer.parts["gate_up_proj"]
    batch = make_batch(layer, [0] * 32, max_tokens=64, max_adapters=6)
    x = torch.randn(32, part.in_features, dtype=torch.bfloat16, device="cuda")
    y = torch.zeros(32, part.out_features, dtype=torch.bfloat16, device="cuda")
    apply_lora(y, x, layer.kv, batch, part)  # Triton compiles outside the capture.
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        apply_lora(y, x, layer.kv, batch, part)
    rng = np.random.default_rng(0)
    for kind, num_tokens in (("uniform", 32), ("none", 32), ("one", 20), ("skewed", 7)):
        batch.update(popularity(kind, num_tokens, len(RANK_MIX), rng), layer.adapters)
        x.normal_()
        y.normal_()
        expected = y.clone()
        apply_lora(expected, x, layer.kv, batch, part)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected)
    check_against_reference(apply_lora, layer, batch, torch.bfloat16)


def test_torch_compile_traces_it_whole() -> None:
    layer = make_layer([8, 64], dtype=torch.bfloat16, device="cuda")
    part = layer.parts["gate_up_proj"]
    batch = make_batch(layer, [0, 1, -1, 1], max_tokens=8)

    def step(x: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        y = base * 2
        apply_lora(y, x, layer.kv, batch, part)
        return y + 1

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for token_adapter in ([0, 1, -1, 1], [1, 1, 0, -1, -1, 0]):
        batch.update(token_adapter, layer.adapters)
        x = torch.randn(len(token_adapter), 256, dtype=torch.bfloat16, device="cuda")
        base = torch.randn(len(token_adapter), 1408, dtype=torch.bfloat16, device="cuda")
        torch.testing.assert_close(compiled(x, base), step(x, base), rtol=1.6e-2, atol=3e-2)
