"""The Triton kernels: in Triton's interpreter against the float64 reference, and compiled for GPUs that are not here.

The interpreter must be chosen before the kernels are imported, so one test runs this file again in another process.
"""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from chameleon_kernels import BatchSpec, LoraBatch, Part, triton_ops  # noqa: E402
from chameleon_kernels.batch import NUM_COUNTS  # noqa: E402
from chameleon_kernels.testing import check_against_reference, make_batch, make_layer, popularity  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = {"qkv": (96, (64, 32, 32)), "down": (160, (96,))}
ODD_SHAPES = {"qkv": (50, (37, 19, 19)), "five": (50, (3, 20, 9, 11, 130))}


def apply(y: torch.Tensor, x: torch.Tensor, kv: torch.Tensor, batch: LoraBatch, part: Part) -> None:
    """Both launches with poisoned scratch."""
    h = triton_ops.new_hidden(x, batch.spec, part.num_slices).fill_(torch.nan)
    triton_ops.shrink(h, x, kv, batch.meta, batch.spec, part)
    triton_ops.expand(y, h, kv, batch.meta, batch.spec, part)


if INTERPRETED:

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("kind", ["uniform", "skewed", "one", "none"])
    def test_decode_matches_the_reference(dtype: torch.dtype, kind: str) -> None:
        layer = make_layer([8, 16, 32, 64, 128, 256], SHAPES, 512, dtype)
        token_adapter = popularity(kind, 10, 6, np.random.default_rng(3))
        check_against_reference(apply, layer, make_batch(layer, token_adapter), dtype, padding=2)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_prefill_in_large_tiles_beside_decode(dtype: torch.dtype) -> None:
        layer = make_layer([8, 48], {"p": (96, (64, 32))}, 512, dtype)
        token_adapter = [0, -1, *[1] * 300, 0, *[-1] * 230, *[0] * 20]
        assert len(token_adapter) > triton_ops.SMALL_STEP_TOKENS
        check_against_reference(apply, layer, make_batch(layer, token_adapter), dtype)

    @pytest.mark.parametrize("page_elems", [136, 264, 600])
    def test_odd_widths_rows_at_page_ends_many_slices_and_lower_ranks(page_elems: int) -> None:
        layer = make_layer([3, [1, 17, 0, 5, 0, 2, 33, 0], [0] * 7 + [4]], ODD_SHAPES, page_elems)
        check_against_reference(apply, layer, make_batch(layer, [0, 1, 1, -1, 2, 1, 0] * 4), torch.float32)

    @pytest.mark.parametrize("num_tokens", [20, 530])
    def test_rows_that_lie_in_several_pages(num_tokens: int) -> None:
        layer = make_layer([8, 24], {"p": (600, (700, 130))}, 256)
        assert layer.parts["p"].num_pieces == 3
        token_adapter = popularity("skewed", num_tokens, 2, np.random.default_rng(0))
        check_against_reference(apply, layer, make_batch(layer, token_adapter), torch.float32)

    def test_results_repeat_bit_by_bit_and_more_room_changes_nothing() -> None:
        layer = make_layer([8, 24], SHAPES, 512)
        part, x = layer.parts["down"], torch.randn(40, 160)
        results = []
        for bounds in ({}, {}, {"max_tokens": 700, "max_adapters": 90, "max_rank": 64}):
            batch = make_batch(layer, [0, 1] * 20, **bounds)
            results.append(torch.zeros(40, 96))
            apply(results[-1], x, layer.kv, batch, part)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])

    def test_launches_that_stay_the_same_follow_the_metadata() -> None:
        """What a CUDA graph does: the same call on the same tensors after the batch was updated."""
        layer = make_layer([8, 24, 40], SHAPES, 512)
        batch = make_batch(layer, [0, 1, 1, 2], max_tokens=16, max_adapters=3)
        for token_adapter in ([2, 2, -1, 0], [-1] * 4, [1, 0, 2, -1]):
            batch.update(token_adapter, layer.adapters)
            check_against_reference(apply, layer, batch, torch.float32, padding=12)

else:

    def test_the_kernels_in_tritons_interpreter() -> None:
        packages = str(Path(triton_ops.__file__).parent.parent)
        path = os.pathsep.join(filter(None, [packages, os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
            env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        assert re.search(r"\b21 passed", done.stdout) and "skipped" not in done.stdout, done.stdout

    @pytest.mark.parametrize("capability", [80, 90])
    @pytest.mark.parametrize("num_tokens", [32, 1024])
    def test_compiles_for_gpus_with_tensor_cores_and_wide_loads(capability: int, num_tokens: int) -> None:
        """No GPU is needed to compile for one; that the weights are read 16 bytes at a time shows in the PTX."""
        launch = triton_ops.plan_launch(BatchSpec(8192, 64), num_tokens, 4096)
        common = {"COUNT_SLOT": launch.count_slot, "BLOCK_M": launch.block_m, "NUM_SPLITS": launch.num_splits,
                  "UPCAST": False, "NUM_COUNTS": NUM_COUNTS}  # fmt: skip
        shrink = common | {"BLOCK_R": launch.block_r, "BLOCK_K": launch.block_k, "RANK_PROGRAMS": launch.rank_programs}
        expand = common | {"BLOCK_R": 16, "BLOCK_N": launch.block_n}
        sizes = ("in_features", "piece_elems", "out_start", "w0", "w1", "w2", "w3")
        for kernel, constants in ((triton_ops._shrink_kernel, shrink), (triton_ops._expand_kernel, expand)):
            ptx = compile_for(kernel, constants, sizes, capability)
            assert re.search(r"(wg)?mma\.\S*f32\.bf16\.bf16", ptx)
            assert re.search(r"cp\.async\.cg\.shared\.global [^;]*, 0x10", ptx)

    def compile_for(kernel: object, constants: dict[str, object], sizes: Sequence[str], capability: int) -> str:
        """PTX of a kernel on bfloat16, with strides and `sizes` divisible by 16, as for every common model."""
        signature, attributes = {}, {}
        types = {"h_ptr": "*fp32", "meta_ptr": "*i64"}
        for i, name in enumerate(kernel.arg_names):
            if name in constants:
                signature[name] = "constexpr"
                continue
            signature[name] = types.get(name, "*bf16") if name.endswith("_ptr") else "i32"
            if name.endswith(("_ptr", "_stride")) or name in sizes:
                attributes[(i,)] = [["tt.divisibility", 16]]
        by_index = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = triton.compiler.ASTSource(kernel, signature, by_index, attributes)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
