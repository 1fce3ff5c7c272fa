"""Which waiting request runs next: Chameleon's multi-queue admission, and the disciplines it is compared with.

The rules
1. Every request belongs to one queue, by its size (WRS). A queue is ordered by arrival; a level of client priority is
   worth ``priority_s`` of seniority, within bounds, so that it orders equals and starves nobody.
2. An admitted request borrows its tokens (prompt + predicted output + adapter as tokens) and a seat in the batch, and
   returns them whichever way it leaves: end, abort, preemption, squash. An adapter that several running requests use
   is in memory once: only the first of them borrows for it, and when that one leaves, the next.
3. Each step offers requests smallest queue first. Phase 1: a queue admits from its head while its own quota lasts.
   Phase 2: what queues in which nobody waits have left is offered, in the same order, on top of a queue's own rest.
   A queue stops at its first request that does not fit. A queue that lends nothing may exceed its quota by one request,
   within the total; when nobody runs at all, any request fits.
4. A request whose adapter is loading is passed over and keeps its place. Its first load stalls nobody, however slow.
5. When a request's adapter cannot fit even without all idle adapters, younger ones of its queue may bypass it if they
   are predicted to end before its room is free. If that room comes earlier, they are squashed: back to their places.
6. Nobody starves. Admissions are counted that pass a request which only capacity keeps waiting: not a first load, nor
   its own queue's quota, which returns by itself; but also a driver without capacity left to get to it. After
   ``max_overtakes`` nobody of its queue passes the request any more; after twice as many, the replica admits nobody
   else until it runs. So a request above any quota gets its turn, too.
7. Queues and quotas are measured anew every ``scheduler_refresh_s``, the paper's T_refresh; while requests wait, after
   a fifth of it: old quotas cost nothing until somebody waits, and then more than a queue near saturation can bear
   (docs/simulator.md). Before the first window of traffic is full, also whenever arrivals have doubled.
8. ``chameleon`` has a queue for each third of sizes and reserves nothing for any: every step takes, among the heads,
   the one whose boosted arrival (``ordering.py``) is earliest. A request without adapter room is bypassed by rule 5
   from all queues, one without KV memory by nobody. Boosts are bounded: rule 6 is left for want of adapter room.
"""

from collections.abc import Iterator
from math import inf

from chameleon_ray.policy.admission import AdapterRoom, Admission, Admitted, Obstacle, QueuesState, QueueState
from chameleon_ray.policy.bypass import Bypasses
from chameleon_ray.policy.disciplines import DISCIPLINES, UNLIMITED, Layout, QueueOptions
from chameleon_ray.policy.load_window import LoadWindow
from chameleon_ray.policy.ordering import boosted_s
from chameleon_ray.policy.queue_set import QueueSet
from chameleon_ray.policy.size_queue import Entry, Order, Place, SizeQueue
from chameleon_ray.policy.sizing import QueuedRequest, adapter_tokens, queue_of, request_size

_MAX_LOOKS = 24
"""Requests of one queue that a step may look at in vain; bounds its cost."""
_MAX_ASKED = 12
"""Loading adapters that a step asks about, those that have moved first, then in turn."""
_MAX_PRIORITY = 10
_BACKLOG_REFRESH_SHARE = 0.2
_CAPACITY_OBSTACLES = (Obstacle.LOADING, Obstacle.NO_ROOM, Obstacle.NO_MEMORY)


class QueueError(ValueError):
    """The queues were asked for something they cannot do; nothing has changed."""


class RequestQueues:
    """All requests of one replica, waiting or running.

    A step: ``begin_step``, then ``peek`` a candidate and either ``admit`` it or ``pass_over`` it, until ``peek`` gives
    None or the driver has no capacity left; what was not offered is offered by a later step.
    """

    def __init__(self, scheduler: str, options: QueueOptions, room: AdapterRoom) -> None:
        if scheduler not in DISCIPLINES:
            raise QueueError(f"unknown scheduling policy {scheduler!r}: choose one of {', '.join(DISCIPLINES)}")
        self._discipline = DISCIPLINES[scheduler]
        self._options = options
        self._room = room
        self._window = LoadWindow(options.sizing)
        self._scales = self._window.scales()
        self._layout = self._discipline.layout(self._window, self._scales, options, 0.0)
        self._set = QueueSet(self._layout, options.max_num_seqs)
        self._bypasses = Bypasses(self._set, self._window, room, options.max_squash_share)
        self._num_admissions = self._num_refreshes = self._num_holds = 0
        self._refresh_at_s = inf
        self._refresh_at_arrival: float = 1
        # The step under way.
        self._now_s = 0.0
        self._walk: Iterator[Entry] = iter(())
        self._candidate: Entry | None = None
        self._outcome: Obstacle | None = None
        self._head: Entry | None = None
        self._head_room_s = -inf
        self._held: Entry | None = None
        self._unreached: list[SizeQueue] = []

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._set.entries

    def request(self, request_id: str) -> QueuedRequest:
        """A request that waits or runs. Raises QueueError for one that is unknown."""
        if (entry := self._set.entries.get(request_id)) is None:
            raise QueueError(f"request {request_id} is neither queued nor running (removed twice?)")
        return entry.request

    def running(self) -> list[QueuedRequest]:
        """Requests admitted and not ended, in order of admission."""
        return [entry.request for entry in self._set.running.values()]

    @property
    def num_waiting(self) -> int:
        """Requests that wait, those with loading adapters included."""
        return len(self._set.entries) - len(self._set.running)

    @property
    def num_running(self) -> int:
        """Requests admitted and not ended."""
        return len(self._set.running)

    @property
    def settled(self) -> bool:
        """Whether nobody waits and nothing of the last step lingers: steps change nothing until ``refresh_at_s``."""
        return not self.num_waiting and not any(queue.stuck for queue in self._set.queues)

    @property
    def refresh_at_s(self) -> float:
        """When the next refresh by time is due, sooner while requests wait (rule 7); infinite before the first one."""
        early_s = self._options.scheduler_refresh_s * (1 - _BACKLOG_REFRESH_SHARE) if self.num_waiting else 0.0
        return self._refresh_at_s - early_s

    @property
    def each_step_sees_all(self) -> bool:
        """Whether so few wait that every step gets to all of them."""
        return self.num_waiting <= _MAX_ASKED

    def add(self, request: QueuedRequest, now_s: float) -> None:
        """A request arrives. Raises QueueError for an id that is in use."""
        if request.request_id in self:
            raise QueueError(f"request {request.request_id} is queued or running already: use another id")
        entry = Entry(request, self._window.num_arrived, now_s, 0, self._set.queues[0], waiting_since_s=now_s)
        if request.adapter is not None:
            entry.own_adapter_tokens = adapter_tokens(request.adapter, self._options.sizing)
        self._price(entry)
        self._window.arrived(request, now_s)
        self._classify(entry)
        self._set.enter(entry)

    def adapter_moved(self, digest: str) -> None:
        """An adapter was fetched or loaded, or could not be: the next step asks about it before others."""
        self._set.ask_next(digest)

    def begin_step(self, now_s: float) -> None:
        """Start a step at ``now_s``; whatever step was under way is over."""
        self._end_step()
        self._now_s = now_s
        if now_s >= self.refresh_at_s or self._window.num_arrived >= self._refresh_at_arrival:
            self.refresh(now_s)
        if self.settled:
            self._held, self._unreached, self._walk = None, list(self._set.queues), self._offer_nobody()
            return
        self._set.recall(self._room.admission, _MAX_ASKED)
        held = self._most_overtaken()
        self._num_holds += held is not None and held is not self._held
        self._held = held
        if held is not None:
            self._unreached, self._walk = [], self._offer_only(held)
        elif self._discipline.boosted:
            self._unreached, self._walk = [], self._offer_in_order()
        else:
            self._unreached, self._walk = list(self._set.queues), self._offer_all()

    def peek(self) -> QueuedRequest | None:
        """The next candidate of this step, the same until it is admitted, passed over or gone; None: no more."""
        if self._candidate is None:
            self._candidate = next(self._walk, None)
        return self._candidate.request if self._candidate else None

    def admit(self, request_id: str) -> Admitted:
        """The candidate runs from now on and borrows its tokens. Raises QueueError for any other request."""
        entry = self._decide(request_id, None)
        waited_s = self._now_s - entry.waiting_since_s
        self._set.run(entry, self._now_s)
        self._num_admissions += 1
        self._bypasses.forget(entry)
        if self._head is not None:
            self._bypasses.start(entry, self._head)
        for queue in self._set.queues:
            for stuck in queue.stuck:
                stuck.overtaken += 1
        return Admitted(entry.queue.index, waited_s, self._head is not None)

    def pass_over(self, request_id: str, obstacle: Obstacle) -> None:
        """The candidate cannot run in this step; it keeps its place. Raises QueueError for any other request."""
        if obstacle not in (*_CAPACITY_OBSTACLES, Obstacle.NOT_READY):
            raise QueueError(f"{obstacle} is for the queues to find: report LOADING, NO_ROOM, NO_MEMORY or NOT_READY")
        self._decide(request_id, obstacle)

    def finish(self, request_id: str, now_s: float, num_output_tokens: int) -> None:
        """A running request ended by itself: its tokens return, its duration is learned. Raises QueueError."""
        entry = self._running_entry(request_id)
        self._window.ended(entry.request, now_s - entry.admitted_s, num_output_tokens)
        self.remove(request_id)

    def remove(self, request_id: str) -> None:
        """A request is aborted or failed, wherever it is. Raises QueueError for one that is unknown."""
        self.request(request_id)
        entry = self._set.entries[request_id]
        if entry is self._candidate:
            self._candidate, self._outcome = None, Obstacle.NOT_READY
        if entry is self._head:
            self._head = None
        self._set.leave(entry)
        self._bypasses.forget(entry)

    def requeue(self, request_id: str, now_s: float, squashed: bool = False) -> None:
        """A running request was preempted or squashed: it returns its tokens and waits at its old place."""
        entry = self._running_entry(request_id)
        self._set.leave(entry)
        self._bypasses.forget(entry)
        self._bypasses.num_squashes += squashed
        entry.was_squashed |= squashed
        entry.waiting_since_s = now_s
        self._set.enter(entry)

    def squashes(self) -> tuple[str, ...]:
        """Running requests to stop and ``requeue(..., squashed=True)`` before the next step (rule 5)."""
        return self._bypasses.squashes()

    def refresh(self, now_s: float) -> Layout:
        """Measure scales, cut-offs and quotas anew and move every request, in order; ends the step under way."""
        self._end_step()
        self._scales = self._window.scales()
        self._layout = self._discipline.layout(self._window, self._scales, self._options, now_s)
        self._set.rearrange(self._layout, self._classify)
        self._num_refreshes += 1
        self._refresh_at_s = now_s + self._options.scheduler_refresh_s
        # The first window of traffic is learned from at every doubling: the first queues come early.
        doubled = 2 * max(1, self._window.num_arrived)
        self._refresh_at_arrival = doubled if doubled <= self._window.capacity else inf
        return self._layout

    def waiting(self, queue: int) -> list[QueuedRequest]:
        """Requests that wait in one queue, in order, those with loading adapters included."""
        members = [entry for entry in self._set.entries.values() if entry.queue.index == queue]
        members = [entry for entry in members if entry.place is not Place.RUNNING]
        return [entry.request for entry in sorted(members, key=lambda entry: entry.order)]

    def state(self) -> QueuesState:
        """The live queues and counts."""
        queues = tuple(
            QueueState(
                max_size=max_size,
                num_waiting=len(queue),
                num_loading=queue.num_loading,
                num_running=queue.num_running,
                max_running=queue.max_running,
                quota_tokens=queue.quota_tokens,
                used_tokens=queue.used_tokens,
            )
            for max_size, queue in zip((*self._layout.cutoffs, inf), self._set.queues, strict=True)
        )
        return QueuesState(
            queues=queues,
            num_running=self.num_running,
            minima_scale=self._layout.minima_scale,
            num_admissions=self._num_admissions,
            num_bypasses=self._bypasses.num_bypasses,
            num_squashes=self._bypasses.num_squashes,
            num_refreshes=self._num_refreshes,
            num_holds=self._num_holds,
        )

    def check(self) -> None:
        """AssertionError unless every request is in exactly one place and every borrowed token is accounted for."""
        self._set.check()
        self._bypasses.check()
        for entry in self._set.entries.values():
            assert entry.queue is self._set.queues[queue_of(entry.size, self._layout.cutoffs)], "in another's queue"
        assert self._candidate is None or self._candidate.place is Place.WAITING

    def _price(self, entry: Entry) -> None:
        """Note what the request would borrow if it ran now (rule 2)."""
        request, adapter = entry.request, entry.request.adapter
        shared = adapter is not None and adapter.digest in self._set.adapter_users
        entry.adapter_tokens = 0 if shared else entry.own_adapter_tokens
        entry.tokens = request.num_prompt_tokens + request.num_predicted_tokens + entry.adapter_tokens

    def _classify(self, entry: Entry) -> None:
        entry.size = request_size(entry.request, self._scales, self._options.sizing)
        entry.queue = self._set.queues[queue_of(entry.size, self._layout.cutoffs)]
        priority = min(max(entry.request.priority, -_MAX_PRIORITY), _MAX_PRIORITY)
        seniority_s = entry.arrival_s + priority * self._options.priority_s
        entry.order = (entry.size if self._discipline.shortest_first else seniority_s, entry.arrival)

    def _end_step(self) -> None:
        """Requests that the driver's capacity did not reach are stuck: they must not be left out for ever (rule 6)."""
        undecided = None if self._discipline.boosted else self._candidate
        for entry in (undecided, *(queue.first() for queue in self._unreached)):
            if entry is not None and self._waits_for_others(entry):
                entry.queue.note_stuck(entry)
        self._candidate, self._walk, self._unreached = None, iter(()), []

    def _waits_for_others(self, entry: Entry) -> bool:
        """Whether it is not its own queue's quota, which returns by itself, that keeps a request waiting."""
        queue = entry.queue
        lent_to_its_like = queue.free_tokens < entry.tokens <= queue.quota_tokens
        return not lent_to_its_like and self._set.has_seat(queue, spare=False)

    def _decide(self, request_id: str, outcome: Obstacle | None) -> Entry:
        entry = self._candidate
        if entry is None or entry.request_id != request_id:
            raise QueueError(f"request {request_id} is not the candidate of this step: peek first")
        self._candidate, self._outcome = None, outcome
        return entry

    def _running_entry(self, request_id: str) -> Entry:
        if (entry := self._set.running.get(request_id)) is None:
            raise QueueError(f"request {request_id} is not running")
        return entry

    def _offer_all(self) -> Iterator[Entry]:
        for queue in self._set.queues:
            self._unreached.remove(queue)
            queue.stuck.clear()
            queue.resume = None
            yield from self._offer_queue(queue, 0, spare=False)
        for queue in self._set.queues:
            if queue.resume is not None and queue.resume.place is Place.WAITING:
                yield from self._offer_queue(queue, queue.index_of(queue.resume.order), spare=True)

    def _offer_in_order(self) -> Iterator[Entry]:
        """Rule 8."""
        self._head = None
        queues = self._set.queues
        for queue in queues:
            queue.stuck.clear()
        looks = _MAX_LOOKS
        following = [queue.first() for queue in queues]
        while looks > 0 and any(following):
            entry = min((one for one in following if one is not None), key=self._boosted)
            queue, order = entry.queue, entry.order
            if entry.place is Place.WAITING:
                obstacle = self._obstacle(entry, UNLIMITED)
                if obstacle is None:
                    yield entry
                    obstacle = self._outcome
                if obstacle is not None and not self._goes_on_behind(entry, queue, obstacle, spare=False):
                    break
                looks -= obstacle in (Obstacle.LOADING, Obstacle.NO_ROOM, Obstacle.NO_BYPASS)
            following[queue.index] = queue.after(order)
        self._head = None

    def _boosted(self, entry: Entry) -> Order:
        seniority_s, arrival = entry.order
        return boosted_s(seniority_s, entry.queue.index, self._layout.max_age_s, self._now_s), arrival

    def _offer_nobody(self) -> Iterator[Entry]:
        self._unreached.clear()
        yield from ()

    def _offer_queue(self, queue: SizeQueue, index: int, spare: bool) -> Iterator[Entry]:
        self._head = None
        looks = _MAX_LOOKS
        allowance = self._set.allowance(queue, spare)
        while looks > 0 and (entry := queue.at(index)) is not None:
            obstacle = self._obstacle(entry, allowance)
            if obstacle is None:
                order = entry.order
                yield entry
                obstacle = self._outcome
                allowance, index = self._set.allowance(queue, spare), queue.index_of(order)
            if obstacle is not None and not self._goes_on_behind(entry, queue, obstacle, spare):
                break
            looks -= obstacle in (Obstacle.LOADING, Obstacle.NO_ROOM, Obstacle.NO_BYPASS)
            index += queue.at(index) is entry
        self._head = None

    def _offer_only(self, held: Entry) -> Iterator[Entry]:
        """Rule 6: nobody but ``held`` may run. Let go of it when nothing more can become free for it."""
        self._head = None
        admission = self._room.admission(held.request)
        hopeless = admission is Admission.NO_ROOM and not self._set.running
        if admission in (Admission.READY, Admission.FITS):
            self._price(held)
            if self._set.running and held.tokens > self._set.free_tokens:
                return
            yield held
            out_of_memory = self._outcome in (Obstacle.NO_ROOM, Obstacle.NO_MEMORY) and not self._set.running
            hopeless = out_of_memory or self._outcome is Obstacle.NOT_READY
        if hopeless:
            held.overtaken = 0

    def _obstacle(self, entry: Entry, allowance: int) -> Obstacle | None:
        admission = self._room.admission(entry.request)
        if admission is Admission.LOADING:
            return Obstacle.LOADING
        entry.was_ready |= admission is Admission.READY
        self._price(entry)
        if entry.tokens > allowance:
            return Obstacle.QUOTA
        if admission is Admission.NO_ROOM:
            return Obstacle.NO_ROOM
        if self._head is not None and not (
            self._bypasses.ends_before(entry, self._now_s, self._head_room_s)
            and self._bypasses.affordable(self._num_admissions)
        ):
            return Obstacle.NO_BYPASS
        return None

    def _goes_on_behind(self, entry: Entry, queue: SizeQueue, obstacle: Obstacle, spare: bool) -> bool:
        """Notes why ``entry`` does not run; whether this step may look at younger requests of its queue."""
        if obstacle in (Obstacle.NOT_READY, Obstacle.NO_BYPASS):
            return True
        if obstacle is Obstacle.LOADING and not entry.was_ready and entry.request.adapter is not None:
            self._set.set_aside(entry)
            return True
        if obstacle is Obstacle.QUOTA:
            if not spare and self._head is None:
                queue.resume = entry
            if self._waits_for_others(entry):
                queue.note_stuck(entry)
            return False
        queue.note_stuck(entry)
        if entry.overtaken >= self._options.max_overtakes:
            return False
        return obstacle is Obstacle.LOADING or (obstacle is Obstacle.NO_ROOM and self._may_bypass(entry))

    def _may_bypass(self, head: Entry) -> bool:
        if self._head is None and self._discipline.bypass and self._bypasses.affordable(self._num_admissions):
            self._head = head
            self._head_room_s = self._bypasses.room_expected_s(head, self._now_s)
        return self._head is not None and self._head_room_s > self._now_s

    def _most_overtaken(self) -> Entry | None:
        """The oldest request overtaken so often that the replica is kept free for it; not during its first load."""
        limit = 2 * self._options.max_overtakes
        stuck = [
            entry
            for queue in self._set.queues
            for entry in queue.stuck
            if entry.overtaken >= limit and entry.place is Place.WAITING
        ]
        if not stuck:
            return None
        oldest = min(stuck, key=lambda entry: entry.arrival)
        loading = self._room.admission(oldest.request) is Admission.LOADING
        return None if loading and not oldest.was_ready else oldest
