"""Where adapters lie on the GPU, as the scheduler books it: ``AdapterMemory`` decides who comes and goes, this counts
what is lent to whom."""

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from vllm.v1.core.block_pool import BlockPool

from chameleon_ray.adapters.checkpoint import AdapterShape
from chameleon_ray.engine.paged.checkpoint import AdapterSummary, measure, summarise
from chameleon_ray.engine.paged.messages import ModelLayout
from chameleon_ray.engine.paged.options import EngineLimits, PagedSettings
from chameleon_ray.engine.report import MemoryLimits
from chameleon_ray.policy.cache_types import CacheCorrupt
from chameleon_ray.policy.replica import ReplicaConfig


class Storage(Protocol):
    """Places for adapters, each a block with a number. An adapter takes as many as its ``AdapterSummary`` says."""

    def replica_config(self, settings: PagedSettings, limits: EngineLimits) -> ReplicaConfig:
        """The policy's configuration for this storage."""

    def limits(self, config: ReplicaConfig, num_ranks: int) -> MemoryLimits:
        """What adapters may take of it. num_ranks: workers, each of which has its share of every adapter."""

    def summarise(self, folder: Path, max_rank: int) -> AdapterSummary:
        """What the adapter in ``folder`` takes, from its files' headers; in any thread. Raises ValueError or OSError
        where it cannot be served."""

    def measure(self, shape: AdapterShape) -> AdapterSummary:
        """The same for an adapter of that shape whose modules are all the model's. Raises AdapterFilesError."""

    def take(self, num_blocks: int) -> tuple[int, ...]:
        """Numbers of free blocks, which are the caller's now. There must be so many."""

    def give_back(self, blocks: tuple[int, ...]) -> None:
        """Blocks that were taken are free again."""

    def check(self, taken: Collection[int]) -> None:
        """Raise CacheCorrupt unless exactly these blocks are taken."""


class PagedStorage:
    """Blocks of the KV cache, borrowed from vLLM's pool."""

    def __init__(self, layout: ModelLayout, pool: BlockPool) -> None:
        self.layout = layout
        self._pool = pool
        self._block_bytes = layout.num_layers * layout.page_elems * layout.pages_per_block * layout.element_bytes

    def replica_config(self, settings: PagedSettings, limits: EngineLimits) -> ReplicaConfig:
        return settings.replica_config(self.layout.num_blocks, self._block_bytes, limits)

    def limits(self, config: ReplicaConfig, num_ranks: int) -> MemoryLimits:
        cache, num_blocks = config.cache, self.layout.num_blocks - 1  # vLLM's null block is nobody's.
        return MemoryLimits(self._block_bytes * num_ranks, cache.max_blocks, num_blocks, cache.adapter_host_bytes)

    def summarise(self, folder: Path, max_rank: int) -> AdapterSummary:
        return summarise(folder, self.layout, max_rank)

    def measure(self, shape: AdapterShape) -> AdapterSummary:
        return measure(shape, self.layout)

    def take(self, num_blocks: int) -> tuple[int, ...]:
        return tuple(block.block_id for block in self._pool.get_new_blocks(num_blocks))

    def give_back(self, blocks: tuple[int, ...]) -> None:
        self._pool.free_blocks([self._pool.blocks[number] for number in blocks])

    def check(self, taken: Collection[int]) -> None:
        if len(set(taken)) < len(taken) or any(self._pool.blocks[number].ref_cnt != 1 for number in taken):
            raise CacheCorrupt("a borrowed block has two owners")
