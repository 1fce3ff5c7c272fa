"""Metadata of one engine step: which tokens belong to which adapter, in tensors that never move.

All of it lies in one int64 device tensor, so that one asynchronous copy brings a step's metadata to the device and a
captured CUDA graph, which replays the same kernels on the same addresses, sees the new contents. `update` runs outside
the graph, before the step, on the stream that runs the step.

Regions of the tensor (S = max_adapters, T = max_tokens; `BatchSpec.regions` gives the starts, csrc repeats them):
    counts    8     number of segments, small tiles, large tiles, tokens with an adapter, largest and smallest rank of
                    the step, both rounded up to a multiple of 8; the rest unused
    table     S     address of the segment's row-offset table (int64 [num_slices, 2, num_pieces, rank])
    rank      S     rank of the segment's adapter
    start     S     first position of the segment in `tokens`
    len       S     number of tokens of the segment
    tokens    T     token indices, grouped by segment; base-only tokens do not appear
    small     4 x   per tile of SMALL_TILE tokens of one segment, what a program begins with: the table's address, the
                    rank, the first position in `tokens`, the number of tokens
    large     4 x   the same with LARGE_TILE tokens
    locks           of the GPU kernels, zero between launches; not part of a step's copy
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from chameleon_kernels.launch import VARIANTS, StepCounts, num_locks, padded_rank
from chameleon_kernels.rows import AdapterRows

NUM_COUNTS = 8
_TILE_FIELDS = 4


@dataclass(frozen=True, slots=True)
class BatchSpec:
    """The fixed bounds of a step. `max_adapters`: distinct adapters in one step; `max_rank`: a sanity bound, it sizes
    scratch memory but costs no work.
    """

    max_tokens: int
    max_adapters: int
    max_rank: int = 256

    def __post_init__(self) -> None:
        if min(self.max_tokens, self.max_adapters, self.max_rank) < 1:
            raise ValueError(f"every bound of a batch must be at least 1, got {self}")

    def num_tiles(self, num_tokens: int, tile: int) -> int:
        """Upper bound of tiles that `num_tokens` tokens can need: a fixed grid for a CUDA graph of that size."""
        return min(num_tokens, -(-num_tokens // tile) + min(self.max_adapters, num_tokens))

    def regions(self) -> dict[str, tuple[int, int]]:
        """Region name -> (start, length) in the metadata tensor."""
        lengths = {"counts": NUM_COUNTS}
        lengths |= dict.fromkeys(("table", "rank", "start", "len"), self.max_adapters)
        lengths |= {"tokens": self.max_tokens}
        lengths |= {each.name: _TILE_FIELDS * self.num_tiles(self.max_tokens, each.tile) for each in VARIANTS}
        lengths |= {"locks": num_locks(self.max_rank)}
        regions, at = {}, 0
        for name, length in lengths.items():
            regions[name] = (at, length)
            at += length
        return regions


class LoraBatch:
    """The metadata of the current step. One object per engine, updated before each step; not thread-safe."""

    def __init__(self, spec: BatchSpec, device: torch.device | str) -> None:
        self.spec = spec
        self.num_segments = 0
        self.num_lora_tokens = 0
        self.num_tokens = 0
        self.end = 0  # One past the last element of a KV tensor that this step may read.
        self.adapters: tuple[AdapterRows, ...] = ()  # One per segment; keeps its table alive.
        self.counts = StepCounts(0, 0, 0, 0, 0)
        self.for_capture = False  # See `update_for_capture`.
        self._regions = spec.regions()
        size, num_locks = self._regions["locks"]
        self.meta = torch.zeros(size + num_locks, dtype=torch.int64, device=device)
        self._on_host = self.meta.device.type == "cpu"
        # Two staging buffers: the copy of the step before may still be queued when the next step is prepared.
        self._staging = [] if self._on_host else [_Staging(size) for _ in range(2)]
        self._spans: list[tuple[int, int]] = []
        self._previous: tuple[AdapterRows, ...] = ()  # The device may still run the step before.

    def update(self, token_adapter: Sequence[int] | np.ndarray, adapters: Sequence[AdapterRows]) -> None:
        """Describe the next step. `token_adapter[i]` indexes `adapters`, or is negative for a base-only token.

        Never waits for the device, save when two earlier updates are still in its queue. Raises ValueError, leaving
        the last step's description in place, if the step exceeds the bounds or an index has no adapter.
        """
        index = np.asarray(token_adapter, dtype=np.int64)
        if index.ndim != 1 or len(index) > self.spec.max_tokens:
            raise ValueError(f"one adapter index per token, at most {self.spec.max_tokens} tokens; got {index.shape}")
        order = np.argsort(index, kind="stable")
        tokens = order[np.searchsorted(index[order], 0) :]
        used, starts, lengths = np.unique(index[tokens], return_index=True, return_counts=True)
        if len(used) and used[-1] >= len(adapters):
            raise ValueError(f"token adapter index {used[-1]} but only {len(adapters)} adapters given")
        chosen = tuple(adapters[i] for i in used)
        self._check(chosen)
        if self._on_host:
            self.counts = self._fill(self.meta.numpy(), tokens, starts, lengths, chosen)
        else:
            staging = self._staging[0]
            self._staging.reverse()
            self.counts = self._fill(staging.acquire(), tokens, starts, lengths, chosen)
            staging.copy_to(self.meta)
        self.for_capture = False
        self._previous, self.adapters = self.adapters, chosen
        self._spans = list(zip(starts.tolist(), lengths.tolist(), strict=True))
        self.num_segments, self.num_lora_tokens, self.num_tokens = len(chosen), len(tokens), len(index)
        self.end = max((adapter.end for adapter in chosen), default=0)

    def update_for_capture(self, num_tokens: int) -> None:
        """Describe a step without adapters whose launches are those of any step of so many tokens, with adapters or
        without: what a CUDA graph is captured from. After `update` a step without adapters launches nothing."""
        self.update(np.full(num_tokens, -1), ())
        self.for_capture = True

    def reset(self) -> None:
        """Describe a step of no tokens, whatever `meta` holds now: its memory was lost, as in an engine's sleep."""
        self.meta.zero_()
        self.update((), ())

    def segments(self) -> Iterator[tuple[torch.Tensor, AdapterRows]]:
        """(token indices as a view into `meta`, adapter) of every adapter in the step."""
        at = self._regions["tokens"][0]
        for (start, length), adapter in zip(self._spans, self.adapters, strict=True):
            yield self.meta[at + start : at + start + length], adapter

    def _check(self, adapters: Sequence[AdapterRows]) -> None:
        if len(adapters) > self.spec.max_adapters:
            raise ValueError(f"{len(adapters)} adapters in one step, the batch was made for {self.spec.max_adapters}")
        for adapter in adapters:
            if adapter.rank > self.spec.max_rank:
                raise ValueError(f"adapter rank {adapter.rank} exceeds the configured bound of {self.spec.max_rank}")
            if adapter.offsets.device.type != self.meta.device.type:
                raise ValueError(f"adapter table on {adapter.offsets.device}, batch on {self.meta.device}")

    def _fill(
        self,
        meta: np.ndarray,
        tokens: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
        chosen: Sequence[AdapterRows],
    ) -> StepCounts:
        count = len(chosen)
        at = {name: start for name, (start, _) in self._regions.items()}
        tables = np.array([adapter.offsets.data_ptr() for adapter in chosen], dtype=np.int64)
        ranks = np.array([adapter.rank for adapter in chosen], dtype=np.int64)
        meta[at["table"] : at["table"] + count] = tables
        meta[at["rank"] : at["rank"] + count] = ranks
        meta[at["start"] : at["start"] + count] = starts
        meta[at["len"] : at["len"] + count] = lengths
        meta[at["tokens"] : at["tokens"] + len(tokens)] = tokens
        num_tiles = [
            _fill_tiles(meta[at[each.name] : at["locks"]], tables, ranks, starts, lengths, each.tile)
            for each in VARIANTS
        ]
        padded = [padded_rank(int(rank)) for rank in ranks] or [0]
        counts = StepCounts(*num_tiles, len(tokens), max(padded), min(padded))
        meta[:6] = (count, *num_tiles, counts.tokens, counts.max_rank, counts.min_rank)
        return counts


def _fill_tiles(
    region: np.ndarray, tables: np.ndarray, ranks: np.ndarray, starts: np.ndarray, lengths: np.ndarray, tile: int
) -> int:
    """Cut segments into tiles of at most `tile` tokens; returns how many."""
    per_segment = -(-lengths // tile)
    total = int(per_segment.sum())
    segment = np.repeat(np.arange(len(starts)), per_segment)
    done = tile * (np.arange(total) - np.repeat(np.cumsum(per_segment) - per_segment, per_segment))
    records = region[: _TILE_FIELDS * total].reshape(total, _TILE_FIELDS)
    records[:, 0] = tables[segment]
    records[:, 1] = ranks[segment]
    records[:, 2] = starts[segment] + done
    records[:, 3] = np.minimum(tile, lengths[segment] - done)
    return total


class _Staging:
    """A pinned host buffer with the event that says its last copy to the device is done."""

    def __init__(self, size: int) -> None:
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=True)
        self._copied = torch.cuda.Event()

    def acquire(self) -> np.ndarray:
        self._copied.synchronize()
        return self._host.numpy()

    def copy_to(self, meta: torch.Tensor) -> None:
        meta[: len(self._host)].copy_(self._host, non_blocking=True)
        self._copied.record()
