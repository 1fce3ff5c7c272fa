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

from collections.abc import Collection, Iterator, Sequence
from math import inf

from chameleon_ray.policy.admission import Admission, Admitted, Obstacle, QueuesState, QueueState
from chameleon_ray.policy.bypass import Bypasses
from chameleon_ray.policy.disciplines import DISCIPLINES, Layout, QueueOptions
from chameleon_ray.policy.load_window import LoadWindow
from chameleon_ray.policy.ordering import boosted_s
from chameleon_ray.policy.queue_set import QueueSet
from chameleon_ray.policy.records import Order, Place, QueuedRequest, SizeQueue
from chameleon_ray.policy.room import Room
from chameleon_ray.policy.sizing import adapter_tokens, queue_of, request_size

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

    def __init__(self, scheduler: str, options: QueueOptions, room: Room) -> None:
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
        self._walk: Iterator[QueuedRequest] = iter(())
        self._candidate: QueuedRequest | None = None
        self._outcome: Obstacle | None = None
        self._head: QueuedRequest | None = None
        self._head_room_s = -inf
        self._held: QueuedRequest | None = None
        self._unreached: list[SizeQueue] = []

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._set.requests

    def request(self, request_id: str) -> QueuedRequest:
        """The one record of a request that waits or runs. Raises QueueError for one that is unknown."""
        if (request := self._set.requests.get(request_id)) is None:
            raise QueueError(f"request {request_id} is neither queued nor running (removed twice?)")
        return request

    @property
    def num_waiting(self) -> int:
        """Requests that wait, those with loading adapters included."""
        return len(self._set.requests) - len(self._set.running)

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
        """A request arrives, with its adapter's record in it. Raises QueueError for an id that is in use."""
        if request.request_id in self:
            raise QueueError(f"request {request.request_id} is queued or running already: use another id")
        request.arrival, request.arrival_s, request.waiting_since_s = self._window.num_arrived, now_s, now_s
        self._price(request)
        self._window.arrived(request, now_s)
        self._classify(request)
        self._set.enter(request)

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
        return self._candidate

    def admit(self, request_id: str) -> Admitted:
        """The candidate runs from now on and borrows its tokens. Raises QueueError for any other request."""
        request = self._decide(request_id, None)
        waited_s = self._now_s - request.waiting_since_s
        self._set.run(request, self._now_s)
        self._num_admissions += 1
        self._bypasses.forget(request)
        if self._head is not None:
            self._bypasses.start(request, self._head)
        for queue in self._set.queues:
            for stuck in queue.stuck:
                stuck.overtaken += 1
        return Admitted(request.queue.index, waited_s, self._head is not None)

    def pass_over(self, request_id: str, obstacle: Obstacle) -> None:
        """The candidate cannot run in this step; it keeps its place. Raises QueueError for any other request."""
        if obstacle not in (*_CAPACITY_OBSTACLES, Obstacle.NOT_READY):
            raise QueueError(f"{obstacle} is for the queues to find: report LOADING, NO_ROOM, NO_MEMORY or NOT_READY")
        self._decide(request_id, obstacle)

    def finish(self, request_id: str, now_s: float, num_output_tokens: int) -> None:
        """A running request ended by itself: its tokens return, its duration is learned. Raises QueueError."""
        request = self._running(request_id)
        self._window.ended(request, now_s - request.admitted_s, num_output_tokens)
        self.remove(request_id)

    def remove(self, request_id: str) -> None:
        """A request is aborted or failed, wherever it is. Raises QueueError for one that is unknown."""
        request = self.request(request_id)
        if request is self._candidate:
            self._candidate, self._outcome = None, Obstacle.NOT_READY
        if request is self._head:
            self._head = None
        self._set.leave(request)
        self._bypasses.forget(request)

    def requeue(self, request_id: str, now_s: float, squashed: bool = False) -> None:
        """A running request was preempted or squashed: it returns its tokens and waits at its old place."""
        request = self._running(request_id)
        self._set.leave(request)
        self._bypasses.forget(request)
        self._bypasses.num_squashes += squashed
        request.was_squashed |= squashed
        request.waiting_since_s = now_s
        self._set.enter(request)

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

    def check(self, live_requests: Collection[str] | None = None) -> None:
        """AssertionError unless every request is in exactly one place and every borrowed token is accounted for.

        live_requests: ids of the driver's requests.
        """
        if live_requests is not None:
            strangers = sorted(self._set.requests.keys() ^ set(live_requests))
            assert not strangers, f"requests known only to the queues or only to their driver: {strangers}"
        self._set.check()
        self._bypasses.check()
        for request in self._set.requests.values():
            assert request.queue is self._set.queues[queue_of(request.size, self._layout.cutoffs)], "in another's queue"
        assert self._candidate is None or self._candidate.place is Place.WAITING

    def _price(self, request: QueuedRequest) -> None:
        """Note what the request would borrow if it ran now (rule 2)."""
        entry, request.adapter_tokens = request.entry, 0
        if entry is not None and not entry.running:
            request.adapter_tokens = adapter_tokens(entry.adapter, self._options.sizing)
        request.tokens = request.num_prompt_tokens + request.num_predicted_tokens + request.adapter_tokens

    def _classify(self, request: QueuedRequest) -> None:
        request.size = request_size(request, self._scales, self._options.sizing)
        request.queue = self._set.queues[queue_of(request.size, self._layout.cutoffs)]
        priority = min(max(request.priority, -_MAX_PRIORITY), _MAX_PRIORITY)
        seniority_s = request.arrival_s + priority * self._options.priority_s
        request.order = (request.size if self._discipline.shortest_first else seniority_s, request.arrival)

    def _end_step(self) -> None:
        """Requests that the driver's capacity did not reach are stuck: they must not be left out for ever (rule 6)."""
        undecided = None if self._discipline.boosted else self._candidate
        for request in (undecided, *(queue.at(0) for queue in self._unreached)):
            if request is not None and self._waits_for_others(request):
                request.queue.note_stuck(request)
        self._candidate, self._walk, self._unreached = None, iter(()), []

    def _waits_for_others(self, request: QueuedRequest) -> bool:
        """Whether it is not its own queue's quota, which returns by itself, that keeps a request waiting."""
        queue = request.queue
        lent_to_its_like = queue.free_tokens < request.tokens <= queue.quota_tokens
        return not lent_to_its_like and self._set.has_seat(queue, spare=False)

    def _decide(self, request_id: str, outcome: Obstacle | None) -> QueuedRequest:
        request = self._candidate
        if request is None or request.request_id != request_id:
            raise QueueError(f"request {request_id} is not the candidate of this step: peek first")
        self._candidate, self._outcome = None, outcome
        return request

    def _running(self, request_id: str) -> QueuedRequest:
        if (request := self._set.running.get(request_id)) is None:
            raise QueueError(f"request {request_id} is not running")
        return request

    def _offer_all(self) -> Iterator[QueuedRequest]:
        """Rule 3."""
        for queue in self._set.queues:
            self._unreached.remove(queue)
            queue.stuck.clear()
            queue.resume = None
            yield from self._offer([queue.at(0)], spare=False)
        for queue in self._set.queues:
            if queue.resume is not None and queue.resume.place is Place.WAITING:
                yield from self._offer([queue.resume], spare=True)

    def _offer_in_order(self) -> Iterator[QueuedRequest]:
        """Rule 8."""
        for queue in self._set.queues:
            queue.stuck.clear()
        yield from self._offer([queue.at(0) for queue in self._set.queues], spare=False)

    def _offer(self, heads: Sequence[QueuedRequest | None], spare: bool) -> Iterator[QueuedRequest]:
        """From ``heads`` on, those of different queues, the one with the earliest boosted arrival first."""
        self._head = None
        looks = _MAX_LOOKS
        following = [head for head in heads if head is not None]
        while looks > 0 and following:
            request = min(following, key=self._boosted) if len(following) > 1 else following[0]
            following.remove(request)
            queue, order = request.queue, request.order
            if request.place is Place.WAITING:
                obstacle = self._obstacle(request, self._set.allowance(queue, spare))
                if obstacle is None:
                    yield request
                    obstacle = self._outcome
                if obstacle is not None and not self._goes_on_behind(request, queue, obstacle, spare):
                    break
                looks -= obstacle in (Obstacle.LOADING, Obstacle.NO_ROOM, Obstacle.NO_BYPASS)
            if (behind := queue.after(order)) is not None:
                following.append(behind)
        self._head = None

    def _boosted(self, request: QueuedRequest) -> Order:
        seniority_s, arrival = request.order
        return boosted_s(seniority_s, request.queue.index, self._layout.max_age_s, self._now_s), arrival

    def _offer_nobody(self) -> Iterator[QueuedRequest]:
        self._unreached.clear()
        yield from ()

    def _offer_only(self, held: QueuedRequest) -> Iterator[QueuedRequest]:
        """Rule 6: nobody but ``held`` may run. Let go of it when nothing more can become free for it."""
        self._head = None
        admission = self._room.admission(held)
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

    def _obstacle(self, request: QueuedRequest, allowance: int) -> Obstacle | None:
        admission = self._room.admission(request)
        if admission is Admission.LOADING:
            return Obstacle.LOADING
        request.was_ready |= admission is Admission.READY
        self._price(request)
        if request.tokens > allowance:
            return Obstacle.QUOTA
        if admission is Admission.NO_ROOM:
            return Obstacle.NO_ROOM
        if self._head is not None and not (
            self._bypasses.ends_before(request, self._now_s, self._head_room_s)
            and self._bypasses.affordable(self._num_admissions)
        ):
            return Obstacle.NO_BYPASS
        return None

    def _goes_on_behind(self, request: QueuedRequest, queue: SizeQueue, obstacle: Obstacle, spare: bool) -> bool:
        """Notes why ``request`` does not run; whether this step may look at younger requests of its queue."""
        if obstacle in (Obstacle.NOT_READY, Obstacle.NO_BYPASS):
            return True
        if obstacle is Obstacle.LOADING and not request.was_ready and request.entry is not None:
            self._set.set_aside(request, request.entry)
            return True
        if obstacle is Obstacle.QUOTA:
            if not spare and self._head is None:
                queue.resume = request
            if self._waits_for_others(request):
                queue.note_stuck(request)
            return False
        queue.note_stuck(request)
        if request.overtaken >= self._options.max_overtakes:
            return False
        return obstacle is Obstacle.LOADING or (obstacle is Obstacle.NO_ROOM and self._may_bypass(request))

    def _may_bypass(self, head: QueuedRequest) -> bool:
        if self._head is None and self._discipline.bypass and self._bypasses.affordable(self._num_admissions):
            self._head = head
            self._head_room_s = self._bypasses.room_expected_s(head, self._now_s)
        return self._head is not None and self._head_room_s > self._now_s

    def _most_overtaken(self) -> QueuedRequest | None:
        """The oldest request overtaken so often that the replica is kept free for it; not during its first load."""
        limit = 2 * self._options.max_overtakes
        stuck = [
            request
            for queue in self._set.queues
            for request in queue.stuck
            if request.overtaken >= limit and request.place is Place.WAITING
        ]
        if not stuck:
            return None
        oldest = min(stuck, key=lambda request: request.arrival)
        loading = self._room.admission(oldest) is Admission.LOADING
        return None if loading and not oldest.was_ready else oldest
