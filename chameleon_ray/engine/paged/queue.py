"""The policy's queues in the place of vLLM's waiting queues."""

from collections.abc import Callable, Iterable, Iterator

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request

from chameleon_ray.engine.paged.memory import AdapterMemory
from chameleon_ray.policy.admission import Obstacle


class PolicyQueue(RequestQueue):
    """All waiting requests, of which vLLM sees one at a time: the policy's candidate.

    ``len`` and iteration count everybody; truth, ``peek_request`` and ``pop_request`` know the candidate only. Popping
    one that has been admitted (vLLM tells the connector first) takes it out; popping another one is vLLM's way to say
    that it is not ready, and it goes on waiting at its place.
    """

    def __init__(self, memory: Callable[[], AdapterMemory], fits: Callable[[Request], bool]) -> None:
        """fits: whether KV memory has room for a request; may take it from idle adapters."""
        self._memory = memory
        self._fits = fits
        self._requests: dict[str, Request] = {}
        self._resting: set[str] = set()
        self._candidate: Request | None = None

    def begin_step(self, resting: Iterable[str]) -> None:
        """Forget the last step's candidate. resting: requests that must not be admitted in this step."""
        self._candidate = None
        self._resting = set(resting)

    def add_request(self, request: Request) -> None:
        self._requests[request.request_id] = request
        self._memory().requeue(request)  # One that ran: a session that waits for more input.

    def prepend_request(self, request: Request) -> None:
        """vLLM has preempted it."""
        self._requests[request.request_id] = request
        self._memory().requeue(request, squashed=request.request_id in self._resting)

    def prepend_requests(self, requests: RequestQueue) -> None:
        for request in requests:
            self.prepend_request(request)

    def peek_request(self) -> Request:
        if not self:
            raise IndexError("no waiting request may be admitted")
        assert self._candidate is not None
        return self._candidate

    def pop_request(self) -> Request:
        request, self._candidate = self.peek_request(), None
        if self._memory().is_running(request.request_id):
            del self._requests[request.request_id]
        else:
            self._memory().pass_over(request, Obstacle.NOT_READY)
        return request

    def remove_request(self, request: Request) -> None:
        self.remove_requests([request])

    def remove_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self._requests.pop(request.request_id, None)
            if request is self._candidate:
                self._candidate = None

    def __bool__(self) -> bool:
        if self._candidate is not None:
            return True
        memory = self._memory()
        while (request := memory.candidate()) is not None:
            if request.request_id in self._resting:
                memory.pass_over(request, Obstacle.NOT_READY)
            elif not self._fits(request):
                memory.pass_over(request, Obstacle.NO_MEMORY)
            else:
                self._candidate = request
                return True
        return False

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())


class SkippedQueue(RequestQueue):
    """vLLM's queue of requests that it skipped: always empty, as they all keep their places in ``PolicyQueue``."""

    def __init__(self, waiting: PolicyQueue) -> None:
        self._waiting = waiting

    def add_request(self, request: Request) -> None:
        self._waiting.add_request(request)

    def prepend_request(self, request: Request) -> None:
        pass

    def prepend_requests(self, requests: RequestQueue) -> None:
        pass

    def peek_request(self) -> Request:
        raise IndexError("nobody is skipped")

    def pop_request(self) -> Request:
        raise IndexError("nobody is skipped")

    def remove_request(self, request: Request) -> None:
        pass

    def remove_requests(self, requests: Iterable[Request]) -> None:
        pass

    def __bool__(self) -> bool:
        return False

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[Request]:
        return iter(())
