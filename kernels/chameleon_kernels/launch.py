"""How the GPU kernels cut one part's work into programs: pure arithmetic on sizes, no torch, no Triton.

Shrink (x @ A.T): an item is a tile of tokens of one adapter, a block of its stacked A rows (the rows of a part's slices
side by side, so that q, k and v read x once), and a share of the input columns (a split). Expand (h @ B): an item is a
tile and a block of output columns of one slice. Programs take items in turns, so grids stay small whatever the step.

The splits are chosen by tiles: as many as give every processor of the GPU an item, whether the tiles are those of one
token or of a prompt. The last split of a tile that arrives adds all of them up, in a fixed order, so that results
repeat bit by bit and expand reads one h.

What depends on the step is on the host (`StepCounts`) and, the same numbers, in the metadata on the device: a captured
CUDA graph has a grid for the largest step of its number of tokens, any other launch has exactly the programs it needs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from chameleon_kernels.layout import ALIGNED_ELEMS, Part

SMALL_TILE = 16
LARGE_TILE = 64
SMALL_STEP_TOKENS = 512
"""Up to here a step is in small tiles: decode, short prompts, whatever vLLM captures in CUDA graphs."""
MAX_SLICES_PER_LAUNCH = 4
MAX_PROCESSORS = 256
"""Of a GPU, for which splits are made; a larger one would leave some idle in small steps."""
_PROGRAMS_PER_PROCESSOR = 8
_CAPTURED_PROGRAMS_PER_PROCESSOR = 4  # Most find nothing to do in a small step.


@dataclass(frozen=True, slots=True)
class Variant:
    """What is compiled into the kernels. count_slot: where the metadata has the number of tiles. single: tiles of one
    token have a path of their own."""

    name: str
    count_slot: int
    tile: int  # tokens
    rows: int  # stacked A rows of a shrink item
    block_k: int  # input columns of a step of shrink
    expand_rows: int  # rank rows of a step of expand
    columns: int  # output columns of an expand item
    num_warps: int
    shrink_stages: int  # loads of weights under way at once; more would not fit the registers
    single: bool


SMALL = Variant(
    "small", 1, SMALL_TILE, rows=32, block_k=128, expand_rows=16, columns=128, num_warps=4, shrink_stages=2, single=True
)
LARGE = Variant(
    "large", 2, LARGE_TILE, rows=64, block_k=64, expand_rows=32, columns=128, num_warps=8, shrink_stages=3, single=False
)
VARIANTS = (SMALL, LARGE)


@dataclass(frozen=True, slots=True)
class StepCounts:
    """Of one step. small_tiles, large_tiles: of all adapters; tokens: that have an adapter; max_rank, min_rank: of the
    step's adapters, rounded up to a multiple of 8."""

    small_tiles: int
    large_tiles: int
    tokens: int
    max_rank: int
    min_rank: int

    def tiles(self, variant: Variant) -> int:
        return self.small_tiles if variant is SMALL else self.large_tiles


@dataclass(frozen=True, slots=True)
class Launch:
    """One shrink and one expand of up to four slices. hidden_elems: float32 numbers of scratch."""

    variant: Variant
    first_slice: int
    widths: tuple[int, ...]
    out_start: int
    shrink_programs: int
    expand_programs: int
    hidden_elems: int


def padded_rank(rank: int) -> int:
    """Rows that an adapter's slice takes of h: so many that every slice begins aligned."""
    return -(-rank // ALIGNED_ELEMS) * ALIGNED_ELEMS


def choose_variant(num_tokens: int) -> Variant:
    """By the rows of x alone: what is captured must not depend on the step."""
    return SMALL if num_tokens <= SMALL_STEP_TOKENS else LARGE


def num_splits(
    variant: Variant, num_tiles: int, num_slices: int, min_rank: int, in_features: int, num_processors: int
) -> int:
    """Shares of the input columns: enough for an item per processor, whatever the adapters' ranks. The kernel repeats
    this formula."""
    blocks = max(1, num_tiles * _cdiv(num_slices * min_rank, variant.rows))
    return min(_cdiv(in_features, variant.block_k), _cdiv(num_processors, blocks))


def plan_launches(
    part: Part,
    num_tokens: int,
    max_tiles: int,
    max_rank: int,
    num_processors: int,
    counts: StepCounts | None = None,
) -> Iterator[Launch]:
    """The launches of one part for `num_tokens` rows of x.

    counts: of this step, for exact grids; None: a grid and scratch for every step of so many tokens, of at most
    `max_tiles` tiles and ranks up to `max_rank`.
    """
    variant = choose_variant(num_tokens)
    out_start = 0
    for first in range(0, part.num_slices, MAX_SLICES_PER_LAUNCH):
        widths = part.slice_widths[first : first + MAX_SLICES_PER_LAUNCH]
        columns = sum(_cdiv(width, variant.columns) for width in widths)
        if counts is None:
            rank = padded_rank(max_rank)
            limit = _CAPTURED_PROGRAMS_PER_PROCESSOR * num_processors
            k_blocks = _cdiv(part.in_features, variant.block_k)
            # tiles * splits: at most an item per processor and one more round.
            shrink = min(max_tiles * k_blocks, num_processors + max_tiles) * _cdiv(len(widths) * rank, variant.rows)
            expand = max_tiles * columns
            # Rows of h, and of the splits: tokens * splits, with at least tokens / tile tiles.
            split_rows = min(k_blocks * num_tokens, variant.tile * num_processors + num_tokens)
            hidden_rows = num_tokens + split_rows
        else:
            rank, tiles = counts.max_rank, counts.tiles(variant)
            limit = _PROGRAMS_PER_PROCESSOR * num_processors
            splits = num_splits(variant, tiles, len(widths), counts.min_rank, part.in_features, num_processors)
            shrink = tiles * _cdiv(len(widths) * rank, variant.rows) * splits
            expand = tiles * columns
            hidden_rows = counts.tokens * (1 if splits == 1 else 1 + splits)
        yield Launch(
            variant,
            part.first_slice + first,
            widths,
            out_start,
            min(shrink, limit),
            min(expand, limit),
            hidden_rows * len(widths) * rank,
        )
        out_start += sum(widths)


def num_locks(max_rank: int) -> int:
    """Counters of arrived splits that a launch may need: a tile is split only while tiles are fewer than processors."""
    return MAX_PROCESSORS * _cdiv(MAX_SLICES_PER_LAUNCH * padded_rank(max_rank), min(each.rows for each in VARIANTS))


def count_tiles(segment_lengths: Sequence[int], tile: int) -> int:
    """Tiles of segments of so many tokens."""
    return sum(_cdiv(length, tile) for length in segment_lengths)


def _cdiv(number: int, divisor: int) -> int:
    return -(-number // divisor)
