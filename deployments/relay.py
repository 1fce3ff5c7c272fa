"""A client's request on its way to a replica and back."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from chameleon_ray import metrics
from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.config import AppConfig
from chameleon_ray.openai_errors import ApiError, sse_error
from deployments.http import json_object, read_body, retry_after
from deployments.models import Models

logger = logging.getLogger("ray.serve")

FOREIGN_ADAPTER_FIELDS = ("lora_path", "lora_name", "lora_request", "adapter_id")
"""How other servers' requests name an adapter (SGLang, LoRAX, TGI, vLLM in Python); vLLM's server ignores them all."""


class Relay:
    """Hands requests to the replica that the router chooses and passes its answer on, byte for byte."""

    def __init__(self, config: AppConfig, models: Models, replica: DeploymentHandle):
        self._config = config
        self._models = models
        self._replica = replica

    async def __call__(self, request: Request) -> Response:
        """The replica's answer to an OpenAI request. Raises ApiError."""
        body = await read_body(request, self._config)
        fields = json_object(body)
        model = fields.get("model") or self._models.base
        # a model of a wrong type is the replica's to refuse: it knows the protocol
        record = await self._models.resolve(model) if isinstance(model, str) else None
        check_adapter_fields(fields, record)
        call = (request.url.path, body, model, record)
        relayed = self._stream(record, call) if fields.get("stream") else self._whole(record, call)
        return await _while_connected(request, relayed)

    async def _whole(self, record: AdapterRecord | None, call: tuple[Any, ...]) -> Response:
        answer = self._replica.options(method_name="answer", multiplexed_model_id=_affinity(record))

        async def attempt() -> Any:
            response = answer.remote(*call)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise

        status, media_type, content, engine_s, retry_after_s = await once_more(attempt)
        headers = _timing(engine_s) | retry_after(retry_after_s)
        return Response(content, status_code=status, media_type=media_type, headers=headers)

    async def _stream(self, record: AdapterRecord | None, call: tuple[Any, ...]) -> Response:
        stream = self._replica.options(method_name="stream", stream=True, multiplexed_model_id=_affinity(record))

        async def begin() -> tuple[DeploymentResponseGenerator[Any], Any]:
            parts = stream.remote(*call)
            try:
                return parts, await anext(parts)
            except asyncio.CancelledError:
                parts.cancel()
                raise

        parts, (status, media_type, first, engine_s, retry_after_s) = await once_more(begin)
        if status != 200:
            return Response(first, status_code=status, media_type=media_type, headers=retry_after(retry_after_s))
        return StreamingResponse(_rest(parts, first), media_type=media_type, headers=_timing(engine_s))


def check_adapter_fields(fields: dict[str, Any], record: AdapterRecord | None) -> None:
    """ApiError 400 when a field by which other servers choose an adapter asks for another one than ``model`` does.

    record: the adapter that ``model`` names; None for the base model. Such a field is no obstacle when it is null or
    the very name of that adapter.
    """
    for field in FOREIGN_ADAPTER_FIELDS:
        value = fields.get(field)
        if value is None or (record is not None and value == record.name):
            continue
        chosen = "the base model" if record is None else f"the adapter {record.name!r}"
        message = (
            f"'{field}' does not choose an adapter here, and 'model' names {chosen}: name the adapter in 'model' "
            f"(GET /v1/models lists them) and leave '{field}' out."
        )
        raise ApiError(400, message, "invalid_request_error", param=field)


async def _while_connected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """What ``work`` returns; cancelled when the client goes first (its body has been read: only that can come).

    From a stream's first token on, its response looks after that itself.
    """
    working, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "The client closed the connection.", "client_closed_request")
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _rest(parts: DeploymentResponseGenerator[Any], first: bytes) -> AsyncIterator[bytes]:
    """A stream's body. A replica that fails ends it with an error event, never silently."""
    try:
        yield first
        async for part in parts:
            yield part
    except (asyncio.CancelledError, GeneratorExit):  # the client has gone
        parts.cancel()
        raise
    except RayActorError as error:
        logger.warning("a replica died while it streamed: %s", error)
        metrics.BROKEN_STREAMS.counter().inc()
        yield sse_error(502, "The replica serving this request died; the answer is incomplete.", "replica_died")
    except Exception:
        logger.exception("a stream failed")
        metrics.BROKEN_STREAMS.counter().inc()
        yield sse_error(500, "Internal error; the answer is incomplete.", "server_error")


async def once_more(attempt: Callable[[], Awaitable[Any]]) -> Any:
    """The attempt's result; when the replica dies under it (nothing was sent yet), that of one more attempt."""
    try:
        return await attempt()
    except RayActorError as error:
        logger.warning("a replica died before it answered, trying another one: %s", error)
        metrics.RETRIES.counter().inc()
    try:
        return await attempt()
    except RayActorError as error:
        message = "Two replicas died while they served this request; try again."
        raise ApiError(502, message, "replica_died", retry_after_s=1) from error


def _timing(engine_s: float) -> dict[str, str]:
    """What the engine took, for whoever wonders where the time went (a stream: until its first token)."""
    return {"Server-Timing": f"engine;dur={engine_s * 1e3:.2f}"}


def _affinity(record: AdapterRecord | None) -> str:
    """What the router knows the request by."""
    return "" if record is None else record.digest
