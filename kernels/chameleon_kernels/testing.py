"""Random pages, adapters and steps, for tests and benchmarks.

Pages are scattered over the KV tensor and all of it that is not a row is NaN, so that a kernel that reads beside a
row shows it. Weights are scaled so that LoRA's part of y is about 1 for every rank.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from chameleon_kernels import reference
from chameleon_kernels.batch import BatchSpec, LoraBatch
from chameleon_kernels.launch import SMALL_STEP_TOKENS
from chameleon_kernels.layout import Part, RowPlan, layer_parts, plan_rows, slice_shapes
from chameleon_kernels.ops import apply_lora
from chameleon_kernels.rows import AdapterRows, pack

Apply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, LoraBatch, Part], None]

# A small Llama: grouped-query attention, hidden 256.
DEMO_SHAPES = {
    "qkv_proj": (256, (256, 128, 128)),
    "o_proj": (256, (256,)),
    "gate_up_proj": (256, (704, 704)),
    "down_proj": (704, (256,)),
}


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's KV tensor holding adapters. `plans[i]` and `adapters[i]` belong together."""

    parts: dict[str, Part]
    kv: torch.Tensor
    plans: list[RowPlan]
    adapters: list[AdapterRows]


def make_layer(
    slice_ranks: Sequence[Sequence[int] | int],
    shapes: Mapping[str, tuple[int, Sequence[int]]] = DEMO_SHAPES,
    page_elems: int = 4096,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Layer:
    """Adapters with the given rank for all slices, or a rank for each slice."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    parts = layer_parts(shapes, page_elems)
    widths = slice_shapes(list(parts.values()))
    ranks = [[each] * len(widths) if isinstance(each, int) else list(each) for each in slice_ranks]
    plans = [plan_rows(list(parts.values()), each, page_elems) for each in ranks]
    num_pages = sum(plan.num_pages for plan in plans) + 3
    kv = torch.full((num_pages, page_elems), torch.nan, dtype=dtype)
    free_pages = rng.permutation(num_pages)
    adapters = []
    for plan, each in zip(plans, ranks, strict=True):
        mine, free_pages = free_pages[: plan.num_pages], free_pages[plan.num_pages :]
        pages = torch.full((plan.num_pages, page_elems), torch.nan)
        pairs = [_random_pair(*shape, rank, generator) for shape, rank in zip(widths, each, strict=True)]
        pack(plan, list(parts.values()), pairs, pages)
        kv[torch.from_numpy(mine)] = pages.to(dtype)
        adapters.append(AdapterRows.build(plan, mine * page_elems, device))
    return Layer(parts, kv.to(device), plans, adapters)


def _random_pair(
    in_features: int, out_features: int, rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor] | None:
    if rank == 0:
        return None
    a = torch.randn(rank, in_features, generator=generator) / in_features**0.5
    return a, torch.randn(rank, out_features, generator=generator) / rank**0.5


def make_batch(layer: Layer, token_adapter: Sequence[int] | np.ndarray, **bounds: int) -> LoraBatch:
    """A batch just large enough for the step, unless `bounds` (of BatchSpec) say otherwise."""
    sizes = {"max_tokens": max(1, len(token_adapter)), "max_adapters": len(layer.adapters)}
    batch = LoraBatch(BatchSpec(**(sizes | bounds)), layer.kv.device)
    batch.update(token_adapter, layer.adapters)
    return batch


# Widths for every path: an input of one block, so that nothing is split, rows in several pages, odd widths.
_CHECK_SHAPES = DEMO_SHAPES | {"narrow": (64, (40,)), "odd": (60, (37, 19))}


def self_check(device: torch.device | str, dtype: torch.dtype, apply: Apply = apply_lora) -> None:
    """Compare this machine's kernels with the reference on steps of mixed ranks and base-only tokens: every variant
    that the launch plan can choose, tokens alone and in company, rows that lie whole and in pieces. So each has been
    compiled before the first request. Raises RuntimeError if they differ. Under a second on a CPU, tens of seconds
    where Triton compiles.
    """
    decode = [0, 1, -1, 2]
    prompts = [1] * 40 + [-1] * 3 + [0] * 21
    long_prompts = [2, *[1] * (SMALL_STEP_TOKENS - 60), *[-1] * 7, *[0] * 90, 1]
    for page_elems in (4096, 512):
        layer = make_layer([8, 64, 16], _CHECK_SHAPES, page_elems, dtype, device)
        for token_adapter in (decode, prompts, long_prompts):
            try:
                check_against_reference(apply, layer, make_batch(layer, token_adapter), dtype)
            except AssertionError as error:
                raise RuntimeError(f"LoRA kernels compute wrong results in {dtype} on {device}: {error}") from error


def popularity(kind: str, num_tokens: int, num_adapters: int, rng: np.random.Generator) -> np.ndarray:
    """An adapter index per token: uniform, skewed (Zipf-like, with base-only tokens), one (all the same) or none."""
    if kind == "uniform":
        return rng.integers(0, num_adapters, num_tokens)
    if kind == "skewed":
        weights = 1.0 / np.arange(1, num_adapters + 2)
        return rng.choice(num_adapters + 1, num_tokens, p=weights / weights.sum()) - 1
    if kind == "one":
        return np.full(num_tokens, num_adapters - 1)
    if kind == "none":
        return np.full(num_tokens, -1)
    raise ValueError(f"popularity {kind!r} is none of uniform, skewed, one, none")


# Relative and absolute tolerance against float64: the rounding of y, and, where an implementation rounds h, of h.
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 4e-3), torch.bfloat16: (1.6e-2, 3e-2)}


def check_against_reference(
    apply: Apply,
    layer: Layer,
    batch: LoraBatch,
    dtype: torch.dtype,
    padding: int = 0,
) -> None:
    """Assert that `apply(y, x, kv, batch, part)` equals the float64 reference on every part.

    x of base-only tokens and of `padding` more tokens is NaN, and y holds NaN there, which must stay bit for bit.
    """
    generator = torch.Generator().manual_seed(1)
    num_tokens = batch.num_tokens + padding
    is_lora = torch.zeros(num_tokens, dtype=torch.bool)
    for tokens, _ in batch.segments():
        is_lora[tokens.cpu()] = True
    for name, part in layer.parts.items():
        x = torch.randn(num_tokens, part.in_features, generator=generator).to(dtype)
        y = torch.randn(num_tokens, part.out_features, generator=generator).to(dtype)
        x[~is_lora], y[~is_lora] = torch.nan, torch.nan
        x, y = x.to(layer.kv.device), y.to(layer.kv.device)
        expected = y.double()
        reference.apply(expected, x, layer.kv, batch, part, torch.float64)
        if is_lora.any():
            assert not torch.equal(expected[is_lora], y[is_lora].double()), "the case shows nothing"
        apply(y, x, layer.kv, batch, part)
        rtol, atol = TOLERANCE[dtype]
        torch.testing.assert_close(y[is_lora].double(), expected[is_lora], rtol=rtol, atol=atol)
        assert y[~is_lora].isnan().all(), f"{name}: rows of base-only tokens were written"
