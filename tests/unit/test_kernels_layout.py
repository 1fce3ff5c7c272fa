"""Packing of adapter rows into pages, and the metadata of a step."""

import numpy as np
import pytest
import torch
from chameleon_kernels import AdapterRows, BatchSpec, LoraBatch, PageTooSmallError, layer_parts, pack, plan_rows
from chameleon_kernels.launch import VARIANTS
from chameleon_kernels.layout import PIECE_ALIGN, piece_spans, slice_shapes
from chameleon_kernels.testing import DEMO_SHAPES, make_layer
from hypothesis import given
from hypothesis import strategies as st

WIDTHS = st.integers(1, 3000)


@given(
    shapes=st.lists(st.tuples(WIDTHS, st.lists(WIDTHS, min_size=1, max_size=3)), min_size=1, max_size=3),
    ranks=st.lists(st.integers(0, 9), min_size=9, max_size=9).filter(any),
    page_elems=st.integers(PIECE_ALIGN // 8, 200).map(lambda eights: 8 * eights),
)
def test_pieces_never_overlap_nor_cross_a_page(
    shapes: list[tuple[int, list[int]]], ranks: list[int], page_elems: int
) -> None:
    parts = list(layer_parts({str(i): shape for i, shape in enumerate(shapes)}, page_elems).values())
    widths = slice_shapes(parts)
    ranks = [max(1, ranks[0]), *ranks[1:]][: len(widths)]
    plan = plan_rows(parts, ranks, page_elems)
    used = np.zeros((plan.num_pages, page_elems), dtype=int)
    for s, (pair, rank) in enumerate(zip(widths, ranks, strict=True)):
        for side, width in enumerate(pair):
            spans = piece_spans(width, plan.piece_elems)
            assert len(spans) <= parts[0].num_pieces and [spans[0][0], spans[-1][1]] == [0, width]
            assert (plan.page[s, side, :, rank:] == -1).all() and (plan.page[s, side, len(spans) :] == -1).all()
            for piece, (begin, end) in enumerate(spans):
                places = zip(plan.page[s, side, piece, :rank], plan.start[s, side, piece, :rank], strict=True)
                for page, start in places:
                    assert start % 8 == 0 and 0 <= start <= page_elems - (end - begin)
                    used[page, start : start + end - begin] += 1
    assert used.max() == 1
    assert used.any(axis=1).all(), "a page without rows"


def llama_like(hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int, tp: int) -> tuple[dict, int]:
    """The shapes of a layer on one of `tp` GPUs, and the elements of its KV block of 16 tokens: keys and values."""
    q, kv = heads * head_dim // tp, max(1, kv_heads // tp) * head_dim
    shapes = {
        "qkv_proj": (hidden, (q, kv, kv)),
        "o_proj": (q, (hidden,)),
        "gate_up_proj": (hidden, (intermediate // tp, intermediate // tp)),
        "down_proj": (intermediate // tp, (hidden,)),
    }
    return shapes, 16 * 2 * kv


MODELS = {
    "Qwen2.5-0.5B": (896, 4864, 14, 2, 64),
    "Qwen2.5-1.5B": (1536, 8960, 12, 2, 128),
    "Qwen2.5-3B": (2048, 11008, 16, 2, 128),
    "Qwen2.5-7B": (3584, 18944, 28, 4, 128),
    "Qwen2.5-14B": (5120, 13824, 40, 8, 128),
    "Qwen2.5-32B": (5120, 27648, 40, 8, 128),
    "Qwen2.5-72B": (8192, 29568, 64, 8, 128),
    "Qwen3-0.6B": (1024, 3072, 16, 8, 128),
    "Qwen3-8B": (4096, 12288, 32, 8, 128),
    "Qwen3-32B": (5120, 25600, 64, 8, 128),
    "Llama-3.2-1B": (2048, 8192, 32, 8, 64),
    "Llama-3.2-3B": (3072, 8192, 24, 8, 128),
    "Llama-3.1-8B": (4096, 14336, 32, 8, 128),
    "Llama-3.1-70B": (8192, 28672, 64, 8, 128),
    "Llama-3.1-405B": (16384, 53248, 128, 8, 128),
    "Mistral-7B": (4096, 14336, 32, 8, 128),
}


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("model", MODELS)
def test_every_common_model_fits_pages_of_16_tokens_and_wastes_little(model: str, tp: int) -> None:
    if MODELS[model][2] % tp:
        tp = 1
    shapes, page_elems = llama_like(*MODELS[model], tp)
    parts = list(layer_parts(shapes, page_elems).values())
    plan = plan_rows(parts, [16] * 7, page_elems)
    assert plan.waste(parts) <= 0.1
    assert parts[0].num_pieces <= 16


def test_rows_that_fit_their_pages_well_stay_whole() -> None:
    shapes, page_elems = llama_like(*MODELS["Llama-3.1-8B"], 1)
    assert {part.num_pieces for part in layer_parts(shapes, page_elems).values()} == {1}


def test_packing_wastes_little_when_widths_do_not_divide_the_page() -> None:
    parts = list(layer_parts(DEMO_SHAPES, 2048).values())
    plan = plan_rows(parts, [64] * 7, 2048)
    row_elems = 64 * sum(sum(pair) for pair in slice_shapes(parts))
    assert plan.num_pages * 2048 < 1.05 * row_elems
    assert plan.waste(parts) == pytest.approx(1 - row_elems / (plan.num_pages * 2048))


def test_pages_that_hold_nothing_useful_are_refused_with_advice() -> None:
    with pytest.raises(
        PageTooSmallError, match="holds 248 elements of an adapter and it takes 256; raise the KV-cache"
    ):
        layer_parts(DEMO_SHAPES, 248)


def test_pages_that_break_the_alignment_are_refused() -> None:
    parts = list(layer_parts(DEMO_SHAPES, 1024).values())
    for page_elems in (1020, 256):
        with pytest.raises(ValueError, match=f"pages of {page_elems} elements do not hold pieces of"):
            plan_rows(parts, [8] * 7, page_elems)
    plan = plan_rows(parts, [8] * 7, 1024)
    with pytest.raises(ValueError, match="multiples of 8"):
        plan.offsets(np.arange(plan.num_pages) * 1024 + 4)


@pytest.mark.parametrize("width", [6, 600])
def test_pack_puts_each_row_where_the_table_says(width: int) -> None:
    parts = list(layer_parts({"p": (width, (4, 10))}, 512).values())
    plan = plan_rows(parts, [3, 0], 512)
    a, b = torch.randn(3, width), torch.randn(3, 4)
    pages = torch.zeros(plan.num_pages, 512)
    pack(plan, parts, [(a, b), None], pages)
    table = plan.offsets(np.arange(plan.num_pages) * 512)
    for r in range(3):
        for piece, (begin, end) in enumerate(piece_spans(width, plan.piece_elems)):
            assert torch.equal(pages.view(-1)[table[0, 0, piece, r] :][: end - begin], a[r, begin:end])
        assert torch.equal(pages.view(-1)[table[0, 1, 0, r] :][:4], b[r])
    assert (table[1] == -1).all()
    with pytest.raises(ValueError, match="planned for 3 rows, got 2"):
        pack(plan, parts, [(a[:2], b), None], pages)


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


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 64, 200])
def test_tiles_cover_every_token_once_within_the_fixed_grid(num_tokens: int) -> None:
    rng = np.random.default_rng(num_tokens)
    spec = BatchSpec(max_tokens=256, max_adapters=40)
    adapters = make_layer([8] * 40, shapes={"p": (8, (8,))}, page_elems=256).adapters
    batch = LoraBatch(spec, "cpu")
    token_adapter = rng.integers(-1, 40, num_tokens)
    batch.update(token_adapter, adapters)
    meta, regions = batch.meta.numpy(), spec.regions()
    field = {name: meta[start : start + length] for name, (start, length) in regions.items()}
    for variant in VARIANTS:
        count = int(meta[variant.count_slot])
        assert count == batch.counts.tiles(variant) <= spec.num_tiles(num_tokens, variant.tile)
        tables, ranks, first, length = field[variant.name].reshape(-1, 4)[:count].T
        assert length.max(initial=0) <= variant.tile and set(ranks) <= {8}
        spans = zip(first, first + length, strict=True)
        covered = np.concatenate([field["tokens"][a:b] for a, b in spans]) if count else np.zeros(0)
        assert sorted(covered) == np.flatnonzero(token_adapter >= 0).tolist()
        owner = {adapter.offsets.data_ptr(): i for i, adapter in enumerate(adapters)}
        assert [owner[table] for table in tables] == [token_adapter[field["tokens"][a]] for a in first]
