"""All queues of a replica with their requests: every move between places, and every token lent and returned."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable

from chameleon_ray.policy.admission import Admission
from chameleon_ray.policy.disciplines import UNLIMITED, Layout
from chameleon_ray.policy.records import CacheEntry, Place, QueuedRequest, SizeQueue


class QueueSet:
    """Owner of places and loans: a request is in one place, and used tokens are the loans of running requests.

    Of the requests that run on an adapter (``CacheEntry.running``), the first one has borrowed for it.
    """

    def __init__(self, layout: Layout, max_num_seqs: int | None) -> None:
        self.requests: dict[str, QueuedRequest] = {}
        self.running: dict[str, QueuedRequest] = {}
        self.used_tokens = 0
        self.num_moves = 0
        """How often a request began to run or stopped."""
        self.queues = _queues(layout)
        self._total_tokens = sum(layout.quotas)
        self._max_running = UNLIMITED if max_num_seqs is None else max_num_seqs
        self._loading: OrderedDict[str, CacheEntry] = OrderedDict()
        """Adapters for whose loading requests are set aside, by digest."""

    @property
    def free_tokens(self) -> int:
        """Tokens of the whole total that nobody borrows, never negative."""
        return max(0, self._total_tokens - self.used_tokens)

    def enter(self, request: QueuedRequest) -> None:
        """A classified request joins its queue, set aside at once when others wait for its adapter to load."""
        self.requests[request.request_id] = request
        entry = request.entry
        if entry is not None:
            youngest = next(reversed(entry.queued.values()), None)
            entry.queued[request.request_id] = request
            if youngest is not None and youngest.arrival > request.arrival:  # It had run.
                entry.queued = dict(sorted(entry.queued.items(), key=lambda item: item[1].arrival))
        if entry is not None and entry.digest in self._loading:
            self._join_loading(request, entry)
        else:
            request.place = Place.WAITING
            request.queue.insert([request])

    def set_aside(self, request: QueuedRequest, entry: CacheEntry) -> None:
        """A waiting request's adapter is loading: steps need not look at it until ``recall``."""
        request.queue.remove(request)
        self._join_loading(request, entry)

    def ask_next(self, digest: str) -> None:
        """Something has happened to an adapter: ``recall`` asks about it before others."""
        if digest in self._loading:
            self._loading.move_to_end(digest, last=False)

    def recall(self, admission: Callable[[QueuedRequest], Admission], max_asked: int) -> None:
        """Requests whose adapter is not loading any more go back to their places; asks about ``max_asked``, in turn."""
        recalled: dict[int, list[QueuedRequest]] = {}
        for digest, entry in [item for item, _ in zip(self._loading.items(), range(max_asked), strict=False)]:
            if admission(next(iter(entry.queued.values()))) is Admission.LOADING:
                self._loading.move_to_end(digest)
                continue
            del self._loading[digest]
            for request in entry.queued.values():
                if request.place is Place.LOADING:
                    request.place = Place.WAITING
                    request.queue.num_loading -= 1
                    recalled.setdefault(request.queue.index, []).append(request)
        for index, requests in recalled.items():
            self.queues[index].insert(requests)

    def run(self, request: QueuedRequest, now_s: float) -> None:
        """A waiting request runs: it borrows from its own queue, then from queues where nobody waits.

        What is still missing overdraws its own queue: a request that runs as the only one of it, or was held for.
        """
        queue = request.queue
        queue.remove(request)
        request.place = Place.RUNNING
        request.admitted_s = now_s
        self.running[request.request_id] = request
        self.num_moves += 1
        if request.entry is not None:
            request.entry.running[request.request_id] = request.entry.queued.pop(request.request_id)
        queue.num_running += 1
        self.used_tokens += request.tokens
        own = min(queue.free_tokens, request.tokens)
        if missing := request.tokens - own:
            for lender in self.queues:
                if not lender and lender is not queue and (lent := min(lender.free_tokens, missing)):
                    missing -= lent
                    self._lend(request, lender, lent)
        self._lend(request, queue, own + missing)

    def leave(self, request: QueuedRequest) -> None:
        """A request leaves its place, wherever that is, and returns what it borrowed."""
        entry, place = request.entry, request.place
        request.place = Place.GONE
        del self.requests[request.request_id]
        if place is Place.RUNNING:
            del self.running[request.request_id]
            self.num_moves += 1
            request.queue.num_running -= 1
            self.used_tokens -= request.tokens
            for lender, tokens in request.loans:
                lender.used_tokens -= tokens
            request.loans = []
            if entry is not None:
                del entry.running[request.request_id]
                self._inherit(request, entry)
            return
        if entry is not None:
            del entry.queued[request.request_id]
        if place is Place.WAITING:
            request.queue.remove(request)
        elif entry is not None:
            request.queue.num_loading -= 1
            if all(other.place is not Place.LOADING for other in entry.queued.values()):
                del self._loading[entry.digest]

    def allowance(self, queue: SizeQueue, spare: bool) -> int:
        """Tokens that the next request of ``queue`` may borrow, -1 without a seat; without limit when nobody runs.

        The same until somebody runs or stops. A queue that lends nothing may lend all that is free, so that a request
        above its quota runs as its only one. spare: with what queues in which nobody waits have left. The total bounds
        all: after a refresh, loans can exceed some quotas while other queues still have theirs.
        """
        if not self.running:
            return UNLIMITED
        if not self.has_seat(queue, spare):
            return -1
        if not queue.used_tokens:
            return self.free_tokens
        tokens = queue.free_tokens
        if spare:
            tokens += sum(lender.free_tokens for lender in self.queues if not lender and lender is not queue)
        return min(tokens, self.free_tokens)

    def has_seat(self, queue: SizeQueue, spare: bool) -> bool:
        """Whether the next request of ``queue`` finds a seat of its share, or a ``spare`` one that nobody waits for."""
        if queue.num_running < queue.max_running or not self.running:
            return True
        if not spare:
            return False
        kept = sum(other.free_seats for other in self.queues if other and other is not queue)
        return len(self.running) + kept < self._max_running

    def returned_by(self, leaving: Collection[QueuedRequest], queue: SizeQueue) -> int:
        """Tokens that ``queue`` would get back if the running requests ``leaving`` left together."""
        tokens = sum(lent for request in leaving for lender, lent in request.loans if lender is queue)
        for request in leaving:
            if request.adapter_tokens and request.entry is not None:
                heir = next((user for user in request.entry.running.values() if user not in leaving), None)
                tokens -= request.adapter_tokens if heir is not None and heir.queue is queue else 0
        return tokens

    def rearrange(self, layout: Layout, classify: Callable[[QueuedRequest], None]) -> None:
        """New queues: every request moves to its own by ``classify``, in order, running ones with their loans."""
        stuck = [request for queue in self.queues for request in queue.stuck if request.place is not Place.GONE]
        self.queues = _queues(layout)
        self._total_tokens = sum(layout.quotas)
        members: list[list[QueuedRequest]] = [[] for _ in self.queues]
        for request in self.requests.values():
            classify(request)
            if request.place is Place.WAITING:
                members[request.queue.index].append(request)
            elif request.place is Place.LOADING:
                request.queue.num_loading += 1
            else:
                request.queue.num_running += 1
                request.loans = []
                self._lend(request, request.queue, request.tokens)
        for queue, waiting in zip(self.queues, members, strict=True):
            queue.insert(waiting)
        for request in stuck:
            request.queue.note_stuck(request)

    def check(self) -> None:
        """AssertionError unless every request is in exactly one place and every borrowed token is accounted for."""
        requests = self.requests.values()
        running = {request_id for request_id, one in self.requests.items() if one.place is Place.RUNNING}
        assert running == self.running.keys(), "a request is in two places"
        for queue in self.queues:
            waiting = [one for one in requests if one.place is Place.WAITING and one.queue is queue]
            assert sorted(waiting, key=lambda one: one.order) == queue.waiting(), f"queue {queue.index} is out of order"
            assert queue.num_running == sum(one.queue is queue for one in self.running.values())
            assert queue.num_loading == sum(one.queue is queue and one.place is Place.LOADING for one in requests)
            lent = _total(tokens for one in requests for lender, tokens in one.loans if lender is queue)
            assert queue.used_tokens == lent, f"queue {queue.index}: {queue.used_tokens} tokens used, {lent} lent"
        for request in requests:
            borrowed = request.tokens if request.place is Place.RUNNING else 0
            assert _total(tokens for _, tokens in request.loans) == borrowed, f"{request.request_id} borrowed otherwise"
            if (entry := request.entry) is not None:
                users = entry.running if request.place is Place.RUNNING else entry.queued
                assert users.get(request.request_id) is request, f"{request.request_id} is not with its adapter"
                assert request.place is not Place.LOADING or self._loading.get(entry.digest) is entry
                if request.place is Place.RUNNING and request.adapter_tokens:
                    assert request is next(iter(users.values())), f"two have borrowed for adapter {entry.digest}"
        assert self.used_tokens == sum(request.tokens for request in self.running.values())
        for entry in self._loading.values():
            assert any(one.place is Place.LOADING for one in entry.queued.values()), f"nobody awaits {entry.digest}"

    def _inherit(self, request: QueuedRequest, entry: CacheEntry) -> None:
        """The adapter stays in memory while others use it: the next one of them borrows for it from its own queue."""
        if request.adapter_tokens and entry.running:
            heir = next(iter(entry.running.values()))
            heir.adapter_tokens = request.adapter_tokens
            heir.tokens += request.adapter_tokens
            self.used_tokens += request.adapter_tokens
            self._lend(heir, heir.queue, request.adapter_tokens)

    def _join_loading(self, request: QueuedRequest, entry: CacheEntry) -> None:
        request.place = Place.LOADING
        request.queue.num_loading += 1
        self._loading[entry.digest] = entry

    def _lend(self, request: QueuedRequest, lender: SizeQueue, tokens: int) -> None:
        lender.used_tokens += tokens
        request.loans.append((lender, tokens))


def _queues(layout: Layout) -> list[SizeQueue]:
    shares = zip(layout.quotas, layout.seats, strict=True)
    return [SizeQueue(index, quota, seats) for index, (quota, seats) in enumerate(shares)]


def _total(loans: Iterable[int]) -> int:
    amounts = list(loans)
    assert min(amounts, default=0) >= 0, "a loan is negative"
    return sum(amounts)
