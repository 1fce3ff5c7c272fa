"""A driver for adapter caches under test: a block pool and a host tier that only do what committed plans say."""

from chameleon_ray.policy.adapter import Adapter
from chameleon_ray.policy.cache import AdapterCache
from chameleon_ray.policy.cache_types import CacheConfig, Plan
from chameleon_ray.policy.records import QueuedRequest, State

BYTES_PER_BLOCK = 1000


class Driver:
    """Owns a pool of ``pool_blocks`` and carries plans out; every plan is followed by the cache's own check."""

    def __init__(
        self, pool_blocks: int, *, max_blocks: int | None = None, adapter_host_bytes: int = 10**9, **config
    ) -> None:
        max_blocks = pool_blocks if max_blocks is None else max_blocks
        self.cache = AdapterCache(CacheConfig(max_blocks=max_blocks, adapter_host_bytes=adapter_host_bytes, **config))
        self.pool_blocks = pool_blocks
        self.kv_blocks = 0
        self.num_blocks: dict[str, int] = {}
        self.owned: dict[str, int] = {}
        self.host: set[str] = set()
        self.reading: set[str] = set()
        self.requests: dict[str, QueuedRequest] = {}
        self.num_arrivals = 0

    @property
    def free_blocks(self) -> int:
        return self.pool_blocks - self.kv_blocks - sum(self.owned.values())

    @property
    def resident(self) -> set[str]:
        return {digest for digest in self.num_blocks if self.cache.state(digest) is State.RESIDENT}

    def add(self, **num_blocks: int) -> None:
        for digest, blocks in num_blocks.items():
            self.cache.add(Adapter(digest, rank=blocks, size_bytes=blocks * BYTES_PER_BLOCK), blocks)
            self.num_blocks[digest] = blocks

    def carry_out(self, plan: Plan, now_s: float) -> Plan:
        self.cache.commit(plan, now_s)
        for eviction in plan.evict:
            assert self.owned.pop(eviction.digest) == eviction.num_blocks
        self.host.difference_update(plan.drop)
        for digest in plan.load:
            assert digest in self.host and digest not in self.owned
            self.owned[digest] = self.num_blocks[digest]
        self.reading.update(plan.fetch)
        self.cache.check(self.owned)
        return plan

    def step(self, needed: str, now_s: float) -> Plan:
        """One plan, carried out, its loads still under way; ``needed`` is a string of digests, separated by spaces."""
        plan = self.carry_out(self.cache.plan(needed.split(), self.free_blocks, now_s), now_s)
        assert self.free_blocks >= 0
        return plan

    def finish(self) -> None:
        """Complete every fetch and load."""
        for digest in sorted(self.reading):
            self.cache.fetched(digest)
        self.host |= self.reading
        self.reading.clear()
        for digest in sorted(self.owned):
            if self.cache.state(digest) is State.LOADING:
                self.cache.loaded(digest)

    def host_copies(self, digests: str, now_s: float) -> None:
        """Bring the adapters into host memory."""
        for digest in digests.split():
            full_pool = self.carry_out(self.cache.plan([digest], 0, now_s), now_s)
            assert full_pool.fetch == (digest,)
            self.finish()

    def make_resident(self, digests: str, now_s: float) -> None:
        """Fetch and load the adapters."""
        self.host_copies(digests, now_s)
        for digest in digests.split():
            assert self.step(digest, now_s).load == (digest,)
            self.finish()

    # Requests, which in a replica the queues move

    def enqueue(self, request_id: str, digest: str, now_s: float) -> bool:
        """A request arrives; whether it hit."""
        entry = self.cache.entry(digest)
        request = QueuedRequest(request_id, 1, 1, entry.adapter, entry=entry, arrival=self.num_arrivals)
        self.num_arrivals += 1
        self.requests[request_id] = entry.queued[request_id] = request
        return self.cache.count_request(entry, now_s)

    def acquire(self, request_id: str, now_s: float) -> None:
        """A queued request starts to run on its adapter, which is resident."""
        entry = self.requests[request_id].entry
        entry.running[request_id] = entry.queued.pop(request_id)
        self.cache.use(entry, now_s)

    def requeue(self, request_id: str, now_s: float) -> None:
        """A running request waits again, as old as it is."""
        entry = self.requests[request_id].entry
        entry.queued[request_id] = entry.running.pop(request_id)
        entry.queued = dict(sorted(entry.queued.items(), key=lambda item: item[1].arrival))
        self.cache.use(entry, now_s)

    def release(self, request_id: str, now_s: float) -> None:
        """A request has ended, queued or running."""
        entry = self.requests.pop(request_id).entry
        if entry.queued.pop(request_id, None) is not None:
            self.cache.update(entry)
        else:
            del entry.running[request_id]
            self.cache.use(entry, now_s)

    def use(self, digest: str, now_s: float) -> None:
        """A whole life of a request on a resident adapter."""
        request_id = f"use-{digest}-{now_s}"
        self.enqueue(request_id, digest, now_s)
        self.acquire(request_id, now_s)
        self.release(request_id, now_s)


def victims(plan: Plan) -> list[str]:
    return [eviction.digest for eviction in plan.evict]
