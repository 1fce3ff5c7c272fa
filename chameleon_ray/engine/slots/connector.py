"""The wire between the scheduler's ``AdapterMemory`` and the workers' ``SlotHost``: ``engine.paged``'s, for slots."""

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig

from chameleon_ray.engine.paged.connector import PagedConnector
from chameleon_ray.engine.slots.messages import SlotLayout
from chameleon_ray.engine.slots.storage import SlotStorage


class SlotsConnector(PagedConnector):
    """Of the KV cache it needs to know its size only: layers may have tables of their own, and any layout."""

    def check_groups(self, kv_cache_config: KVCacheConfig) -> None:
        self._num_groups = len(kv_cache_config.kv_cache_groups)

    def make_storage(self, layout: KVConnectorHandshakeMetadata) -> SlotStorage:
        assert isinstance(layout, SlotLayout)
        # Groups of layers take blocks of one pool for the same tokens.
        num_tokens = self._pool.num_gpu_blocks // self._num_groups * self._limits.block_size
        return SlotStorage(layout, num_tokens)
