"""The HTTP ingress: authenticates, resolves the adapter, routes to a replica and relays its answer. No model code."""

import asyncio
import hmac
import ipaddress
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from chameleon_ray.adapters.catalog import check_name, split_model
from chameleon_ray.adapters.errors import AdapterError
from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.config import AppConfig
from chameleon_ray.metrics import IngressMetrics
from chameleon_ray.openai_errors import JSON, ApiError, sse_error, unknown_model
from chameleon_ray.placement import (
    AdapterUnknownError,
    CatalogConflictError,
    CatalogStore,
    PlacementUnavailableError,
    shared_follower,
)

logger = logging.getLogger("ray.serve")
app = FastAPI(title="chameleon-ray", docs_url=None, redoc_url=None, openapi_url=None)

MIB = 2**20
LOOKUP_MEMORY_S = 0.5
"""A name that Redis did not know is not looked up again for this long."""
MAX_ABSENT_NAMES = 10_000


@serve.ingress(app)
class Ingress:
    """One of the application's front doors; all of them are alike and share nothing but Redis."""

    def __init__(self, config: dict[str, Any], replica: DeploymentHandle):
        self._config = AppConfig.model_validate(config)
        self._api = self._config.api.resolved()
        self._base = self._config.model.served_name
        self._started_s = int(time.time())
        self._replica = replica
        self._follower = shared_follower(self._config.redis)
        self._store = CatalogStore(self._config.redis, self._follower.view)
        self._absent: dict[str, float] = {}
        self._metrics = IngressMetrics()
        self._peers: DeploymentHandle | None = None

    # -- the OpenAI API ------------------------------------------------------------------------------------------------

    @app.post("/v1/chat/completions")
    async def chat_completions(self, request: Request) -> Response:
        return await self._answer(request, self._relay)

    @app.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        return await self._answer(request, self._relay)

    @app.get("/v1/models")
    async def models(self, request: Request) -> Response:
        return await self._answer(request, self._list_models)

    @app.get("/v1/models/{model:path}")
    async def model(self, request: Request, model: str) -> Response:
        async def card(_: Request) -> Response:
            return JSONResponse(self._model_card(await self._resolve(model)))

        return await self._answer(request, card)

    # -- adapters ------------------------------------------------------------------------------------------------------

    @app.post("/v1/load_lora_adapter")
    async def load_lora_adapter(self, request: Request) -> Response:
        return await self._answer(request, self._load_adapter, admin=True)

    @app.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(self, request: Request) -> Response:
        return await self._answer(request, self._unload_adapter, admin=True)

    # -- operations ----------------------------------------------------------------------------------------------------

    @app.get("/health")
    async def health(self) -> Response:
        """200 while requests can be served; ``degraded`` when Redis is away. 503 without a replica."""
        view = self._follower.view()
        replicas = len(view.replicas)
        serving = replicas > 0 or not view.connected
        status = "unavailable" if not serving else "ok" if view.connected else "degraded"
        body = {"status": status, "redis": "connected" if view.connected else "disconnected", "replicas": replicas}
        return JSONResponse(body, status_code=200 if serving else 503)

    @app.get("/v1/chameleon/placement")
    async def placement(self, request: Request) -> Response:
        return await self._answer(request, self._show_placement)

    async def sees(self, version: int, timeout_s: float) -> bool:
        """Whether this ingress acts on the catalog's ``version``, waiting for it up to ``timeout_s``."""
        return await asyncio.to_thread(self._follower.wait_for, lambda view: view.catalog_version >= version, timeout_s)

    # -- answering -----------------------------------------------------------------------------------------------------

    async def _answer(
        self, request: Request, handler: Callable[[Request], Coroutine[Any, Any, Response]], *, admin: bool = False
    ) -> Response:
        """``handler``'s response, or the error it raised in OpenAI's shape; counted by outcome."""
        try:
            self._authorise(request, admin)
            return await handler(request)
        except ApiError as error:
            self._metrics.request(error.status)
            return _error_response(error)
        except (BackPressureError, DeploymentUnavailableError) as error:
            self._metrics.request(503)
            logger.warning("turned away: %s", error)
            retry_after_s = self._config.replicas.retry_after_s
            return _error_response(
                ApiError(
                    503, "The service is at its limit; try again shortly.", "overloaded", retry_after_s=retry_after_s
                )
            )
        except PlacementUnavailableError as error:
            self._metrics.request(503)
            return _error_response(
                ApiError(503, f"The adapter catalog is unavailable: {error}", "catalog_unavailable", retry_after_s=2)
            )
        except asyncio.CancelledError:
            self._metrics.request(499)
            raise
        except Exception:
            self._metrics.request(500)
            logger.exception("%s %s failed", request.method, request.url.path)
            return _error_response(ApiError(500, "Internal error; the server's log has the details.", "server_error"))

    async def _relay(self, request: Request) -> Response:
        body = await self._read(request)
        fields = _json_object(body)
        model = fields.get("model") or self._base
        record = await self._resolve(model) if isinstance(model, str) else None
        call = (request.url.path, body, model, record)
        if fields.get("stream"):
            return await self._relay_stream(call)
        answer = self._replica.options(method_name="answer", multiplexed_model_id=record.digest if record else "")
        status, media_type, content = await self._once_more(lambda: answer.remote(*call))
        self._metrics.request(status)
        return Response(content, status_code=status, media_type=media_type)

    async def _relay_stream(self, call: tuple[Any, ...]) -> Response:
        record: AdapterRecord | None = call[3]
        stream = self._replica.options(
            method_name="stream", stream=True, multiplexed_model_id=record.digest if record else ""
        )

        async def begin() -> tuple[Any, Any]:
            parts = stream.remote(*call)
            try:
                return parts, await anext(parts)
            except asyncio.CancelledError:
                parts.cancel()
                raise

        parts, (status, media_type, first) = await self._once_more(begin)
        self._metrics.request(status)
        if status != 200:
            return Response(first, status_code=status, media_type=media_type)
        return StreamingResponse(self._rest(parts, first), media_type=media_type)

    async def _rest(self, parts: Any, first: bytes) -> AsyncIterator[bytes]:
        """The stream's body. A replica that dies ends it with an error event, never silently."""
        ended = False
        try:
            yield first
            async for part in parts:
                yield part
            ended = True
        except RayActorError as error:
            ended = True
            logger.warning("a replica died while it streamed: %s", error)
            self._metrics.broken_stream()
            yield sse_error(502, "The replica serving this request died; the answer is incomplete.", "replica_died")
        except Exception:
            ended = True
            logger.exception("a stream failed")
            self._metrics.broken_stream()
            yield sse_error(500, "Internal error; the answer is incomplete.", "server_error")
        finally:
            if not ended:
                parts.cancel()

    async def _once_more(self, attempt: Callable[[], Any]) -> Any:
        """The attempt's result; when the replica dies under it (nothing was sent yet), that of one more attempt."""
        try:
            return await attempt()
        except RayActorError as error:
            logger.warning("a replica died before it answered, trying another one: %s", error)
            self._metrics.retry()
        try:
            return await attempt()
        except RayActorError as error:
            raise ApiError(
                502, "The replicas serving this request died; try again.", "replica_died", retry_after_s=1
            ) from error

    # -- models and adapters -------------------------------------------------------------------------------------------

    async def _resolve(self, model: str) -> AdapterRecord | None:
        """The adapter that ``model`` names; None for the base model. ApiError 404 when there is no such model."""
        name = split_model(model, self._base)
        if name is None:
            return None
        record = self._follower.view().catalog.get(name) or await self._lookup(name)
        if record is None:
            raise unknown_model(model)
        return record

    async def _lookup(self, name: str) -> AdapterRecord | None:
        """A name that the view does not have may have been added a moment ago: ask Redis, but not for every request."""
        now_s = time.monotonic()
        if self._absent.get(name, 0.0) > now_s:
            return None
        try:
            record = await self._store.lookup(name)
        except PlacementUnavailableError:
            if self._follower.view().current_at_s is None and not self._follower.view().connected:
                raise  # nothing was ever known: a 404 would be a guess
            return None
        if record is None:
            if len(self._absent) >= MAX_ABSENT_NAMES:
                self._absent.clear()
            self._absent[name] = now_s + LOOKUP_MEMORY_S
        return record

    async def _list_models(self, _: Request) -> Response:
        catalog = self._follower.view().catalog
        cards = [self._model_card(None), *(self._model_card(catalog[name]) for name in sorted(catalog))]
        return JSONResponse({"object": "list", "data": cards})

    def _model_card(self, record: AdapterRecord | None) -> dict[str, Any]:
        return {
            "id": record.name if record else self._base,
            "object": "model",
            "created": self._started_s,
            "owned_by": "chameleon-ray",
            "root": record.uri if record else self._config.model.source,
            "parent": self._base if record else None,
        }

    async def _load_adapter(self, request: Request) -> Response:
        """Success means: every replica has the adapter's files and could load it, and every ingress resolves it."""
        fields = _json_object(await self._read(request), needed=("lora_name", "lora_path"))
        name, uri, replace = fields["lora_name"], fields["lora_path"], bool(fields.get("load_inplace"))
        try:
            check_name(name, self._base)
        except AdapterError as error:
            raise ApiError(error.http_status, str(error), error.code, param="lora_name") from None
        if not replace and name in self._follower.view().catalog:
            raise _already_loaded(name)
        inspected = await self._once_more(
            lambda: self._replica.options(method_name="inspect_adapter").remote(name, uri)
        )
        if isinstance(inspected, ApiError):
            raise inspected
        results = await self._replica.broadcast("prepare_adapter", inspected).results_async(return_exceptions=True)
        for result in results:
            if isinstance(result, ApiError):
                raise result
            if isinstance(result, Exception) and not isinstance(result, RayActorError):
                raise result
        try:
            record = await self._store.put(inspected, replace=replace)
        except CatalogConflictError:
            raise _already_loaded(name) from None
        await self._seen_everywhere(record.version)
        self._absent.pop(name, None)
        logger.info("adapter %s (%s) loaded from %s", name, record.digest[:16], uri)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload_adapter(self, request: Request) -> Response:
        fields = _json_object(await self._read(request), needed=("lora_name",))
        name = fields["lora_name"]
        try:
            tombstone = await self._store.remove(name)
        except AdapterUnknownError:
            message = f"The lora adapter '{name}' cannot be found."
            raise ApiError(404, message, "NotFoundError", param="lora_name") from None
        await self._seen_everywhere(tombstone.version)
        logger.info("adapter %s unloaded", name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def _seen_everywhere(self, version: int) -> None:
        """Wait until every ingress acts on the catalog's ``version``. ApiError 503 when one does not in time."""
        if self._peers is None:
            context = serve.get_replica_context()
            self._peers = serve.get_deployment_handle(context.deployment, context.app_name)
        timeout_s = self._config.redis.heartbeat_ttl_s
        results = await self._peers.broadcast("sees", version, timeout_s).results_async(return_exceptions=True)
        if any(result is False for result in results):
            raise ApiError(
                503,
                f"The change is in the catalog, but an ingress did not take it up within {timeout_s:g} s; it will once "
                "it reaches Redis again.",
                "catalog_unavailable",
                retry_after_s=2,
            )

    async def _show_placement(self, _: Request) -> Response:
        view, now_s = self._follower.view(), time.monotonic()
        names: dict[str, list[str]] = {}
        for record in view.catalog.values():
            names.setdefault(record.digest, []).append(record.name)
        replicas = [
            {
                "replica": status.replica_id,
                "node": status.node_id,
                "age_s": round(now_s - status.received_at_s, 3),
                "load": asdict(status.load),
                "adapters": {
                    name: tier.name.lower()
                    for digest, tier in status.tiers.items()
                    for name in names.get(digest, [f"unloaded:{digest[:16]}"])
                },
                "failed": dict(status.failed),
            }
            for status in view.replicas.values()
        ]
        return JSONResponse(
            {
                "redis": "connected" if view.connected else "disconnected",
                "catalog_version": view.catalog_version,
                "replicas": replicas,
            }
        )

    # -- requests ------------------------------------------------------------------------------------------------------

    def _authorise(self, request: Request, admin: bool) -> None:
        """ApiError 401 or 403 unless the caller may do this."""
        _, _, key = request.headers.get("authorization", "").partition(" ")
        if admin:
            if self._api.admin_key is not None:
                if not _same(key, self._api.admin_key):
                    raise ApiError(401, "This needs the admin key as bearer token.", "authentication_error")
            elif not (self._api.admin_open_on_loopback and _from_this_machine(request)):
                raise ApiError(
                    403,
                    "Adapter loading is closed: set api.admin_key in the configuration to open it.",
                    "permission_error",
                )
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                # a web page cannot send this type to another origin without asking first
                raise ApiError(415, "Send the body as application/json.", "invalid_request_error")
        elif self._api.api_keys and not any([_same(key, known) for known in self._api.api_keys]):
            raise ApiError(401, "Missing or unknown API key; send it as bearer token.", "authentication_error")

    async def _read(self, request: Request) -> bytes:
        limit = self._config.ingress.max_body_mib * MIB
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise ApiError(413, f"The request body is larger than {limit // MIB} MiB.", "invalid_request_error")
        return bytes(body)


def _json_object(body: bytes, needed: tuple[str, ...] = ()) -> dict[str, Any]:
    """The body as a JSON object in which every ``needed`` key is a non-empty string. ApiError 400 otherwise."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The request body is not valid JSON: {error}", "invalid_request_error") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "The request body must be a JSON object.", "invalid_request_error")
    for key in needed:
        if not isinstance(fields.get(key), str) or not fields[key]:
            raise ApiError(400, f"'{key}' is required and must be a string.", "invalid_request_error", param=key)
    return fields


def _already_loaded(name: str) -> ApiError:
    return ApiError(
        400,
        f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
        "'load_inplace' to True.",
        "InvalidUserInput",
        param="lora_name",
    )


def _error_response(error: ApiError) -> Response:
    headers = {} if error.retry_after_s is None else {"Retry-After": str(math.ceil(error.retry_after_s))}
    return Response(error.body, status_code=error.status, media_type=JSON, headers=headers)


def _same(given: str, known: str) -> bool:
    return hmac.compare_digest(given.encode(), known.encode())


def _from_this_machine(request: Request) -> bool:
    """Whether the caller came in over loopback, by a loopback name (so that no web page can send it here by DNS), and
    not through another proxy."""
    host = request.headers.get("host", "").rpartition(":")[0] or request.headers.get("host", "")
    proxied = any(name in request.headers for name in ("forwarded", "x-forwarded-for", "x-real-ip"))
    return not proxied and request.client is not None and _loopback(request.client.host) and _loopback(host.strip("[]"))


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
