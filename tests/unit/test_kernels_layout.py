"""Packing of adapter rows into pages, and the metadata of a step."""

import numpy as np
import pytest
import torch
from chameleon_kernels import AdapterRows, BatchSpec, LoraBatch, PageTooSmallError, layer_parts, plan_rows
from chameleon_kernels.batch import LARGE_TILE, SMALL_TILE
from chameleon_kernels.layout import slice_shapes
from chameleon_kernels.testing import DEMO_SHAPES, make_layer
from hypothesis import given
from hypothesis import strategies as st

WIDTHS = st.integers(1, 40)


@given(
    shapes=st.lists(st.tuples(WIDTHS, st.lists(WIDTHS, min_size=1, max_size=3)), min_size=1, max_size=3),
    ranks=st.lists(st.integers(0, 9), min_size=9, max_size=9).filter(any),
    spare=st.integers(0, 60),
)
def test_rows_never_overlap_nor_cross_a_page(shapes: list[tuple[int, list[int]]], ranks: list[int], spare: int) -> None:
    parts = list(layer_parts({str(i): shape for i, shape in enumerate(shapes)}).values())
    widths = slice_shapes(parts)
    ranks = [max(1, ranks[0]), *ranks[1:]][: len(widths)]
    page_elems = max(max(pair) for pair in widths) + spare
    plan = plan_rows(parts, ranks, page_elems)
    used = np.zeros((plan.num_pages, page_elems), dtype=int)
    for s, (pair, rank) in enumerate(zip(widths, ranks, strict=True)):
        for side, width in enumerate(pair):
            assert (plan.page[s, side, rank:] == -1).all() and (plan.page[s, side, :rank] >= 0).all()
            for page, start in zip(plan.page[s, side, :rank], plan.start[s, side, :rank], strict=True):
                assert 0 <= start <= page_elems - width
                used[page, start : start + width] += 1
    assert used.max() == 1
    assert used.any(axis=1).all(), "a page without rows"


def test_packing_wastes_little_when_widths_do_not_divide_the_page() -> None:
    parts = list(layer_parts(DEMO_SHAPES).values())
    plan = plan_rows(parts, [64] * 7, 2048)
    row_elems = 64 * sum(sum(pair) for pair in slice_shapes(parts))
    assert plan.num_pages * 2048 < 1.05 * row_elems


def test_a_row_longer_than_a_page_is_refused_with_advice() -> None:
    with pytest.raises(
        PageTooSmallError, match="704 elements does not fit a page of 512; raise the KV-cache block size"
    ):
        plan_rows(list(layer_parts(DEMO_SHAPES).values()), [8] * 7, 512)


def test_pack_puts_each_row_where_the_table_says() -> None:
    parts = list(layer_parts({"p": (6, (4, 10))}).values())
    plan = plan_rows(parts, [3, 0], 16)
    a, b = torch.randn(3, 6), torch.randn(3, 4)
    pages = torch.zeros(plan.num_pages, 16)
    plan.pack([(a, b), None], pages)
    table = plan.offsets(np.arange(plan.num_pages) * 16)
    for r in range(3):
        assert torch.equal(pages.view(-1)[table[0, 0, r] :][:6], a[r])
        assert torch.equal(pages.view(-1)[table[0, 1, r] :][:4], b[r])
    assert (table[1] == -1).all()
    with pytest.raises(ValueError, match="planned for 3 rows, got 2"):
        plan.pack([(a[:2], b), None], pages)


@pytest.fixture(scope="module")
def adapters() -> list[AdapterRows]:
    return make_layer([8, 16, 32]).adapters


def test_segments_group_the_tokens_of_each_adapter(adapters: list[AdapterRows]) -> None:
    batch = LoraBatch(BatchSpec(max_tokens=8, max_adapters=2), "cpu")
    batch.update([2, -1, 0, 2, -1, 0, 2], adapters)
    assert [(tokens.tolist(), adapter.rank) for tokens, adapter in batch.segments()] == [([2, 5], 8), ([0, 3, 6], 32)]
    assert (batch.num_segments, batch.num_lora_tokens, batch.num_tokens) == (2, 5, 7)


def test_a_refused_step_leaves_the_last_one_in_place(adapters: list[AdapterRows]) -> None:
    batch = LoraBatch(BatchSpec(max_tokens=4, max_adapters=2, max_rank=16), "cpu")
    batch.update([0, 1], adapters)
    before = batch.meta.clone()
    for token_adapter, message in [
        ([0, 0, 0, 0, 0], "at most 4"),
        ([0, 1, 2], "3 adapters in one step"),
        ([2], "rank 32 exceeds the configured bound of 16"),
        ([3], "only 3 adapters given"),
    ]:
        with pytest.raises(ValueError, match=message):
            batch.update(token_adapter, adapters)
    assert torch.equal(batch.meta, before) and batch.num_tokens == 2


def test_unaligned_rows_are_refused_unless_allowed() -> None:
    unaligned = make_layer([3], shapes={"p": (10, (6,))}, page_elems=64).adapters
    with pytest.raises(ValueError, match="aligned=False"):
        LoraBatch(BatchSpec(4, 1), "cpu").update([0], unaligned)
    LoraBatch(BatchSpec(4, 1, aligned=False), "cpu").update([0], unaligned)


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 64, 200])
def test_tiles_cover_every_token_once_within_the_fixed_grid(num_tokens: int) -> None:
    rng = np.random.default_rng(num_tokens)
    spec = BatchSpec(max_tokens=256, max_adapters=40)
    adapters = make_layer([8] * 40, shapes={"p": (8, (8,))}, page_elems=64).adapters
    batch = LoraBatch(spec, "cpu")
    token_adapter = rng.integers(-1, 40, num_tokens)
    batch.update(token_adapter, adapters)
    meta, regions = batch.meta.numpy(), spec.regions()
    field = {name: meta[start : start + length] for name, (start, length) in regions.items()}
    for slot, (name, tile) in enumerate((("small", SMALL_TILE), ("large", LARGE_TILE)), start=1):
        count = int(meta[slot])
        assert count <= spec.num_tiles(num_tokens, tile)
        segment, first = field[name][:count], field[name][len(field[name]) // 2 :][:count]
        end = np.minimum(first + tile, (field["start"] + field["len"])[segment])
        covered = np.concatenate([field["tokens"][a:b] for a, b in zip(first, end, strict=True)])
        assert sorted(covered) == np.flatnonzero(token_adapter >= 0).tolist()
