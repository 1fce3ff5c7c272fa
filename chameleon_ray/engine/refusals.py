"""Requests that the engine's scheduler ends with an error: the reason, on its way past vLLM's OpenAI layer.

vLLM turns every such end into a 500 that says nothing. ``EstimatingLLM`` raises what the scheduler said instead, and
notes it for ``EngineCall``, so that the replica can answer with the reason and with a time to try again.
"""

from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from http import HTTPStatus

from vllm.exceptions import GenerationError
from vllm.outputs import RequestOutput

from chameleon_ray.adapters.errors import AdapterError, AdapterLoadError, AdapterNoRoomError, AdapterRetryLaterError
from chameleon_ray.engine.asgi import AsgiApp, AsgiCall, Head

RETRY_AFTER_S = "chameleon_retry_after_s"
"""Key in the ``kv_transfer_params`` of an output that ends with an error: seconds, or None: no use to try again."""


class RequestRefusedError(GenerationError):
    """The scheduler ended the request. The message is the reason; vLLM puts it into a stream that has begun."""

    def __init__(self, reason: str, retry_after_s: float | None) -> None:
        super().__init__(reason)
        self.status_code = HTTPStatus.BAD_REQUEST if retry_after_s is None else HTTPStatus.SERVICE_UNAVAILABLE
        self.retry_after_s = retry_after_s

    def as_adapter_error(self) -> AdapterError:
        """The same for callers that know nothing of vLLM."""
        if self.retry_after_s is None:
            return AdapterNoRoomError(str(self))
        return AdapterRetryLaterError(AdapterLoadError(str(self)), self.retry_after_s)


class EngineCall(AsgiCall):
    """A call of vLLM's application. Until its first part is out, a refusal is raised as AdapterError."""

    def __init__(self, app: AsgiApp, path: str, body: bytes) -> None:
        super().__init__(app, path, body)
        self._refusals: list[RequestRefusedError] = []
        _refusals.set(self._refusals)  # The application's tasks copy the context that they are started in.

    async def head(self) -> Head:
        head = await super().head()
        self._raise_refusal()
        return head

    async def chunks(self, pause_s: Callable[[], float]) -> AsyncIterator[bytes]:
        begun = False
        async for chunk in super().chunks(pause_s):
            if not begun:
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
            error = RequestRefusedError(part.stop_reason, (output.kv_transfer_params or {}).get(RETRY_AFTER_S))
            if (refusals := _refusals.get()) is not None:
                refusals.append(error)
            raise error
