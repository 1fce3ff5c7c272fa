"""The Triton kernels: in Triton's interpreter against the float64 reference, and compiled for GPUs that are not here.

The interpreter must be chosen before the kernels are imported, so one test runs this file again in another process.
"""

import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from chameleon_kernels import LoraBatch, Part, triton_ops  # noqa: E402
from chameleon_kernels.launch import LARGE, SMALL, SMALL_STEP_TOKENS, StepCounts, Variant  # noqa: E402
from chameleon_kernels.testing import (  # noqa: E402
    Apply,
    check_against_reference,
    make_batch,
    make_layer,
    popularity,
    self_check,
)
from forked import FORKED  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = {"qkv": (96, (64, 32, 32)), "down": (160, (96,))}
ODD_SHAPES = {"qkv": (50, (37, 19, 19)), "five": (50, (3, 20, 9, 11, 130))}


def apply(y: torch.Tensor, x: torch.Tensor, kv: torch.Tensor, batch: LoraBatch, part: Part) -> None:
    """Just the programs that the step needs, with poisoned scratch."""
    _apply(y, x, kv, batch, part, batch.counts)


def apply_as_captured(y: torch.Tensor, x: torch.Tensor, kv: torch.Tensor, batch: LoraBatch, part: Part) -> None:
    """The launches of any step of so many tokens."""
    _apply(y, x, kv, batch, part, None)


def _apply(
    y: torch.Tensor, x: torch.Tensor, kv: torch.Tensor, batch: LoraBatch, part: Part, counts: StepCounts | None
) -> None:
    if batch.num_segments:
        launches = triton_ops.plan(x.shape[0], batch.spec, part, counts, triton_ops._INTERPRETED_PROCESSORS)
        hidden = triton_ops.new_hidden(launches, x.device).fill_(torch.nan)
        triton_ops.paged_lora(y, x, kv, batch.meta, batch.spec, part, counts, hidden)
        locks_at, num_locks = batch.spec.regions()["locks"]
        assert not batch.meta[locks_at : locks_at + num_locks].any()


if INTERPRETED:

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("kind", ["uniform", "skewed", "one", "none"])
    def test_decode_matches_the_reference(dtype: torch.dtype, kind: str) -> None:
        layer = make_layer([8, 16, 32, 64, 128, 256], SHAPES, 512, dtype)
        token_adapter = popularity(kind, 10, 6, np.random.default_rng(3))
        check_against_reference(apply, layer, make_batch(layer, token_adapter), dtype, padding=2)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_prefill_in_large_tiles_beside_decode(dtype: torch.dtype) -> None:
        layer = make_layer([8, 48], {"p": (96, (64, 32))}, 512, dtype)
        token_adapter = [0, -1, *[1] * 300, 0, *[-1] * 230, *[0] * 20]
        assert len(token_adapter) > SMALL_STEP_TOKENS
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

    @pytest.mark.parametrize("num_processors", [1, 4, 32])
    @pytest.mark.parametrize("launches", [apply, apply_as_captured])
    def test_any_number_of_processors_and_of_splits(
        launches: Apply, num_processors: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """From one split, so that no program waits for others, to one for each 128 input columns."""
        monkeypatch.setattr(triton_ops, "_INTERPRETED_PROCESSORS", num_processors)
        triton_ops._device.cache_clear()
        layer = make_layer([8, 40], {"p": (700, (64, 300))}, 2048)
        for token_adapter in ([0], [1, -1, 0] * 7, [1] * 20):
            check_against_reference(launches, layer, make_batch(layer, token_adapter), torch.float32, padding=1)
        triton_ops._device.cache_clear()

    @pytest.mark.parametrize("name", ["_shrink_kernel", "_expand_kernel"])
    @pytest.mark.parametrize("variant", [SMALL, LARGE], ids=lambda variant: variant.name)
    def test_a_kernel_that_is_wrong_in_one_variant_only_is_found(
        variant: Variant, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By the check at start, before anything is served: here every second column of tiles is left out."""
        kernel = getattr(triton_ops, name)

        class Wrong:
            def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
                def launch(*args: object, BLOCK_M: int, **constants: object) -> None:
                    right = kernel[grid]
                    if variant.tile == BLOCK_M:
                        args[0].fill_(1.0)
                    else:
                        right(*args, BLOCK_M=BLOCK_M, **constants)

                return launch

        monkeypatch.setattr(triton_ops, name, Wrong())
        with pytest.raises(RuntimeError, match=r"wrong results in torch\.float32 on cpu"):
            self_check("cpu", torch.float32, apply)

    def test_results_repeat_bit_by_bit_and_captured_launches_compute_the_same() -> None:
        layer = make_layer([8, 24], SHAPES, 512)
        part, x = layer.parts["down"], torch.randn(40, 160)
        results = []
        room = {"max_tokens": 700, "max_adapters": 90, "max_rank": 64}
        for launches, bounds in (
            (apply, {}),
            (apply, {}),
            (apply, room),
            (apply_as_captured, {}),
            (apply_as_captured, room),
        ):
            batch = make_batch(layer, [0, 1] * 20, **bounds)
            results.append(torch.zeros(40, 96))
            launches(results[-1], x, layer.kv, batch, part)
        assert all(torch.equal(results[0], result) for result in results)

    def test_rows_of_x_that_a_layer_does_not_have_are_not_touched() -> None:
        """A layer may be called with fewer rows than the step has tokens."""
        layer = make_layer([8, 16], SHAPES, 512)
        part = layer.parts["down"]
        batch = make_batch(layer, [0, 1, 0, 1, 1, 1])
        x, y = torch.randn(6, 160), torch.zeros(6, 96)
        apply(y, x, layer.kv, batch, part)
        few = torch.zeros(6, 96)
        apply(few[:2], x[:2], layer.kv, batch, part)
        torch.testing.assert_close(few[:2], y[:2])
        assert not few[2:].any()

    def test_launches_that_stay_the_same_follow_the_metadata() -> None:
        """What a CUDA graph does: the same call on the same tensors after the batch was updated."""
        layer = make_layer([8, 24, 40], SHAPES, 512)
        batch = make_batch(layer, [0, 1, 1, 2], max_tokens=16, max_adapters=3)
        for token_adapter in ([2, 2, -1, 0], [-1] * 4, [1, 0, 2, -1]):
            batch.update(token_adapter, layer.adapters)
            check_against_reference(apply_as_captured, layer, batch, torch.float32, padding=12)

else:
    CAPABILITIES = (80, 90, 100, 120)
    KERNELS = ("_shrink_kernel", "_expand_kernel")
    Builds = dict[tuple[str, Variant, int], "Future[tuple[str, int]]"]

    @pytest.fixture(scope="module", autouse=True)
    def builds() -> Iterator[Builds]:
        """All compilations, on two cores, while the tests go on."""
        wanted = itertools.product(KERNELS, (SMALL, LARGE), CAPABILITIES)
        with ProcessPoolExecutor(2, mp_context=FORKED) as pool:
            yield {one: pool.submit(build, *one) for one in wanted}

    def test_the_kernels_in_tritons_interpreter() -> None:
        packages = str(Path(triton_ops.__file__).parent.parent)
        path = os.pathsep.join(filter(None, [packages, os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
            env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        assert re.search(r"\b32 passed", done.stdout) and "skipped" not in done.stdout, done.stdout

    @pytest.mark.parametrize("capability", CAPABILITIES)
    @pytest.mark.parametrize("variant", [SMALL, LARGE], ids=lambda variant: variant.name)
    @pytest.mark.parametrize("kernel", KERNELS)
    def test_compiles_for_gpus_with_tensor_cores_wide_loads_and_no_spills(
        builds: Builds, kernel: str, variant: Variant, capability: int
    ) -> None:
        """No GPU is needed to compile for one; that weights and h are read 16 bytes at a time shows in the PTX."""
        ptx, num_stack_bytes = builds[kernel, variant, capability].result()
        assert re.search(r"(mma|tcgen05)\.\S*(f32\.bf16\.bf16|kind::f16)", ptx)
        assert re.search(r"cp\.async\.cg\.shared\.global [^;]*, 0x10|ld\.global\.\S*v4", ptx)
        assert not re.search(r"cp\.async\.ca\.shared\.global [^;]*, 0x4\b", ptx)
        assert ("griddepcontrol" in ptx) == (capability >= 90)
        assert num_stack_bytes == 0

    def build(name: str, variant: Variant, capability: int) -> tuple[str, int]:
        """The PTX, and the bytes of stack that a thread has."""
        common = {"COUNT_SLOT": variant.count_slot, "BLOCK_M": variant.tile, "UPCAST": False, "PDL": capability >= 90}
        common |= {"SINGLE": variant.single}
        shrink = common | {"BLOCK_N": variant.rows, "BLOCK_K": variant.block_k}
        expand = common | {"BLOCK_R": variant.expand_rows, "BLOCK_N": variant.columns}
        constants = shrink if name == "_shrink_kernel" else expand
        compiled = compile_for(getattr(triton_ops, name), constants, capability, variant)
        return compiled.asm["ptx"], stack_bytes(compiled.asm["cubin"])

    def compile_for(kernel: object, constants: dict[str, object], capability: int, variant: Variant) -> object:
        """A kernel on bfloat16, with strides and sizes divisible by 16, as for every common model."""
        signature, attributes = {}, {}
        types = {"h_ptr": "*fp32", "meta_ptr": "*i64"}
        unknown = {kernel.arg_names[param] if isinstance(param, int) else param for param in kernel.do_not_specialize}
        for i, name in enumerate(kernel.arg_names):
            if name in constants:
                signature[name] = "constexpr"
                continue
            signature[name] = types.get(name, "*bf16") if name.endswith("_ptr") else "i32"
            if name not in unknown:
                attributes[(i,)] = [["tt.divisibility", 16]]
        by_index = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        options = {"num_warps": variant.num_warps}
        if kernel is triton_ops._shrink_kernel:
            options["num_stages"] = variant.shrink_stages
        source = triton.compiler.ASTSource(kernel, signature, by_index, attributes)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

    def stack_bytes(cubin: bytes) -> int:
        """What a thread keeps in memory for want of registers, by NVIDIA's own tool, which comes with Triton."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        return int(re.search(r"STACK:(\d+)", usage)[1])
