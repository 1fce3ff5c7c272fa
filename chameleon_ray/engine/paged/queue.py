"""The waiting queue that lets requests pass whose adapter is still loading."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request


class ResidencyQueue(RequestQueue):
    """A vLLM queue of which only admissible requests can be seen at the front.

    ``len`` and iteration count everybody; truth, ``peek_request`` and ``pop_request`` know the admissible only, so that
    vLLM does not pass the others over one by one in every step (at the cost of a prefix-cache lookup each).
    ``refresh`` decides anew, once per step. Order among the admissible is the inner queue's.
    """

    def __init__(self, inner: RequestQueue, is_ready: Callable[[Request], bool]) -> None:
        self._inner = inner
        self._is_ready = is_ready
        self._ready: deque[Request] = deque()

    def refresh(self, admissible: Iterable[Request]) -> None:
        """From now on these may be admitted, in this order."""
        self._ready = deque(admissible)

    def add_request(self, request: Request) -> None:
        self._inner.add_request(request)

    def prepend_request(self, request: Request) -> None:
        self._inner.prepend_request(request)

    def prepend_requests(self, requests: RequestQueue) -> None:
        self._inner.prepend_requests(requests)

    def peek_request(self) -> Request:
        if not self:
            raise IndexError("no waiting request may be admitted")
        return self._ready[0]

    def pop_request(self) -> Request:
        request = self.peek_request()
        self._ready.popleft()
        self._inner.remove_request(request)
        return request

    def remove_request(self, request: Request) -> None:
        self._inner.remove_request(request)
        self._ready = deque(waiting for waiting in self._ready if waiting is not request)

    def remove_requests(self, requests: Iterable[Request]) -> None:
        gone = set(requests)
        self._inner.remove_requests(gone)
        self._ready = deque(request for request in self._ready if request not in gone)

    def __bool__(self) -> bool:
        # An adapter may have left since ``refresh``: the KV cache took its blocks within this step.
        while self._ready and not self._is_ready(self._ready[0]):
            self._ready.popleft()
        return bool(self._ready)

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._inner)
