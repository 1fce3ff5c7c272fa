"""The GPU launch plan, for an H100's 132 processors: enough programs with work, no more than there is work."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from chameleon_kernels.launch import (
    LARGE,
    SMALL,
    SMALL_STEP_TOKENS,
    StepCounts,
    Variant,
    choose_variant,
    count_tiles,
    num_splits,
    padded_rank,
    plan_launches,
)
from chameleon_kernels.layout import Part, layer_parts

PROCESSORS = 132
LLAMA_8B = {
    "qkv_proj": (4096, (4096, 1024, 1024)),
    "o_proj": (4096, (4096,)),
    "gate_up_proj": (4096, (14336, 14336)),
    "down_proj": (14336, (4096,)),
}
LLAMA_70B_TP8 = {
    "qkv_proj": (8192, (1024, 128, 128)),
    "o_proj": (1024, (8192,)),
    "gate_up_proj": (8192, (3584, 3584)),
    "down_proj": (3584, (8192,)),
}
PARTS = [
    pytest.param(part, id=f"{model}-{name}")
    for model, shapes, page in (("8b", LLAMA_8B, 32768), ("70b-tp8", LLAMA_70B_TP8, 4096))
    for name, part in layer_parts(shapes, page).items()
]
TOKENS = (1, 2, 7, 16, 17, 64, 100, 257, 512, 513, 1024, 2048, 4096, 8192)
ADAPTERS = (1, 2, 8, 64)
DOCS = Path(__file__).parents[2] / "docs/adapter_cache.md"


def segments(num_tokens: int, num_adapters: int) -> list[int]:
    """Tokens of each adapter, as even as may be."""
    used = min(num_tokens, num_adapters)
    return [num_tokens // used + (i < num_tokens % used) for i in range(used)]


def counts_of(lengths: Sequence[int], ranks: Sequence[int]) -> StepCounts:
    padded = [padded_rank(rank) for rank in ranks]
    tiles = (count_tiles(lengths, each.tile) for each in (SMALL, LARGE))
    return StepCounts(*tiles, sum(lengths), max(padded), min(padded))


def busy_shrink_programs(part: Part, variant: Variant, lengths: Sequence[int], ranks: Sequence[int], grid: int) -> int:
    """Programs with work, item by item as the kernel takes them."""
    counts = counts_of(lengths, ranks)
    tiles = [
        rank for length, rank in zip(lengths, ranks, strict=True) for _ in range(count_tiles([length], variant.tile))
    ]
    splits = num_splits(variant, len(tiles), part.num_slices, counts.min_rank, part.in_features, PROCESSORS)
    blocks = -(-part.num_slices * counts.max_rank // variant.rows)
    items = (
        (tile * blocks + block) * splits + split
        for tile, rank in enumerate(tiles)
        for block in range(-(-part.num_slices * padded_rank(rank) // variant.rows))
        for split in range(splits)
    )
    return len({item % grid for item in items})


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("num_adapters", ADAPTERS)
@pytest.mark.parametrize("ranks", [(16,), (8, 256)], ids=str)
def test_every_processor_has_work_or_the_shape_allows_no_more(
    part: Part, num_adapters: int, ranks: Sequence[int]
) -> None:
    for num_tokens in TOKENS:
        lengths = segments(num_tokens, num_adapters)
        of_each = [ranks[i % len(ranks)] for i in range(len(lengths))]
        variant = choose_variant(num_tokens)
        tiles = count_tiles(lengths, variant.tile)
        most_shrink = tiles * -(-part.in_features // variant.block_k)
        most_expand = tiles * sum(-(-width // variant.columns) for width in part.slice_widths)
        for counts in (counts_of(lengths, of_each), None):
            [launch] = plan_launches(part, num_tokens, tiles, 256, PROCESSORS, counts)
            busy = busy_shrink_programs(part, variant, lengths, of_each, launch.shrink_programs)
            assert busy >= min(PROCESSORS, most_shrink), (num_tokens, counts)
            assert min(launch.expand_programs, most_expand) >= min(PROCESSORS, most_expand), (num_tokens, counts)


def test_a_step_launches_what_it_needs_and_a_captured_one_what_any_step_needs() -> None:
    """One token of rank 16 among 64: 32 shares of 4096 columns, and 32 blocks of the output's columns."""
    part = layer_parts(LLAMA_8B, 32768)["o_proj"]
    [exact] = plan_launches(part, 64, 64, 256, PROCESSORS, counts_of([1], [16]))
    assert (exact.shrink_programs, exact.expand_programs, exact.hidden_elems) == (32, 32, 33 * 16)
    [captured] = plan_launches(part, 64, 64, 256, PROCESSORS)
    assert captured.shrink_programs == captured.expand_programs == 4 * PROCESSORS
    for lengths in ([1], [64], [1] * 64, [20, 3, 9]):
        [launch] = plan_launches(part, 64, 64, 256, PROCESSORS, counts_of(lengths, [256] * len(lengths)))
        assert launch.hidden_elems <= captured.hidden_elems


def test_tiles_are_large_from_prefill_on_only() -> None:
    assert choose_variant(SMALL_STEP_TOKENS) is SMALL
    assert choose_variant(SMALL_STEP_TOKENS + 1) is LARGE


def test_many_slices_take_several_launches() -> None:
    part = layer_parts({"five": (64, (3, 20, 9, 11, 130))}, 2048)["five"]
    launches = list(plan_launches(part, 4, 4, 16, PROCESSORS))
    assert [(launch.first_slice, launch.widths, launch.out_start) for launch in launches] == [
        (0, (3, 20, 9, 11), 0),
        (4, (130,), 43),
    ]


def table() -> str:
    """Programs with work of shrink / expand, of Llama 3.1 8B at rank 16."""
    parts = layer_parts(LLAMA_8B, 32768)
    rows = ["| Tokens, adapters | " + " | ".join(parts) + " |", "| --- |" + " ---: |" * len(parts)]
    for num_tokens, num_adapters in ((1, 1), (64, 1), (64, 64), (512, 8), (1024, 1), (2048, 64), (8192, 8)):
        cells = []
        for part in parts.values():
            lengths = segments(num_tokens, num_adapters)
            ranks = [16] * len(lengths)
            [launch] = plan_launches(part, num_tokens, 0, 256, PROCESSORS, counts_of(lengths, ranks))
            variant = choose_variant(num_tokens)
            busy = busy_shrink_programs(part, variant, lengths, ranks, launch.shrink_programs)
            cells.append(f"{busy} / {launch.expand_programs}")
        rows.append(f"| {num_tokens}, {num_adapters} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def test_the_documented_table_is_the_plans() -> None:
    assert table() in DOCS.read_text(), f"put this into {DOCS.name}:\n{table()}"
