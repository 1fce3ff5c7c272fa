"""A replica's memory in miniature, for tests of the queues: adapters and running requests share a pool of tokens."""

from chameleon_ray.policy.adapter import Adapter
from chameleon_ray.policy.admission import Admission, Obstacle
from chameleon_ray.policy.disciplines import QueueOptions
from chameleon_ray.policy.queues import RequestQueues
from chameleon_ray.policy.records import CacheEntry, Place, QueuedRequest
from chameleon_ray.policy.sizing import SizingOptions

SIZING = SizingOptions(kv_token_bytes=1, max_input_tokens=100, max_output_tokens=100, max_adapter_bytes=1)
"""A base request of t/2 + t/2 tokens has size t/200: static queues end at 50, 100 and 150 tokens."""


def request(request_id, tokens, adapter=None, priority=0):
    """A request of ``tokens`` without its adapter's; ``adapter`` is a digest, or an Adapter."""
    if isinstance(adapter, str):
        adapter = Adapter(adapter, rank=8, size_bytes=1)
    prompt = tokens // 2
    return QueuedRequest(request_id, prompt, tokens - prompt, adapter, priority)


class Queues(RequestQueues):
    """The queues of a replica, with records of adapters: in a replica the cache has those."""

    def __init__(self, *args):
        super().__init__(*args)
        self.entries = {}

    def add(self, request, now_s):
        if request.adapter is not None:
            request.entry = self.entries.setdefault(request.adapter.digest, CacheEntry(request.adapter, 1))
        super().add(request, now_s)

    def waiting(self, queue):
        """Requests that wait in one queue, in order, those with loading adapters included."""
        waiting = [one for one in self._set.requests.values() if one.place is not Place.RUNNING]
        return sorted((one for one in waiting if one.queue.index == queue), key=lambda one: one.order)


class Room:
    """Answers as told: ``admissions`` by digest (READY otherwise); ``needed_ends``: who must end before any fits."""

    def __init__(self):
        self.admissions = {}
        self.needed_ends = frozenset()

    def admission(self, asked):
        return self.admissions.get(asked.adapter.digest, Admission.READY) if asked.adapter else Admission.READY

    def ends_needed(self, asked, leaving):
        return next(
            (n for n in range(len(leaving) + 1) if self.needed_ends <= {one.request_id for one in leaving[:n]}), None
        )


def queues(scheduler="static", room=None, total_tokens=1200, **options):
    options.setdefault("sizing", SIZING)
    return Queues(scheduler, QueueOptions(total_tokens, **options), room or Room())


def step(under_test, now_s=0.0, max_admitted=None, obstacles=None):
    """One step of a driver: ids admitted, in order. ``obstacles``: by request id, what the driver finds in its way."""
    admitted = []
    under_test.begin_step(now_s)
    while (max_admitted is None or len(admitted) < max_admitted) and (candidate := under_test.peek()):
        obstacle = (obstacles or {}).get(candidate.request_id)
        if obstacle is None:
            under_test.admit(candidate.request_id)
            admitted.append(candidate.request_id)
        else:
            under_test.pass_over(candidate.request_id, obstacle)
        under_test.check()
    return admitted


__all__ = ["SIZING", "Obstacle", "Room", "queues", "request", "step"]
