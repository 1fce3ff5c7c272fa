"""One replica's whole policy, adapter cache and queues composed: the one object that engine and simulator drive.

A driver owns the blocks and the clock; this decides. The life of a step:

1. ``squashes``: stop these and ``requeue(..., squashed=True)``.
2. ``begin_step``, then ``peek`` a request whose adapter is resident, and ``admit`` it or ``pass_over`` it, until
   ``peek`` gives None or the driver has no capacity left. Requests without their adapter never show: this notes whose
   adapters are needed.
3. ``end_step``: carry out the plan it returns (evict, drop, load, fetch; in that order) beside the running batch.

Between steps: ``arrive``, ``finish``, ``remove``, ``requeue``; ``make_room`` wherever KV memory is
short; ``fetched``, ``fetch_failed``, ``loaded``, ``load_failed`` as the ordered work ends. All times are seconds on one
clock of the driver. Misuse raises (``QueueError``, ``CacheError``, ``AdapterFailed``) and changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from chameleon_ray.policy.adapter import Adapter, Tier
from chameleon_ray.policy.admission import Admission, Admitted, Obstacle, QueuesState
from chameleon_ray.policy.cache import AdapterCache
from chameleon_ray.policy.cache_types import CacheConfig, CacheStats, Plan
from chameleon_ray.policy.disciplines import QueueOptions
from chameleon_ray.policy.queues import QueueError, RequestQueues
from chameleon_ray.policy.residency import State
from chameleon_ray.policy.sizing import QueuedRequest

IDLE_PLAN_INTERVAL_S = 0.05
"""How often to plan while nothing has happened: only loads ahead of time are at stake."""
_NOTHING = Plan(version=-1)


class AdapterFailed(Exception):
    """The request's adapter could not be fetched or loaded a moment ago: refuse the request. retry_at_s: see
    ``Failure``."""

    def __init__(self, reason: str, retry_at_s: float | None) -> None:
        super().__init__(reason)
        self.retry_at_s = retry_at_s


class BlockPool(Protocol):
    """What the policy asks of the driver's KV-block pool. Questions: they change nothing."""

    def free_blocks(self) -> int:
        """Blocks that nobody holds, be it KV cache or (where they share the pool) an adapter."""

    def kv_blocks(self, request_id: str) -> int:
        """Blocks that a running request's KV cache holds, and would give back by ending."""


@dataclass(frozen=True, slots=True)
class ReplicaConfig:
    """cache, queues: what an operator decides about each. scheduler: a name in ``DISCIPLINES``. block_tokens: tokens
    of KV cache in one block.

    shares_kv: adapters lie in blocks of the KV cache, and give them back to it. Else they have ``cache.max_blocks``
    blocks of their own (vLLM's slots: one block an adapter), and KV cache and adapters never make room for each other.
    """

    cache: CacheConfig
    queues: QueueOptions
    scheduler: str = "chameleon"
    block_tokens: int = 16
    shares_kv: bool = True

    def __post_init__(self) -> None:
        if self.block_tokens < 1:
            raise ValueError(f"block_tokens is {self.block_tokens}: give the tokens of one KV block")


@dataclass(frozen=True, slots=True)
class ReplicaSnapshot:
    """What holds now, for metrics and for placement. failures: digest -> why its requests are refused."""

    cache: CacheStats
    queues: QueuesState
    tiers: dict[str, Tier]
    failures: dict[str, str]


class ReplicaPolicy:
    """Which requests run and which adapters are resident. See the module's head for its use."""

    def __init__(self, config: ReplicaConfig, pool: BlockPool) -> None:
        self.config = config
        self.cache = AdapterCache(config.cache)
        """For questions; change it through this object."""
        self.queues = RequestQueues(config.scheduler, config.queues, self)
        """For questions; change it through this object."""
        self._pool = pool
        self._needed: dict[str, None] = {}
        self._blocked: str | None = None
        self._changed = False
        self._planned_at_s = float("-inf")
        # Of the latest step: whether anybody was admitted, postponed or evicted, and whether all were offered in vain.
        self._has_moved = self._in_vain = False

    # Adapters

    def add_adapter(self, adapter: Adapter, num_blocks: int, *, on_disk: bool = True) -> None:
        """See ``AdapterCache.add``."""
        self.cache.add(adapter, num_blocks, on_disk=on_disk)

    def retire_adapter(self, digest: str) -> None:
        """See ``AdapterCache.retire``; ``end_step`` plans for it to leave."""
        self.cache.retire(digest)
        self._changed = True

    def fetched(self, digest: str) -> None:
        """A fetch has ended well: the host copy is complete."""
        self.cache.fetched(digest)
        self.queues.adapter_moved(digest)
        self._changed = True

    def fetch_failed(self, digest: str, reason: str, now_s: float, *, is_permanent: bool = False) -> tuple[str, ...]:
        """A fetch has failed. Returns the requests that wait for it: end them with an error and ``remove`` them."""
        self.cache.fetch_failed(digest, reason, now_s, is_permanent=is_permanent)
        return self._refused(digest)

    def loaded(self, digest: str) -> None:
        """A load has ended well: the adapter is resident."""
        self.cache.loaded(digest)
        self.queues.adapter_moved(digest)
        self._changed = True

    def load_failed(self, digest: str, reason: str, now_s: float, *, is_permanent: bool = False) -> tuple[str, ...]:
        """A load has failed: give back its blocks and its host copy. Returns requests to end, as ``fetch_failed``."""
        self.cache.load_failed(digest, reason, now_s, is_permanent=is_permanent)
        return self._refused(digest)

    # Requests

    def arrive(self, request: QueuedRequest, now_s: float) -> bool:
        """A request arrives. Returns whether its adapter is resident (base model: always).

        Raises AdapterFailed, UnknownAdapter, or QueueError for an id in use.
        """
        if request.request_id in self.queues:
            raise QueueError(f"request {request.request_id} is queued or running already: use another id")
        digest = request.adapter.digest if request.adapter else None
        if digest is not None and (failure := self.cache.failure(digest, now_s)) is not None:
            raise AdapterFailed(failure.reason, failure.retry_at_s)
        hit = digest is None or self.cache.enqueue(request.request_id, digest, now_s)
        self.queues.add(request, now_s)
        self._changed = True
        return hit

    def finish(self, request_id: str, now_s: float, num_output_tokens: int) -> None:
        """A running request ended by itself. Raises QueueError."""
        adapter = self._adapter_of(request_id)
        self.queues.finish(request_id, now_s, num_output_tokens)
        self._let_go(request_id, adapter, now_s)

    def remove(self, request_id: str, now_s: float) -> None:
        """A request was aborted or failed, waiting or running. Raises QueueError."""
        adapter = self._adapter_of(request_id)
        self.queues.remove(request_id)
        self._let_go(request_id, adapter, now_s)

    def requeue(self, request_id: str, now_s: float, *, squashed: bool = False) -> None:
        """A running request was preempted or squashed, its KV blocks are free: it waits at its old place."""
        self.queues.requeue(request_id, now_s, squashed)
        if self._adapter_of(request_id) is not None:
            self.cache.requeue(request_id, now_s)
        self._changed = True

    # A step

    def squashes(self) -> tuple[str, ...]:
        """Running requests to stop and ``requeue(..., squashed=True)`` before the step begins."""
        return self.queues.squashes()

    def begin_step(self, now_s: float) -> None:
        """Start a step; whatever step was under way is over."""
        self._needed.clear()
        self._has_moved = self._in_vain = False
        self.queues.begin_step(now_s)

    def peek(self) -> QueuedRequest | None:
        """The next request that may run as far as adapter, quota and order go; the same until it is decided upon."""
        while (request := self.queues.peek()) is not None:
            if request.adapter is None:
                return request
            # Resident ones as well: else the adapter of a request that waits for KV memory would leave for one that
            # is needed after it, and come back, and so on.
            self._needed[request.adapter.digest] = None
            if self.cache.state(request.adapter.digest) is State.RESIDENT:
                return request
            self.queues.pass_over(request.request_id, Obstacle.LOADING)
        self._in_vain = not self._has_moved
        return None

    def admit(self, request_id: str, now_s: float) -> Admitted:
        """The candidate runs; the driver gives it KV blocks. Raises QueueError for any other request."""
        admitted = self.queues.admit(request_id)
        if self._adapter_of(request_id) is not None:
            self.cache.acquire(request_id, now_s)
        self._changed = self._has_moved = True
        return admitted

    def pass_over(self, request_id: str, obstacle: Obstacle) -> None:
        """The candidate cannot run in this step for the driver's reasons (NO_MEMORY, NOT_READY)."""
        self.queues.pass_over(request_id, obstacle)
        self._has_moved |= obstacle is Obstacle.NOT_READY

    def end_step(self, now_s: float, reserved_blocks: int = 0) -> Plan:
        """What to do about adapters now, committed already: carry it out.

        reserved_blocks: free KV blocks that the running batch is about to need; no adapter is loaded into them.
        """
        if not (self._changed or self._needed or now_s >= self._planned_at_s + IDLE_PLAN_INTERVAL_S):
            return _NOTHING
        if not self._needed and self._blocked is None and self.cache.settled:
            self._changed, self._planned_at_s = False, now_s
            return _NOTHING
        if self._blocked is not None and self.cache.knows(self._blocked):
            self._needed[self._blocked] = None
        plan = self.cache.plan(self._needed, self.free_adapter_blocks(reserved_blocks), now_s)
        self._commit(plan, now_s)
        self._blocked, self._changed, self._planned_at_s = plan.blocked, False, now_s
        return plan

    def quiet_until_s(self) -> float:
        """Until when steps would decide nothing, provided that nothing happens before; in the past: they might.

        What happens is any call of this object's that changes something, and blocks that become free otherwise.
        Nothing is decided while nobody waits, nor while those that wait were offered in vain: whoever has the adapter
        waits for quota, a seat or KV memory, the others for loads under way, and all of these end with a call. Where
        many wait, a step may find what the one before had no time for.
        """
        in_vain = self._in_vain and self.num_running and self.num_waiting and self.queues.each_step_sees_all
        quiet = not self._changed and self._blocked is None and self.cache.settled and (self.queues.settled or in_vain)
        return self.queues.refresh_at_s if quiet else float("-inf")

    def make_room(self, num_blocks: int, now_s: float, *, for_request: str = "", or_nothing: bool = False) -> Plan:
        """Evictions, committed, that give ``num_blocks`` to the KV cache, or as many as idle adapters hold.

        for_request: whose own adapter stays. or_nothing: evict nobody where it is not enough. Nobody is evicted where
        adapters have blocks of their own.
        """
        if not self.config.shares_kv:
            return _NOTHING
        adapter = self._adapter_of(for_request) if for_request in self.queues else None
        keep = () if adapter is None else (adapter.digest,)
        if or_nothing and self.idle_blocks < num_blocks:
            return _NOTHING
        plan = self.cache.reclaim(num_blocks, now_s, keep)
        if or_nothing and plan.freed_blocks < num_blocks:
            return _NOTHING
        self._commit(plan, now_s)
        return plan

    def evict_idle(self, now_s: float) -> Plan:
        """Evictions, committed, of every adapter that no running request uses."""
        plan = self.cache.reclaim(self.config.cache.max_blocks, now_s)
        self._commit(plan, now_s)
        self._changed = True
        return plan

    # What the queues ask (``AdapterRoom``)

    def admission(self, request: QueuedRequest) -> Admission:
        """Whether the request's adapter lets it run now."""
        if request.adapter is None:
            return Admission.READY
        entry = self.cache.entry(request.adapter.digest)
        if entry.state is State.RESIDENT:
            return Admission.READY
        if entry.state in (State.FETCHING, State.LOADING):
            return Admission.LOADING
        if entry.digest == self._blocked:
            return Admission.NO_ROOM
        share = self.config.cache.max_blocks - self.pinned_blocks
        if entry.num_blocks <= min(self.free_adapter_blocks() + self.idle_blocks, share):
            return Admission.FITS
        # Without a host copy there is nothing that room could be used for yet; the cache fetches for whoever waits.
        return Admission.NO_ROOM if entry.state is State.HOST else Admission.LOADING

    def ends_needed(self, request: QueuedRequest, leaving: Sequence[str]) -> int | None:
        """See ``AdapterRoom``: room for the request's adapter and prompt, idle adapters evicted."""
        own = self.cache.entry(request.adapter.digest) if request.adapter is not None else None
        prompt_blocks = -(-request.num_prompt_tokens // self.config.block_tokens)
        shares_kv = self.config.shares_kv
        free = self._pool.free_blocks() + (self.idle_blocks if shares_kv else 0)
        share = self.config.cache.max_blocks - self.pinned_blocks
        users: dict[str, int] = {}
        for count in range(len(leaving) + 1):
            if count:
                request_id = leaving[count - 1]
                free += self._pool.kv_blocks(request_id)
                if (adapter := self._adapter_of(request_id)) is not None:
                    entry = self.cache.entry(adapter.digest)
                    users[entry.digest] = users.get(entry.digest, len(entry.running)) - 1
                    if not users[entry.digest]:
                        free += entry.num_blocks if shares_kv else 0
                        share += entry.num_blocks
            adapter_blocks = 0
            if own is not None and own.state is not State.LOADING and not users.get(own.digest, len(own.running)):
                adapter_blocks = own.num_blocks
            if adapter_blocks <= share and prompt_blocks + (adapter_blocks if shares_kv else 0) <= free:
                return count
        return None

    # State

    def free_adapter_blocks(self, reserved_blocks: int = 0) -> int:
        """Blocks that nobody holds and that an adapter may be loaded into, ``reserved_blocks`` of the KV cache left."""
        if self.config.shares_kv:
            return max(0, self._pool.free_blocks() - reserved_blocks)
        return self.config.cache.max_blocks - self.cache.blocks_held

    @property
    def num_running(self) -> int:
        """Requests admitted and not ended."""
        return self.queues.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that wait, for whatever reason."""
        return self.queues.num_waiting

    @property
    def pinned_blocks(self) -> int:
        """Blocks of adapters that running requests use or that are being loaded: they cannot be given back."""
        return self.cache.blocks_held - self.cache.idle_blocks

    @property
    def idle_blocks(self) -> int:
        """Blocks of adapters that no running request uses: they can be given to others at once."""
        return self.cache.idle_blocks

    def snapshot(self, now_s: float) -> ReplicaSnapshot:
        """Everything that metrics and placement show."""
        tiers = self.cache.tiers()
        failures = {digest: failure.reason for digest in tiers if (failure := self.cache.failure(digest, now_s))}
        return ReplicaSnapshot(self.cache.stats(), self.queues.state(), tiers, failures)

    def check(self) -> None:
        """Raise AssertionError unless cache and queues agree on every request."""
        self.queues.check()
        running = {one.request_id for one in self.queues.running() if one.adapter is not None}
        entries = [self.cache.entry(digest) for digest in self.cache.tiers()]
        assert {one for entry in entries for one in entry.running} == running, "a request runs on one side only"
        queued = {one for entry in entries for one in entry.queued}
        self.cache.check(live_requests=running | queued)
        assert all(one in self.queues for one in queued), "a request has left the queues"

    def _adapter_of(self, request_id: str) -> Adapter | None:
        return self.queues.request(request_id).adapter

    def _commit(self, plan: Plan, now_s: float) -> None:
        self.cache.commit(plan, now_s)
        if plan:
            self._has_moved, self._in_vain = True, False

    def _let_go(self, request_id: str, adapter: Adapter | None, now_s: float) -> None:
        if adapter is not None:
            self.cache.release(request_id, now_s)
        # A replica on which nobody waits has nothing to decide when a request ends.
        self._changed |= self._blocked is not None or not (self.cache.settled and self.queues.settled)

    def _refused(self, digest: str) -> tuple[str, ...]:
        self.queues.adapter_moved(digest)
        self._changed = True
        return tuple(self.cache.entry(digest).queued) if self.cache.knows(digest) else ()
