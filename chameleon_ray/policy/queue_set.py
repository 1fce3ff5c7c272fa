"""All queues of a replica with their requests: every move between places, and every token lent and returned."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable

from chameleon_ray.policy.admission import Admission
from chameleon_ray.policy.disciplines import UNLIMITED, Layout
from chameleon_ray.policy.size_queue import Entry, Place, SizeQueue
from chameleon_ray.policy.sizing import QueuedRequest


class QueueSet:
    """Owner of places and loans: a request is in one place, and used tokens are the loans of running requests."""

    def __init__(self, layout: Layout, max_num_seqs: int | None) -> None:
        self.entries: dict[str, Entry] = {}
        self.running: dict[str, Entry] = {}
        self.adapter_users: dict[str, dict[str, Entry]] = {}
        """Digest -> running requests that use the adapter, in order of admission; the first one has borrowed for it."""
        self.used_tokens = 0
        self.num_moves = 0
        """How often a request began to run or stopped."""
        self.queues = _queues(layout)
        self._total_tokens = sum(layout.quotas)
        self._max_running = UNLIMITED if max_num_seqs is None else max_num_seqs
        self._loading: OrderedDict[str, dict[str, Entry]] = OrderedDict()

    @property
    def free_tokens(self) -> int:
        """Tokens of the whole total that nobody borrows, never negative."""
        return max(0, self._total_tokens - self.used_tokens)

    def enter(self, entry: Entry) -> None:
        """A classified request joins its queue, set aside at once when others wait for its adapter to load."""
        self.entries[entry.request_id] = entry
        adapter = entry.request.adapter
        if adapter is not None and adapter.digest in self._loading:
            self._join_loading(entry)
        else:
            entry.place = Place.WAITING
            entry.queue.insert(entry)

    def set_aside(self, entry: Entry) -> None:
        """A waiting request's adapter is loading: steps need not look at it until ``recall``."""
        entry.queue.remove(entry)
        self._join_loading(entry)

    def ask_next(self, digest: str) -> None:
        """Something has happened to an adapter: ``recall`` asks about it before others."""
        if digest in self._loading:
            self._loading.move_to_end(digest, last=False)

    def recall(self, admission: Callable[[QueuedRequest], Admission], max_asked: int) -> None:
        """Requests whose adapter is not loading any more go back to their places; asks about ``max_asked``, in turn."""
        recalled: dict[int, list[Entry]] = {}
        for digest in [digest for digest, _ in zip(self._loading, range(max_asked), strict=False)]:
            group = self._loading[digest]
            if admission(next(iter(group.values())).request) is Admission.LOADING:
                self._loading.move_to_end(digest)
                continue
            del self._loading[digest]
            for entry in group.values():
                entry.place = Place.WAITING
                entry.queue.num_loading -= 1
                recalled.setdefault(entry.queue.index, []).append(entry)
        for index, entries in recalled.items():
            self.queues[index].insert_all(entries)

    def run(self, entry: Entry, now_s: float) -> None:
        """A waiting request runs: it borrows from its own queue, then from queues where nobody waits.

        What is still missing overdraws its own queue: a request that runs as the only one of it, or was held for.
        """
        queue, adapter = entry.queue, entry.request.adapter
        queue.remove(entry)
        entry.place = Place.RUNNING
        entry.admitted_s = now_s
        self.running[entry.request_id] = entry
        self.num_moves += 1
        if adapter is not None:
            self.adapter_users.setdefault(adapter.digest, {})[entry.request_id] = entry
        queue.num_running += 1
        self.used_tokens += entry.tokens
        own = min(queue.free_tokens, entry.tokens)
        if missing := entry.tokens - own:
            for lender in self.queues:
                if not lender and lender is not queue and (lent := min(lender.free_tokens, missing)):
                    missing -= lent
                    self._lend(entry, lender, lent)
        self._lend(entry, queue, own + missing)

    def leave(self, entry: Entry) -> None:
        """A request leaves its place, wherever that is, and returns what it borrowed."""
        if entry.place is Place.WAITING:
            entry.queue.remove(entry)
        elif entry.place is Place.LOADING:
            assert entry.request.adapter is not None
            digest = entry.request.adapter.digest
            del self._loading[digest][entry.request_id]
            entry.queue.num_loading -= 1
            if not self._loading[digest]:
                del self._loading[digest]
        else:
            del self.running[entry.request_id]
            self.num_moves += 1
            entry.queue.num_running -= 1
            self.used_tokens -= entry.tokens
            for lender, tokens in entry.loans:
                lender.used_tokens -= tokens
            entry.loans = []
            if entry.request.adapter is not None:
                self._leave_adapter(entry, entry.request.adapter.digest)
        entry.place = Place.GONE
        del self.entries[entry.request_id]

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

    def returned_by(self, leaving: Collection[Entry], queue: SizeQueue) -> int:
        """Tokens that ``queue`` would get back if the running requests ``leaving`` left together."""
        tokens = sum(lent for entry in leaving for lender, lent in entry.loans if lender is queue)
        for entry in leaving:
            if entry.adapter_tokens and entry.request.adapter is not None:
                users = self.adapter_users[entry.request.adapter.digest].values()
                heir = next((user for user in users if user not in leaving), None)
                tokens -= entry.adapter_tokens if heir is not None and heir.queue is queue else 0
        return tokens

    def rearrange(self, layout: Layout, classify: Callable[[Entry], None]) -> None:
        """New queues: every request moves to its own by ``classify``, in order, running ones with their loans."""
        stuck = [entry for queue in self.queues for entry in queue.stuck if entry.place is not Place.GONE]
        self.queues = _queues(layout)
        self._total_tokens = sum(layout.quotas)
        members: list[list[Entry]] = [[] for _ in self.queues]
        for entry in self.entries.values():
            classify(entry)
            if entry.place is Place.WAITING:
                members[entry.queue.index].append(entry)
            elif entry.place is Place.LOADING:
                entry.queue.num_loading += 1
            else:
                entry.queue.num_running += 1
                entry.loans = []
                self._lend(entry, entry.queue, entry.tokens)
        for queue, waiting in zip(self.queues, members, strict=True):
            queue.insert_all(waiting)
        for entry in stuck:
            entry.queue.note_stuck(entry)

    def check(self) -> None:
        """AssertionError unless every request is in exactly one place and every borrowed token is accounted for."""
        waiting = [entry for queue in self.queues for entry in queue.waiting()]
        loading = [entry for group in self._loading.values() for entry in group.values()]
        running = list(self.running.values())
        for place, entries in ((Place.WAITING, waiting), (Place.LOADING, loading), (Place.RUNNING, running)):
            assert all(entry.place is place for entry in entries), f"a request is not {place.value}"
        found = sorted(entry.request_id for entry in (*waiting, *loading, *running))
        assert found == sorted(self.entries), "a request is lost or in two places"
        for queue in self.queues:
            orders = [entry.order for entry in queue.waiting()]
            assert orders == sorted(orders), f"queue {queue.index} is out of order"
            assert all(entry.queue is queue for entry in queue.waiting()), (
                f"queue {queue.index} holds another's request"
            )
            assert queue.num_running == sum(entry.queue is queue for entry in running)
            assert queue.num_loading == sum(entry.queue is queue for entry in loading)
            lent = _total(tokens for entry in running for lender, tokens in entry.loans if lender is queue)
            assert queue.used_tokens == lent, f"queue {queue.index}: {queue.used_tokens} tokens used, {lent} lent"
        for entry in self.entries.values():
            borrowed = entry.tokens if entry.place is Place.RUNNING else 0
            assert _total(tokens for _, tokens in entry.loans) == borrowed, f"{entry.request_id} borrowed otherwise"
        assert self.used_tokens == sum(entry.tokens for entry in running)
        with_adapter = {entry.request_id for entry in running if entry.request.adapter is not None}
        assert {r for users in self.adapter_users.values() for r in users} == with_adapter, "users are not running"
        for digest, users in self.adapter_users.items():
            borrowers = [request_id for request_id, entry in users.items() if entry.adapter_tokens]
            assert borrowers in ([], [next(iter(users))]), f"{borrowers} borrowed for {digest}"

    def _leave_adapter(self, entry: Entry, digest: str) -> None:
        """The adapter stays in memory while others use it: the next one of them borrows for it from its own queue."""
        users = self.adapter_users[digest]
        del users[entry.request_id]
        if not users:
            del self.adapter_users[digest]
        elif entry.adapter_tokens:
            heir = next(iter(users.values()))
            heir.adapter_tokens = entry.adapter_tokens
            heir.tokens += entry.adapter_tokens
            self.used_tokens += entry.adapter_tokens
            self._lend(heir, heir.queue, entry.adapter_tokens)

    def _join_loading(self, entry: Entry) -> None:
        assert entry.request.adapter is not None
        entry.place = Place.LOADING
        entry.queue.num_loading += 1
        self._loading.setdefault(entry.request.adapter.digest, {})[entry.request_id] = entry

    def _lend(self, entry: Entry, lender: SizeQueue, tokens: int) -> None:
        lender.used_tokens += tokens
        entry.loans.append((lender, tokens))


def _queues(layout: Layout) -> list[SizeQueue]:
    shares = zip(layout.quotas, layout.seats, strict=True)
    return [SizeQueue(index, quota, seats) for index, (quota, seats) in enumerate(shares)]


def _total(loans: Iterable[int]) -> int:
    amounts = list(loans)
    assert min(amounts, default=0) >= 0, "a loan is negative"
    return sum(amounts)
