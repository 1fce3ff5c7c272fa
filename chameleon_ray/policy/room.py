"""A replica's GPU memory as its queues see it: whether a request's adapter lets it run, and when it would."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from chameleon_ray.policy.admission import Admission
from chameleon_ray.policy.cache import AdapterCache
from chameleon_ray.policy.records import QueuedRequest, State


class BlockPool(Protocol):
    """What the policy asks of the driver's KV-block pool. Questions: they change nothing."""

    def free_blocks(self) -> int:
        """Blocks that nobody holds, be it KV cache or (where they share the pool) an adapter."""

    def kv_blocks(self, request_id: str) -> int:
        """Blocks that a running request's KV cache holds, and would give back by ending."""


@dataclass(slots=True)
class Room:
    """The blocks of adapters and KV cache together; questions change nothing.

    block_tokens, shares_kv: see ``ReplicaConfig``. blocked: digest of the adapter that the latest plan had no room for.
    """

    cache: AdapterCache
    pool: BlockPool
    block_tokens: int
    shares_kv: bool
    blocked: str | None = None

    @property
    def pinned_blocks(self) -> int:
        """Blocks of adapters that running requests use or that are being loaded: they cannot be given back."""
        return self.cache.blocks_held - self.cache.idle_blocks

    def free_adapter_blocks(self, reserved_blocks: int = 0) -> int:
        """Blocks that nobody holds and that an adapter may be loaded into, ``reserved_blocks`` of the KV cache left."""
        if self.shares_kv:
            return max(0, self.pool.free_blocks() - reserved_blocks)
        return self.cache.config.max_blocks - self.cache.blocks_held

    def admission(self, request: QueuedRequest) -> Admission:
        """Whether the request's adapter lets it run now."""
        entry = request.entry
        if entry is None or entry.state is State.RESIDENT:
            return Admission.READY
        if entry.state in (State.FETCHING, State.LOADING):
            return Admission.LOADING
        if entry.digest == self.blocked:
            return Admission.NO_ROOM
        share = self.cache.config.max_blocks - self.pinned_blocks
        if entry.num_blocks <= min(self.free_adapter_blocks() + self.cache.idle_blocks, share):
            return Admission.FITS
        # Without a host copy there is nothing that room could be used for yet; the cache fetches for whoever waits.
        return Admission.NO_ROOM if entry.state is State.HOST else Admission.LOADING

    def ends_needed(self, request: QueuedRequest, leaving: Sequence[QueuedRequest]) -> int | None:
        """How many of the running requests ``leaving`` must be gone, in that order, for the request to have room.

        Room for its adapter and prompt, idle adapters evicted. None where not even all of them suffice.
        """
        own = request.entry
        prompt_blocks = -(-request.num_prompt_tokens // self.block_tokens)
        free = self.pool.free_blocks() + (self.cache.idle_blocks if self.shares_kv else 0)
        share = self.cache.config.max_blocks - self.pinned_blocks
        users: dict[str, int] = {}
        for count in range(len(leaving) + 1):
            if count:
                ended = leaving[count - 1]
                free += self.pool.kv_blocks(ended.request_id)
                if (entry := ended.entry) is not None:
                    users[entry.digest] = users.get(entry.digest, len(entry.running)) - 1
                    if not users[entry.digest]:
                        free += entry.num_blocks if self.shares_kv else 0
                        share += entry.num_blocks
            adapter_blocks = 0
            if own is not None and own.state is not State.LOADING and not users.get(own.digest, len(own.running)):
                adapter_blocks = own.num_blocks
            if adapter_blocks <= share and prompt_blocks + (adapter_blocks if self.shares_kv else 0) <= free:
                return count
        return None
