"""Requests and responses of the ingress: reading, authorisation, errors in OpenAI's shape, counting.

Apart from ``ingress.py``: Serve freezes a FastAPI application while that module is still being executed, so that names
defined below the class do not exist for its routes.
"""

import asyncio
import base64
import hmac
import ipaddress
import json
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request, Response
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.exceptions import HTTPException

from chameleon_ray import metrics
from chameleon_ray.config import ApiConfig, AppConfig
from chameleon_ray.openai_errors import JSON, ApiError
from chameleon_ray.placement import PlacementUnavailableError

logger = logging.getLogger("ray.serve")

MIB = 2**20
OUTCOMES = {499: "cancelled", 503: "overloaded"}
CATALOG_RETRY_AFTER_S = 2.0


async def answered(
    request: Request, retry_after_s: float, handler: Callable[[Request], Awaitable[Response]]
) -> Response:
    """``handler``'s response, or the error that it raised in OpenAI's shape; counted by outcome, except for routes that
    watch the application: an open live page asks every second.

    retry_after_s: what a caller is told when the replicas take no more requests.
    """
    try:
        response = await handler(request)
    except asyncio.CancelledError:
        _count(request, 499)
        raise
    except Exception as error:
        response = _error_response(_as_api_error(request, error, retry_after_s))
    _count(request, response.status_code)
    return response


async def no_such_route(request: Request, error: Exception) -> Response:
    """FastAPI's answer to a path or method that there is not, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        problem = ApiError(404, f"Unknown request URL: {where}. Check it for typos.", "NotFoundError")
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        problem = ApiError(405, f"{where} is not allowed; use {allowed}.", "invalid_request_error")
    else:
        problem = ApiError(error.status_code, str(error.detail), "invalid_request_error")
    _count(request, problem.status)
    response = _error_response(problem)
    response.headers.update(error.headers or {})
    return response


def _as_api_error(request: Request, error: Exception, retry_after_s: float) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BackPressureError | DeploymentUnavailableError):
        return ApiError(503, "The service is at its limit; try again.", "overloaded", retry_after_s=retry_after_s)
    if isinstance(error, PlacementUnavailableError):
        message = f"The adapter catalog cannot be reached, try again: {error}"
        return ApiError(503, message, "catalog_unavailable", retry_after_s=CATALOG_RETRY_AFTER_S)
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return ApiError(500, "Internal error; the server's log has the details.", "server_error")


def _error_response(error: ApiError) -> Response:
    headers = retry_after(error.retry_after_s)
    return Response(error.body, status_code=error.status, media_type=JSON, headers=headers)


def retry_after(seconds: float | None) -> dict[str, str]:
    """The header that tells when to come back, in whole seconds and at least one; none without a time."""
    return {} if seconds is None else {"Retry-After": str(max(1, math.ceil(seconds)))}


def _count(request: Request, status: int) -> None:
    if "/chameleon/" in request.url.path:
        return
    outcome = OUTCOMES.get(status) or ("ok" if status < 400 else "client_error" if status < 500 else "server_error")
    metrics.REQUESTS.counter().inc(tags={"outcome": outcome})


async def read_body(request: Request, config: AppConfig) -> bytes:
    """The whole body. ApiError 413 when it is larger than ``ingress.max_body_mib``."""
    limit_mib = config.ingress.max_body_mib
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit_mib * MIB:
            raise ApiError(413, f"The request body is larger than {limit_mib} MiB.", "invalid_request_error")
    return bytes(body)


def json_object(body: bytes, needed: tuple[str, ...] = (), may_have: tuple[str, ...] = ()) -> dict[str, Any]:
    """The body as a JSON object in which every ``needed`` key is a non-empty string, and every one of ``may_have`` that
    is there and not null. ApiError 400 otherwise."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The request body is not valid JSON: {error}", "invalid_request_error") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "The request body must be a JSON object.", "invalid_request_error")
    for key in (*needed, *(key for key in may_have if fields.get(key) is not None)):
        if not isinstance(fields.get(key), str) or not fields[key]:
            raise ApiError(400, f"'{key}' is required and must be a string.", "invalid_request_error", param=key)
    return fields


class Guard:
    """Who may call what."""

    def __init__(self, api: ApiConfig, http_host: str | None):
        """http_host: where the HTTP proxies listen; ``admin_open_on_loopback`` only counts where that is loopback."""
        self._api = api.resolved()
        self._is_local = http_host is not None and _loopback(http_host)
        if api.admin_open_on_loopback and not self._is_local:
            logger.error(
                "api.admin_open_on_loopback is ignored: the HTTP proxies listen on %s, not on loopback only", http_host
            )

    def check_client(self, request: Request) -> None:
        """ApiError 401 unless the caller may use the models."""
        key = _bearer(request)
        if self._api.api_keys and not any([_same(key, known) for known in self._api.api_keys]):
            raise ApiError(401, "Missing or unknown API key; send it as bearer token.", "authentication_error")

    def check_admin(self, request: Request) -> None:
        """ApiError 401, 403 or 415 unless the caller may load and unload adapters."""
        self._check_operator(request, _bearer(request), "Adapter loading is closed")
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":  # a web page may not send this type here without asking first
            raise ApiError(415, "Send the body as application/json.", "invalid_request_error")

    def check_page(self, request: Request) -> None:
        """ApiError 401 or 403 unless the caller may see the live page. Browsers send the admin key as the password of
        HTTP's basic authentication."""
        self._check_operator(request, _bearer(request) or _basic_password(request), "The live page is closed")

    def _check_operator(self, request: Request, key: str, closed: str) -> None:
        if self._api.admin_key is not None:
            if not _same(key, self._api.admin_key):
                raise ApiError(401, "This needs the admin key as bearer token.", "authentication_error")
        elif not (self._api.admin_open_on_loopback and self._is_local and _from_this_machine(request)):
            raise ApiError(403, f"{closed}: set api.admin_key in the configuration to open it.", "permission_error")


def _bearer(request: Request) -> str:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key if scheme.lower() == "bearer" else ""


def _basic_password(request: Request) -> str:
    scheme, _, encoded = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(encoded, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def _same(given: str, known: str) -> bool:
    return hmac.compare_digest(given.encode(), known.encode())


def _from_this_machine(request: Request) -> bool:
    """Whether the caller came in over loopback, by a loopback name (so that no web page can send it here by DNS), and
    not through another proxy."""
    host = request.headers.get("host", "")
    name = host.partition("]")[0].strip("[") if host.startswith("[") else host.partition(":")[0]
    proxied = any(header in request.headers for header in ("forwarded", "x-forwarded-for", "x-real-ip"))
    return not proxied and request.client is not None and _loopback(request.client.host) and _loopback(name)


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
