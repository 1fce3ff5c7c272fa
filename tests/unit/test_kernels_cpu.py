"""The CPU implementations of LoRA over paged rows against the float64 reference."""

import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from chameleon_kernels import LoraBatch, Part, apply_lora, cpu, cpu_implementation, expand, new_hidden, shrink
from chameleon_kernels.cpu_build import load
from chameleon_kernels.testing import (
    Apply,
    check_against_reference,
    make_batch,
    make_layer,
    popularity,
    self_check,
)

RANK_MIX = [8, 16, 32, 64, 128, 256]
# Nothing divides a vector register, a tile or the page.
ODD_SHAPES = {"qkv": (50, (37, 19, 19)), "down": (91, (50,)), "wide": (50, (1100, 3))}
SMALL_SHAPES = {"qkv": (96, (64, 32, 32)), "gate_up": (96, (160, 160)), "down": (160, (96,))}
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the compiled kernel needs g++")


def halves(y: torch.Tensor, x: torch.Tensor, kv: torch.Tensor, batch: LoraBatch, part: Part) -> None:
    h = new_hidden(x, batch, part).fill_(torch.nan)
    shrink(h, x, kv, batch, part)
    expand(y, h, kv, batch, part)


IMPLEMENTATIONS = [
    pytest.param(apply_lora, id="compiled", marks=needs_compiler),
    pytest.param(halves, id="compiled-halves", marks=needs_compiler),
    pytest.param(cpu.small_gemms, id="gemms"),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Many tiny parallel regions crawl when other processes have the cores; threads have a test of their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


every_implementation = pytest.mark.parametrize("apply", IMPLEMENTATIONS)


@needs_compiler
def test_the_compiled_kernel_is_what_runs_here() -> None:
    assert cpu_implementation() == "compiled"


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["uniform", "skewed", "one", "none"])
def test_decode_and_prefill_match_the_reference(apply: Apply, dtype: torch.dtype, kind: str) -> None:
    layer = make_layer(RANK_MIX, SMALL_SHAPES, 512, dtype)
    for num_tokens in (1, 6, 150):
        token_adapter = popularity(kind, num_tokens, len(RANK_MIX), np.random.default_rng(num_tokens))
        check_against_reference(apply, layer, make_batch(layer, token_adapter), dtype)


@every_implementation
def test_one_long_prompt_beside_decoding_tokens(apply: Apply) -> None:
    layer = make_layer(RANK_MIX, SMALL_SHAPES, 512)
    token_adapter = [0, 1, 2, *[4] * 70, -1, 3, *[-1] * 20, 5, 4]
    check_against_reference(apply, layer, make_batch(layer, token_adapter), torch.float32)


@every_implementation
@pytest.mark.parametrize(("page_elems", "num_pieces"), [(1104, 1), (1032, 2), (256, 5), (4096, 1)])
def test_rows_at_page_ends_rows_over_several_pages_and_sizes_that_divide_nothing(
    apply: Apply, page_elems: int, num_pieces: int
) -> None:
    layer = make_layer([1, 3, 5, 13, 30], ODD_SHAPES | {"deep": (600, (300,))}, page_elems)
    assert {part.num_pieces for part in layer.parts.values()} == {num_pieces}
    token_adapter = popularity("skewed", 40, 5, np.random.default_rng(0))
    check_against_reference(apply, layer, make_batch(layer, token_adapter), torch.float32)


@pytest.mark.parametrize("largest_right", [4, 64])
def test_the_check_at_start_finds_kernels_that_are_wrong_for_many_tokens_only(largest_right: int) -> None:
    def wrong(y: torch.Tensor, x: torch.Tensor, kv: torch.Tensor, batch: LoraBatch, part: Part) -> None:
        apply_lora(y, x, kv, batch, part)
        if len(x) > largest_right:
            y *= 1.5

    self_check("cpu", torch.float32)
    with pytest.raises(RuntimeError, match="wrong results"):
        self_check("cpu", torch.float32, wrong)


@every_implementation
def test_slices_of_lower_rank_or_without_adapter(apply: Apply) -> None:
    ranks = [[4, 0, 9, 2, 5, 0], [0, 0, 3, 16, 0, 0], [1, 1, 1, 1, 1, 8]]
    layer = make_layer(ranks, ODD_SHAPES, 1200)
    check_against_reference(apply, layer, make_batch(layer, [0, 1, 2, 2, 1, 0, -1] * 3), torch.float32)


@every_implementation
@pytest.mark.parametrize(
    ("weights", "activations"), itertools.permutations([torch.float32, torch.float16, torch.bfloat16], 2), ids=str
)
def test_weights_of_another_dtype_than_the_activations(
    apply: Apply, weights: torch.dtype, activations: torch.dtype
) -> None:
    layer = make_layer([8, 20], ODD_SHAPES, 1200, weights)
    check_against_reference(apply, layer, make_batch(layer, [0, 1, -1, 1, 1, 1, 0]), activations)


@every_implementation
def test_padding_beyond_the_step_is_not_touched(apply: Apply) -> None:
    layer = make_layer([8, 16])
    check_against_reference(apply, layer, make_batch(layer, [0, 1, 1]), torch.float32, padding=5)


@every_implementation
def test_strided_activations_and_a_strided_kv_cache(apply: Apply) -> None:
    layer = make_layer([8, 32])
    batch = make_batch(layer, [1, 0, -1, 1])
    part = layer.parts["o_proj"]
    x, y = torch.randn(4, 600)[:, 100 : 100 + 256], torch.randn(4, 300)[:, 44:]
    assert not x.is_contiguous() and not y.is_contiguous()
    expected = y.clone().contiguous()
    apply(expected, x.contiguous(), layer.kv, batch, part)
    apply(y, x, layer.kv.view(-1, 2, 16, 128).permute(0, 2, 1, 3), batch, part)
    torch.testing.assert_close(y, expected)


@needs_compiler
@pytest.mark.parametrize("num_tokens", [64, 2])
def test_the_result_does_not_depend_on_the_number_of_threads(num_tokens: int) -> None:
    """64 tokens: every thread does whole slices of adapters. 2 tokens: they share the rows and columns of one."""
    layer = make_layer(RANK_MIX)
    batch = make_batch(
        layer, popularity("uniform" if num_tokens > 2 else "one", num_tokens, 6, np.random.default_rng(0))
    )
    part = layer.parts["qkv_proj"]
    x, results = torch.randn(num_tokens, 256), []
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        results.append(torch.zeros(num_tokens, part.out_features))
        apply_lora(results[-1], x, layer.kv, batch, part)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_no_second_openmp_runtime_is_loaded() -> None:
    """A second one would start threads of its own, which vLLM's pinning of torch's threads squeezes onto one core."""
    program = (  # in a process of its own: what other tests import brings runtimes of its own
        "import chameleon_kernels; from pathlib import Path\n"
        "assert chameleon_kernels.cpu_implementation() == 'compiled'\n"
        "print(*{line.split()[-1] for line in Path('/proc/self/maps').read_text().splitlines() if 'omp' in line})"
    )
    mapped = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert len({path for path in mapped if "libgomp" in path or "libiomp" in path or "libomp" in path}) == 1


@needs_compiler
@pytest.mark.parametrize("arch", ["x86-64-v3", "x86-64"])
def test_builds_for_older_processors_are_right_too(
    arch: str, older_kernels: dict[str, "Future[Path]"], monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("needs an x86 processor with AVX2")
    library = load(older_kernels[arch].result())
    monkeypatch.setattr(cpu, "load_library", lambda: library)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        layer = make_layer([5, 32], ODD_SHAPES, 1200, dtype)
        check_against_reference(apply_lora, layer, make_batch(layer, [0, 1, -1, 1, 1, 1, 1, 0]), dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_and_special_values_are_those_of_torch(dtype: torch.dtype) -> None:
    """y += 1 * b for every kind of value, with a base of zero: what is stored is b rounded as torch rounds it."""
    values = torch.cat(
        [torch.randn(400) * 10.0 ** torch.arange(-8, 8).repeat(25), torch.tensor([torch.inf, -torch.inf])]
    )
    values = torch.cat([values, torch.tensor([0.0, 65504.0, 65519.0, 65520.0, 6e-8, 2.9e-8, 1.00390625, 1.01171875])])
    layer = make_layer([1], {"p": (1, (len(values),))}, 1024)
    batch = make_batch(layer, [0])
    _, b_offset = layer.adapters[0].offsets[0, :, 0, 0].tolist()
    layer.kv.view(-1)[b_offset : b_offset + len(values)] = values
    h = torch.ones(1, 1, 1, 256)
    y = torch.zeros(1, len(values), dtype=dtype)
    expand(y, h, layer.kv, batch, layer.parts["p"])
    assert torch.equal(y[0], values.to(dtype))
    layer.kv.view(-1)[b_offset : b_offset + len(values)] = torch.nan
    expand(y, h, layer.kv, batch, layer.parts["p"])
    assert y.isnan().all()


def test_misuse_is_refused_with_advice() -> None:
    layer = make_layer([8])
    part = layer.parts["o_proj"]
    batch = make_batch(layer, [0, 0])
    x, y = torch.zeros(2, 256), torch.zeros(2, 256)
    bad = [
        ((y, x[:, :128], layer.kv, batch, part), "do not fit"),
        ((y[:1], x, layer.kv, batch, part), "of the same tokens"),
        ((y[:1], x[:1], layer.kv, batch, part), "update the batch"),
        ((y, x.half(), layer.kv, batch, part), "share a dtype"),
        ((y.double(), x.double(), layer.kv, batch, part), "float32, float16 or bfloat16"),
        ((y, x.T.contiguous().T[:, :256], layer.kv, batch, part), "contiguous"),
        ((y, x, layer.kv[:1].clone(), batch, part), "beyond the KV tensor"),
    ]
    for arguments, message in bad:
        with pytest.raises(ValueError, match=message):
            apply_lora(*arguments)
    assert not y.any()


@needs_compiler
def test_torch_compile_traces_it_whole_and_sees_that_y_changes() -> None:
    layer = make_layer([8, 64])
    part = layer.parts["gate_up_proj"]
    batch = make_batch(layer, [0, 1, -1, 1], max_tokens=8)

    def step(x: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        y = base * 2
        apply_lora(y, x, layer.kv, batch, part)
        return y + 1

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for token_adapter in ([0, 1, -1, 1], [1, 1, 0, -1, -1, 0]):
        batch.update(token_adapter, layer.adapters)
        x, base = torch.randn(len(token_adapter), 256), torch.randn(len(token_adapter), 1408)
        torch.testing.assert_close(compiled(x, base), step(x, base))
