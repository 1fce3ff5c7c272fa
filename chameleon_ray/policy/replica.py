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
from chameleon_ray.policy.cache import AdapterCache, CacheConfig, CacheStats, EvictReason, Plan, State
from chameleon_ray.policy.disciplines import QueueOptions
from chameleon_ray.policy.queues import QueueError, RequestQueues
from chameleon_ray.policy.sizing import QueuedRequest

IDLE_PLAN_INTERVAL_S = 0.05
"""How often to plan while nothing has happened: only prefetches and adapters expected soon are at stake."""
_NOTHING = Plan(version=-1)


class AdapterFailed(Exception):
    """The request's adapter could not be fetched or loaded a moment ago: refuse the request."""

    def __init__(self, reason: str, retry_at_s: float) -> None:
        super().__init__(reason)
        self.retry_at_s = retry_at_s


class BlockPool(Protocol):
    """What the policy asks of the driver's KV-block pool. Questions: they change nothing."""

    def free_blocks(self) -> int:
        """Blocks that nobody holds."""

    def kv_blocks(self, request_id: str) -> int:
        """Blocks that a running request's KV cache holds, and would give back by ending."""


@dataclass(frozen=True, slots=True)
class ReplicaConfig:
    """cache, queues: what an operator decides about each. discipline: a name in ``DISCIPLINES``. block_tokens: tokens
    of KV cache in one block."""

    cache: CacheConfig
    queues: QueueOptions
    discipline: str = "chameleon"
    block_tokens: int = 16

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
        self.queues = RequestQueues(config.discipline, config.queues, _Room(self))
        """For questions; change it through this object."""
        self._pool = pool
        self._num_blocks: dict[str, int] = {}
        self._requests: dict[str, QueuedRequest] = {}
        self._admitted: set[str] = set()
        self._running: dict[str, set[str]] = {}
        self._held_blocks = 0
        self._pinned_blocks = 0
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
        self._num_blocks[adapter.digest] = num_blocks

    def retire_adapter(self, digest: str) -> None:
        """See ``AdapterCache.retire``; ``end_step`` plans for it to leave."""
        self.cache.retire(digest)
        self._forget_unknown(digest)
        self._changed = True

    def fetched(self, digest: str) -> None:
        """A fetch has ended well: the host copy is complete."""
        self.cache.fetched(digest)
        self.queues.adapter_moved(digest)
        self._changed = True

    def fetch_failed(self, digest: str, reason: str, now_s: float) -> tuple[str, ...]:
        """A fetch has failed. Returns the requests that wait for it: end them with an error and ``remove`` them."""
        self.cache.fetch_failed(digest, reason, now_s)
        return self._refused(digest)

    def loaded(self, digest: str) -> None:
        """A load has ended well: the adapter is resident."""
        self.cache.loaded(digest)
        self.queues.adapter_moved(digest)
        if not self._running.get(digest):
            self._pinned_blocks -= self._num_blocks[digest]
        self._changed = True

    def load_failed(self, digest: str, reason: str, now_s: float) -> tuple[str, ...]:
        """A load has failed: give back its blocks and its host copy. Returns requests to end, as ``fetch_failed``."""
        self.cache.load_failed(digest, reason, now_s)
        num_blocks = self._num_blocks[digest]
        self._pinned_blocks -= num_blocks
        self._held_blocks -= num_blocks
        return self._refused(digest)

    # Requests

    def arrive(self, request: QueuedRequest, now_s: float) -> bool:
        """A request arrives. Returns whether its adapter is resident (base model: always).

        Raises AdapterFailed, UnknownAdapter, or QueueError for an id in use.
        """
        if request.request_id in self._requests:
            raise QueueError(f"request {request.request_id} is queued or running already: use another id")
        digest = request.adapter.digest if request.adapter else None
        if digest is not None and (failure := self.cache.failure(digest, now_s)) is not None:
            raise AdapterFailed(failure.reason, failure.retry_at_s)
        hit = digest is None or self.cache.enqueue(request.request_id, digest, now_s)
        self.queues.add(request, now_s)
        self._requests[request.request_id] = request
        self._changed = True
        return hit

    def finish(self, request_id: str, now_s: float, num_output_tokens: int) -> None:
        """A running request ended by itself. Raises QueueError."""
        self.queues.finish(request_id, now_s, num_output_tokens)
        self._let_go(request_id, now_s)

    def remove(self, request_id: str, now_s: float) -> None:
        """A request was aborted or failed, waiting or running. Raises QueueError."""
        self.queues.remove(request_id)
        self._let_go(request_id, now_s)

    def requeue(self, request_id: str, now_s: float, *, squashed: bool = False) -> None:
        """A running request was preempted or squashed, its KV blocks are free: it waits at its old place."""
        self.queues.requeue(request_id, now_s, squashed)
        self._admitted.remove(request_id)
        adapter = self._requests[request_id].adapter
        if adapter is not None:
            self.cache.requeue(request_id, now_s)
            self._unpin(adapter.digest, request_id)
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
        self._admitted.add(request_id)
        adapter = self._requests[request_id].adapter
        if adapter is not None:
            self.cache.acquire(request_id, now_s)
            running = self._running.setdefault(adapter.digest, set())
            if not running:
                self._pinned_blocks += self._num_blocks[adapter.digest]
            running.add(request_id)
        self._changed = self._has_moved = True
        return admitted

    def pass_over(self, request_id: str, obstacle: Obstacle) -> None:
        """The candidate cannot run in this step for the driver's reasons (NO_MEMORY, NOT_READY)."""
        self.queues.pass_over(request_id, obstacle)
        self._has_moved |= obstacle is Obstacle.NOT_READY

    def end_step(self, now_s: float, reserved_blocks: int = 0) -> Plan:
        """What to do about adapters now, committed already: carry it out.

        reserved_blocks: free blocks that the running batch is about to need; no adapter is loaded into them.
        """
        if not (self._changed or self._needed or now_s >= self._planned_at_s + IDLE_PLAN_INTERVAL_S):
            return _NOTHING
        if not self._needed and self._blocked is None and self.cache.settled:
            self._changed, self._planned_at_s = False, now_s
            return _NOTHING
        if self._blocked is not None and self.cache.knows(self._blocked):
            self._needed[self._blocked] = None
        plan = self.cache.plan(self._needed, max(0, self._pool.free_blocks() - reserved_blocks), now_s)
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

        for_request: whose own adapter stays. or_nothing: evict nobody where it is not enough.
        """
        request = self._requests.get(for_request)
        keep = (request.adapter.digest,) if request is not None and request.adapter is not None else ()
        if or_nothing and self.idle_blocks < num_blocks:
            return _NOTHING
        plan = self.cache.reclaim(num_blocks, now_s, keep)
        if or_nothing and plan.freed_blocks < num_blocks:
            return _NOTHING
        self._commit(plan, now_s)
        return plan

    # State

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
        return self._pinned_blocks

    @property
    def idle_blocks(self) -> int:
        """Blocks of adapters that no running request uses: they can be given back at once."""
        return self._held_blocks - self._pinned_blocks

    def snapshot(self, now_s: float) -> ReplicaSnapshot:
        """Everything that metrics and placement show."""
        tiers = self.cache.tiers()
        failures = {digest: failure.reason for digest in tiers if (failure := self.cache.failure(digest, now_s))}
        return ReplicaSnapshot(self.cache.stats(), self.queues.state(), tiers, failures)

    def check(self) -> None:
        """Raise AssertionError unless cache, queues and this object agree on every request and block."""
        states = {digest: self.cache.state(digest) for digest in self._num_blocks}
        held = {d: self._num_blocks[d] for d, state in states.items() if state in (State.LOADING, State.RESIDENT)}
        for_adapters = [one.request_id for one in self._requests.values() if one.adapter is not None]
        self.cache.check(held, for_adapters)
        self.queues.check()
        assert len(self._requests) == self.num_waiting + self.num_running, "a request is known to one side only"
        assert all(request_id in self.queues for request_id in self._requests), "a request has left the queues"
        assert len(self._admitted) == self.num_running, "a request runs that was not admitted"
        assert self._held_blocks == sum(held.values()), f"{self._held_blocks} blocks counted, {held} held"
        pinned = {d for d in held if states[d] is State.LOADING or self._running.get(d)}
        assert self._pinned_blocks == sum(held[d] for d in pinned), f"{self._pinned_blocks} blocks pinned, not {pinned}"

    def _admission(self, request: QueuedRequest) -> Admission:
        if request.adapter is None:
            return Admission.READY
        state = self.cache.state(request.adapter.digest)
        if state is State.RESIDENT:
            return Admission.READY
        if state in (State.FETCHING, State.LOADING):
            return Admission.LOADING
        if request.adapter.digest == self._blocked:
            return Admission.NO_ROOM
        room = min(self._pool.free_blocks() + self.idle_blocks, self.config.cache.max_blocks - self._pinned_blocks)
        if self._num_blocks[request.adapter.digest] <= room:
            return Admission.FITS
        # Without a host copy there is nothing that room could be used for yet; the cache fetches for whoever waits.
        return Admission.NO_ROOM if state is State.HOST else Admission.LOADING

    def _ends_needed(self, request: QueuedRequest, leaving: Sequence[str]) -> int | None:
        """See ``AdapterRoom``: room for the request's adapter and prompt, idle adapters evicted."""
        digest = request.adapter.digest if request.adapter is not None else None
        is_loading = digest is not None and self.cache.state(digest) is State.LOADING
        prompt_blocks = -(-request.num_prompt_tokens // self.config.block_tokens)
        free = self._pool.free_blocks() + self.idle_blocks
        share = self.config.cache.max_blocks - self._pinned_blocks
        users: dict[str, int] = {}
        for count in range(len(leaving) + 1):
            if count:
                request_id = leaving[count - 1]
                free += self._pool.kv_blocks(request_id)
                if (adapter := self._requests[request_id].adapter) is not None:
                    users[adapter.digest] = users.get(adapter.digest, len(self._running[adapter.digest])) - 1
                    if not users[adapter.digest]:
                        free += self._num_blocks[adapter.digest]
                        share += self._num_blocks[adapter.digest]
            adapter_blocks = 0
            if digest is not None and not is_loading and not users.get(digest, len(self._running.get(digest, ()))):
                adapter_blocks = self._num_blocks[digest]
            if adapter_blocks <= share and adapter_blocks + prompt_blocks <= free:
                return count
        return None

    def _commit(self, plan: Plan, now_s: float) -> None:
        self.cache.commit(plan, now_s)
        if plan:
            self._has_moved, self._in_vain = True, False
        for digest in plan.load:
            self._held_blocks += self._num_blocks[digest]
            self._pinned_blocks += self._num_blocks[digest]
        for eviction in plan.evict:
            self._held_blocks -= eviction.num_blocks
            if eviction.reason is EvictReason.RETIRED:
                self._forget_unknown(eviction.digest)
        for digest in plan.drop:
            self._forget_unknown(digest)

    def _let_go(self, request_id: str, now_s: float) -> None:
        adapter = self._requests.pop(request_id).adapter
        was_running = request_id in self._admitted
        self._admitted.discard(request_id)
        if adapter is not None:
            self.cache.release(request_id, now_s)
            if was_running:
                self._unpin(adapter.digest, request_id)
            self._forget_unknown(adapter.digest)
        # A replica on which nobody waits has nothing to decide when a request ends.
        self._changed |= self._blocked is not None or not (self.cache.settled and self.queues.settled)

    def _unpin(self, digest: str, request_id: str) -> None:
        running = self._running[digest]
        running.remove(request_id)
        if not running:
            del self._running[digest]
            self._pinned_blocks -= self._num_blocks[digest]

    def _refused(self, digest: str) -> tuple[str, ...]:
        self.queues.adapter_moved(digest)
        self._changed = True
        requests = self._requests.values()
        waiting = tuple(one.request_id for one in requests if one.adapter is not None and one.adapter.digest == digest)
        self._forget_unknown(digest)
        return waiting

    def _forget_unknown(self, digest: str) -> None:
        if not self.cache.knows(digest):
            self._num_blocks.pop(digest, None)


@dataclass(frozen=True, slots=True)
class _Room:
    """The policy as its queues see it (``AdapterRoom``)."""

    policy: ReplicaPolicy

    def admission(self, request: QueuedRequest) -> Admission:
        return self.policy._admission(request)

    def ends_needed(self, request: QueuedRequest, leaving: Sequence[str]) -> int | None:
        return self.policy._ends_needed(request, leaving)
