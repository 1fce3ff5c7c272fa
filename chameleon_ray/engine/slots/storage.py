"""vLLM's slots as the scheduler books them: an adapter takes one, whatever its rank, and none of the KV cache."""

from collections.abc import Collection
from pathlib import Path

from chameleon_ray.adapters.checkpoint import AdapterShape
from chameleon_ray.engine.paged.checkpoint import AdapterFilesError, AdapterSummary, read_fitting
from chameleon_ray.engine.paged.options import EngineLimits, PagedSettings
from chameleon_ray.engine.report import MemoryLimits
from chameleon_ray.engine.slots.messages import SlotLayout
from chameleon_ray.engine.slots_loading import check_experts
from chameleon_ray.policy.cache_types import CacheCorrupt
from chameleon_ray.policy.replica import ReplicaConfig


class SlotStorage:
    """One block is one slot; see ``engine.paged.storage.Storage``."""

    def __init__(self, layout: SlotLayout, num_kv_tokens: int) -> None:
        """num_kv_tokens: tokens that the KV cache holds."""
        self.layout = layout
        self._num_kv_tokens = num_kv_tokens
        self._free = list(range(layout.num_slots))

    def replica_config(self, settings: PagedSettings, limits: EngineLimits) -> ReplicaConfig:
        return settings.slots_config(self.layout.num_slots, self._num_kv_tokens, limits)

    def limits(self, config: ReplicaConfig, num_ranks: int) -> MemoryLimits:
        num_slots = self.layout.num_slots
        block_bytes = self.layout.slot_bytes * num_ranks
        return MemoryLimits(block_bytes, num_slots, num_slots, config.cache.adapter_host_bytes, shares_kv=False)

    def summarise(self, folder: Path, max_rank: int) -> AdapterSummary:
        return self.measure(read_fitting(folder, self.layout.table, max_rank).shape)

    def measure(self, shape: AdapterShape) -> AdapterSummary:
        try:
            check_experts(shape, self.layout.experts)
        except ValueError as error:
            raise AdapterFilesError(str(error)) from None
        table, num_elems = self.layout.table, 0
        for name, rank in shape:
            module = table.modules[table.find(name)]
            num_elems += rank * (module.in_features + module.out_features)
        return AdapterSummary(max(rank for _, rank in shape), (), 1, num_elems * self.layout.element_bytes)

    def take(self, num_blocks: int) -> tuple[int, ...]:
        taken, self._free = tuple(self._free[:num_blocks]), self._free[num_blocks:]
        assert len(taken) == num_blocks, f"{num_blocks} slots were wanted, {len(taken)} were free"
        return taken

    def give_back(self, blocks: tuple[int, ...]) -> None:
        self._free += blocks

    def check(self, taken: Collection[int]) -> None:
        if sorted([*taken, *self._free]) != list(range(self.layout.num_slots)):
            raise CacheCorrupt(f"slots {sorted(taken)} are taken, {sorted(self._free)} are free")
