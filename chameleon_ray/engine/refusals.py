"""Requests that the engine's scheduler ends with an error: the reason, on its way past vLLM's OpenAI layer.

vLLM turns every such end into a 500 that says nothing. ``EstimatingLLM`` raises what the scheduler said instead, and
notes it for ``EngineCall``, so that the replica can answer with the reason and with a time to try again.
"""

from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from http import HTTPStatus

from vllm.exceptions import GenerationError
from vllm.outputs import RequestOutput

from chameleon_ray.adapters.errors import AdapterError, AdapterLoadError, AdapterRetryLaterError
from chameleon_ray.engine.asgi import AsgiApp, AsgiCall, Head
from chameleon_ray.engine.inspection import engine_error
from chameleon_ray.engine.resuming import Recorder, recorder
from chameleon_ray.progress import NO_PROGRESS, Progress

CODE, RETRY_AFTER_S = "chameleon_code", "chameleon_retry_after_s"
"""Keys in the ``kv_transfer_params`` of an output that ends with an error: an AdapterError's code; seconds, or None: no
use to try again."""


class RequestRefusedError(GenerationError):
    """The scheduler ended the request. The message is the reason; vLLM puts it into a stream that has begun."""

    def __init__(self, code: str, reason: str, retry_after_s: float | None) -> None:
        super().__init__(reason)
        self._error = engine_error(code, reason)
        self.status_code = HTTPStatus(self._error.http_status)
        self.retry_after_s = retry_after_s

    def as_adapter_error(self) -> AdapterError:
        """The same for callers that know nothing of vLLM."""
        return self._error if self.retry_after_s is None else AdapterRetryLaterError(self._error, self.retry_after_s)


class EngineCall(AsgiCall):
    """A call of vLLM's application. Until its first part is out, a refusal is raised as AdapterError."""

    def __init__(
        self, app: AsgiApp, path: str, body: bytes, request_id: str | None = None, earlier: Progress = NO_PROGRESS
    ) -> None:
        """request_id: the answer's, without vLLM's prefix. earlier: what another engine has made of the answer."""
        super().__init__(app, path, body, {} if request_id is None else {"x-request-id": request_id})
        self._recorder = Recorder(earlier)
        recorder.set(self._recorder)
        self._refusals: list[RequestRefusedError] = []
        _refusals.set(self._refusals)  # The application's tasks copy the context that they are started in.

    def take_progress(self) -> Progress:
        return self._recorder.take()

    async def head(self) -> Head:
        head = await super().head()
        self._raise_refusal()
        return head

    async def chunks(self, pause_s: Callable[[], float], max_silence_s: float | None = None) -> AsyncIterator[bytes]:
        begun = False
        async for chunk in super().chunks(pause_s, max_silence_s):
            if chunk and not begun:
                self._raise_refusal()
                begun = True
            yield chunk

    def _raise_refusal(self) -> None:
        if self._refusals:
            raise self._refusals[0].as_adapter_error() from self._refusals[0]


_refusals: ContextVar[list[RequestRefusedError] | None] = ContextVar("refusals", default=None)


def raise_refused(output: RequestOutput) -> None:
    """Raise RequestRefusedError if the scheduler has ended the request with a reason, and note it for the call."""
    for part in output.outputs:
        if part.finish_reason == "error" and isinstance(part.stop_reason, str):
            told = output.kv_transfer_params or {}
            code = told.get(CODE, AdapterLoadError.code)
            error = RequestRefusedError(code, part.stop_reason, told.get(RETRY_AFTER_S))
            if (refusals := _refusals.get()) is not None:
                refusals.append(error)
            raise error
