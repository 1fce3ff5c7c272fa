"""The HTTP ingress: authenticates, resolves the adapter, routes to a replica and relays its answer. No model code."""

import asyncio
import time
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from chameleon_ray.adapters.identity import AdapterId
from chameleon_ray.config import AppConfig
from chameleon_ray.placement import CatalogStore, ClusterView, shared_follower
from deployments.adapter_api import AdapterApi
from deployments.http import CATALOG_RETRY_AFTER_S, Guard, answered, json_object, no_such_route, read_body, retry_after
from deployments.live_page import LivePage
from deployments.models import Models
from deployments.on_demand import OnDemand
from deployments.queues_api import all_queues
from deployments.relay import Relay

app = FastAPI(title="chameleon-ray", docs_url=None, redoc_url=None, openapi_url=None)
app.add_exception_handler(HTTPException, no_such_route)


def placement_table(view: ClusterView, now_s: float) -> dict[str, Any]:
    """Which replica holds which adapter, by name, in which tier, and which configured adapters are refused, and why.
    ``now_s`` on the follower's clock."""
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
                for name in names.get(digest, [f"unloaded:{AdapterId(digest).short}"])
            },
            "failed": dict(status.failed),
        }
        for status in view.replicas.values()
    ]
    redis = "connected" if view.connected else "disconnected"
    refused = {name: one.refusal.reason for name, one in view.tombstones.items() if one.refusal is not None}
    return {"redis": redis, "catalog_version": view.catalog_version, "replicas": replicas, "refused": refused}


def health_of(view: ClusterView, problem: str | None) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of ``/health``: 200 while requests for all that is loaded can be served.

    problem: why Redis is not followed at the moment. status: ``starting`` before the catalog has been read once (only
    the base model's requests are served), ``unavailable`` when no replica is known, ``degraded`` while serving goes on
    from the last knowledge, ``ok``.
    """
    status, reason = "ok", None
    if not view.is_known:
        status, reason = "starting", f"the adapter catalog has not been read yet: {problem}"
    elif not view.replicas:
        status, reason = "unavailable", "no replica reports itself alive"
    elif not view.connected:
        status, reason = "degraded", problem
    redis = "connected" if view.connected else "disconnected"
    body = {"status": status, "redis": redis, "replicas": len(view.replicas)}
    return 200 if status in ("ok", "degraded") else 503, body if reason is None else body | {"reason": reason}


def _http_host() -> str | None:
    """The address that this cluster's HTTP proxies listen on; None when Serve does not say."""
    client = _get_global_client()
    return None if client is None else client.http_config.host


@serve.ingress(app)
class Ingress:
    """One of the application's front doors; all of them are alike and share nothing but Redis."""

    def __init__(self, config: dict[str, Any], replica: DeploymentHandle[Any]):
        """config: an ``AppConfig`` dump. replica: the engine replicas' deployment."""
        self._config = AppConfig.model_validate(config)
        self._guard = Guard(self._config.api, _http_host())
        self._follower = shared_follower(self._config.redis)
        store = CatalogStore(self._config.redis, self._follower.view)
        self._replica = replica
        self._models = Models(
            self._config, self._follower, store, OnDemand(self._config, self._follower, store, replica).find
        )
        self._relay = Relay(self._config, self._models, replica)
        self._adapters = AdapterApi(self._config, self._follower, store, replica)
        self._page = LivePage()
        self._retry_after_s = self._config.replicas.retry_after_s

    @app.post("/v1/chat/completions")
    @app.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        async def handler(request: Request) -> Response:
            self._guard.check_client(request)
            return await self._relay(request)

        return await answered(request, self._retry_after_s, handler)

    @app.get("/v1/models")
    async def models(self, request: Request) -> Response:
        async def handler(request: Request) -> Response:
            self._guard.check_client(request)
            return JSONResponse(self._models.page(request.query_params))

        return await answered(request, self._retry_after_s, handler)

    @app.get("/v1/models/{model:path}")
    async def model(self, request: Request, model: str) -> Response:
        async def handler(request: Request) -> Response:
            self._guard.check_client(request)
            return JSONResponse(self._models.card(await self._models.resolve(model)))

        return await answered(request, self._retry_after_s, handler)

    @app.post("/v1/load_lora_adapter")
    async def load_lora_adapter(self, request: Request) -> Response:
        async def handler(request: Request) -> Response:
            self._guard.check_admin(request)
            fields = json_object(
                await read_body(request, self._config), needed=("lora_name", "lora_path"), may_have=("credentials",)
            )
            name, uri, replace = fields["lora_name"], fields["lora_path"], bool(fields.get("load_inplace"))
            return PlainTextResponse(
                await self._adapters.load(name, uri, replace=replace, credentials=fields.get("credentials"))
            )

        return await answered(request, self._retry_after_s, handler)

    @app.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(self, request: Request) -> Response:
        async def handler(request: Request) -> Response:
            self._guard.check_admin(request)
            fields = json_object(await read_body(request, self._config), needed=("lora_name",))
            return PlainTextResponse(await self._adapters.unload(fields["lora_name"]))

        return await answered(request, self._retry_after_s, handler)

    @app.get("/v1/chameleon/placement")
    async def placement(self, request: Request) -> Response:
        async def handler(request: Request) -> Response:
            self._guard.check_client(request)
            return JSONResponse(placement_table(self._follower.view(), time.monotonic()))

        return await answered(request, self._retry_after_s, handler)

    @app.get("/v1/chameleon/queues")
    async def queues(self, request: Request) -> Response:
        async def handler(request: Request) -> Response:
            self._guard.check_client(request)
            return JSONResponse({"replicas": await all_queues(self._replica, self._follower.view().replicas)})

        return await answered(request, self._retry_after_s, handler)

    @app.get("/chameleon/")
    async def live_page(self, request: Request) -> Response:
        async def handler(request: Request) -> Response:
            self._guard.check_page(request)
            return self._page.response()

        return self._page.asking_for_key(await answered(request, self._retry_after_s, handler))

    @app.get("/health")
    async def health(self) -> Response:
        """For load balancers: see ``health_of``."""
        status_code, body = health_of(self._follower.view(), self._follower.problem)
        headers = retry_after(None if status_code == 200 else CATALOG_RETRY_AFTER_S)
        return JSONResponse(body, status_code=status_code, headers=headers)

    async def sees(self, version: int, timeout_s: float) -> bool:
        """Whether this ingress acts on the catalog's ``version``, waiting for it up to ``timeout_s``."""
        return await asyncio.to_thread(self._follower.wait_for, lambda view: view.catalog_version >= version, timeout_s)
