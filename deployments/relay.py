"""A client's request on its way to a replica and back."""

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from chameleon_ray import metrics
from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.config import AppConfig
from chameleon_ray.openai_errors import ApiError, sse_error
from deployments.http import json_object, read_body, retry_after
from deployments.migration import MigratingRequest
from deployments.models import Models
from deployments.parts import Part, RelayedRequest

logger = logging.getLogger("ray.serve")

FOREIGN_ADAPTER_FIELDS = ("lora_path", "lora_name", "lora_request", "adapter_id")
"""How other servers' requests name an adapter (SGLang, LoRAX, TGI, vLLM in Python); vLLM's server ignores them all."""


class Relay:
    """Hands requests to the replica that the router chooses and passes its answer on, byte for byte."""

    def __init__(self, config: AppConfig, models: Models, replica: DeploymentHandle[Any]):
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
        request_id = None if fields.get("request_id") else uuid.uuid4().hex
        call = RelayedRequest(request.url.path, body, model, record, request_id, bool(fields.get("stream")))
        answer = self._replica.options(method_name="answer", stream=True, multiplexed_model_id=_affinity(record))
        parts = MigratingRequest(answer, call, self._config.relay).parts()
        return await _while_connected(request, _response(parts, call.is_streamed))


async def _response(parts: AsyncGenerator[Part, None], is_streamed: bool) -> Response:
    """The answer as soon as its first content is there."""
    try:
        first = await anext(parts)
    except BaseException:
        await parts.aclose()
        raise
    head = first.head
    assert head is not None
    headers = {"Server-Timing": f"engine;dur={head.engine_s * 1e3:.2f}"} | retry_after(head.retry_after_s)
    if is_streamed and head.status == 200:
        return StreamingResponse(_rest(parts, first.content), media_type=head.media_type, headers=headers)
    content = first.content + b"".join([part.content async for part in parts])
    return Response(content, status_code=head.status, media_type=head.media_type, headers=headers)


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


async def _rest(parts: AsyncGenerator[Part, None], first: bytes) -> AsyncIterator[bytes]:
    """A stream's body. One that cannot be completed ends with an error event, never silently."""
    try:
        async with aclosing(parts):
            yield first
            async for part in parts:
                yield part.content
    except ApiError as error:
        metrics.BROKEN_STREAMS.counter().inc()
        yield sse_error(error.status, error.message, error.kind)
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


def _affinity(record: AdapterRecord | None) -> str:
    """What the router knows the request by."""
    return "" if record is None else record.digest
