"""One replica's whole policy, adapter cache and queues composed: the one object that engine and simulator drive.

A driver owns the blocks and the clock; this decides. The life of a step:

1. ``squashes``: stop these and ``requeue(..., squashed=True)``.
2. ``begin_step``, then ``peek`` a request whose adapter is resident, and ``admit`` it or ``pass_over`` it, until
   ``peek`` gives None or the driver has no capacity left. Requests without their adapter never show: this notes whose
   adapters are needed.
3. ``end_step``: carry out the plan it returns (evict, drop, load, fetch; in that order) beside the running batch.

Between steps: ``arrive``, ``finish``, ``remove``, ``requeue``; ``make_room`` wherever KV memory is
short; ``fetched``, ``loaded``, ``failed`` as the ordered work ends. All times are seconds on one
clock of the driver. Misuse raises (``QueueError``, ``CacheError``) and changes nothing.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from chameleon_ray.policy.adapter import Adapter
from chameleon_ray.policy.admission import Admitted, Obstacle
from chameleon_ray.policy.cache import AdapterCache
from chameleon_ray.policy.cache_types import CacheConfig, Plan
from chameleon_ray.policy.disciplines import QueueOptions
from chameleon_ray.policy.queues import RequestQueues
from chameleon_ray.policy.records import CacheEntry, Place, QueuedRequest, State
from chameleon_ray.policy.room import BlockPool, Room

IDLE_PLAN_INTERVAL_S = 0.05
"""How often to plan while nothing has happened: only loads ahead of time are at stake."""
_NOTHING = Plan(version=-1)


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


class ReplicaPolicy:
    """Which requests run and which adapters are resident. See the module's head for its use."""

    def __init__(self, config: ReplicaConfig, pool: BlockPool) -> None:
        self.config = config
        self.cache = AdapterCache(config.cache)
        """For questions; change it through this object."""
        self.room = Room(self.cache, pool, config.block_tokens, config.shares_kv)
        self.queues = RequestQueues(config.scheduler, config.queues, self.room)
        """For questions; change it through this object."""
        self._needed: dict[str, None] = {}
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

    def loaded(self, digest: str) -> None:
        """A load has ended well: the adapter is resident."""
        self.cache.loaded(digest)
        self.queues.adapter_moved(digest)
        self._changed = True

    def failed(self, digest: str, now_s: float) -> tuple[str, ...]:
        """A fetch or load has failed: give back its host copy and blocks.

        Returns the requests that waited for it, which are removed: end them with an error. The next request for the
        adapter has it fetched again; whether one may come is the driver's business.
        """
        waiting = tuple(self.cache.entry(digest).queued)
        self.cache.failed(digest)
        self.queues.adapter_moved(digest)
        for request_id in waiting:
            self.remove(request_id, now_s)
        self._changed = True
        return waiting

    # Requests

    def arrive(self, request: QueuedRequest, now_s: float) -> bool:
        """A request arrives. Returns whether its adapter is resident (base model: always).

        Raises UnknownAdapter, or QueueError for an id in use.
        """
        if request.adapter is not None:
            request.entry = self.cache.entry(request.adapter.digest)
        self.queues.add(request, now_s)
        self._changed = True
        return request.entry is None or self.cache.count_request(request.entry, now_s)

    def finish(self, request_id: str, now_s: float, num_output_tokens: int) -> None:
        """A running request ended by itself. Raises QueueError."""
        request = self.queues.request(request_id)
        self.queues.finish(request_id, now_s, num_output_tokens)
        self._let_go(request.entry, now_s, has_run=True)

    def remove(self, request_id: str, now_s: float) -> None:
        """A request was aborted or failed, waiting or running. Raises QueueError."""
        request = self.queues.request(request_id)
        has_run = request.place is Place.RUNNING
        self.queues.remove(request_id)
        self._let_go(request.entry, now_s, has_run)

    def requeue(self, request_id: str, now_s: float, *, squashed: bool = False) -> None:
        """A running request was preempted or squashed, its KV blocks are free: it waits at its old place."""
        self.queues.requeue(request_id, now_s, squashed)
        if (entry := self.queues.request(request_id).entry) is not None:
            self.cache.use(entry, now_s)
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
            if request.entry is None:
                return request
            # Resident ones as well: else the adapter of a request that waits for KV memory would leave for one that
            # is needed after it, and come back, and so on.
            self._needed[request.entry.digest] = None
            if request.entry.state is State.RESIDENT:
                return request
            self.queues.pass_over(request.request_id, Obstacle.LOADING)
        self._in_vain = not self._has_moved
        return None

    def admit(self, request_id: str, now_s: float) -> Admitted:
        """The candidate runs; the driver gives it KV blocks. Raises QueueError for any other request."""
        admitted = self.queues.admit(request_id)
        if (entry := self.queues.request(request_id).entry) is not None:
            self.cache.use(entry, now_s)
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
        if not self._needed and self.room.blocked is None and self.cache.settled:
            self._changed, self._planned_at_s = False, now_s
            return _NOTHING
        blocked = self.cache.entries.get(self.room.blocked) if self.room.blocked is not None else None
        if blocked is not None and blocked.wanted:
            self._needed[blocked.digest] = None
        plan = self.cache.plan(self._needed, self.room.free_adapter_blocks(reserved_blocks), now_s)
        self._commit(plan, now_s)
        self.room.blocked, self._changed, self._planned_at_s = plan.blocked, False, now_s
        return plan

    def quiet_until_s(self) -> float:
        """Until when steps would decide nothing, provided that nothing happens before; in the past: they might.

        What happens is any call of this object's that changes something, and blocks that become free otherwise.
        Nothing is decided while nobody waits, nor while those that wait were offered in vain: whoever has the adapter
        waits for quota, a seat or KV memory, the others for loads under way, and all of these end with a call. Where
        many wait, a step may find what the one before had no time for.
        """
        in_vain = self._in_vain and self.num_running and self.num_waiting and self.queues.each_step_sees_all
        rests = self.room.blocked is None and self.cache.settled and (self.queues.settled or in_vain)
        quiet = rests and not self._changed
        return self.queues.refresh_at_s if quiet else float("-inf")

    def make_room(self, num_blocks: int, now_s: float, *, for_request: str = "", or_nothing: bool = False) -> Plan:
        """Evictions, committed, that give ``num_blocks`` to the KV cache, or as many as idle adapters hold.

        for_request: whose own adapter stays. or_nothing: evict nobody where it is not enough. Nobody is evicted where
        adapters have blocks of their own.
        """
        if not self.config.shares_kv:
            return _NOTHING
        entry = self.queues.request(for_request).entry if for_request in self.queues else None
        keep = () if entry is None else (entry.digest,)
        if or_nothing and self.cache.idle_blocks < num_blocks:
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

    # State

    @property
    def num_running(self) -> int:
        """Requests admitted and not ended."""
        return self.queues.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that wait, for whatever reason."""
        return self.queues.num_waiting

    def check(
        self, owned_blocks: Mapping[str, int] | None = None, live_requests: Collection[str] | None = None
    ) -> None:
        """Raise AssertionError, with the numbers, unless the records of requests and adapters add up.

        owned_blocks: what the driver's pool says each adapter holds. live_requests: ids of the driver's requests.
        """
        self.cache.check(owned_blocks)
        self.queues.check(live_requests)
        for entry in self.cache.entries.values():
            for one in (*entry.queued.values(), *entry.running.values()):
                assert self.queues.request(one.request_id) is one, f"{one.request_id} has left, not its adapter"

    def _commit(self, plan: Plan, now_s: float) -> None:
        self.cache.commit(plan, now_s)
        if plan:
            self._has_moved, self._in_vain = True, False

    def _let_go(self, entry: CacheEntry | None, now_s: float, has_run: bool) -> None:
        if entry is not None and has_run:
            self.cache.use(entry, now_s)
        elif entry is not None:
            self.cache.update(entry)
        # A replica on which nobody waits has nothing to decide when a request ends.
        self._changed |= self.room.blocked is not None or not (self.cache.settled and self.queues.settled)
