"""The engine replica: one vLLM engine that answers whole OpenAI requests for any adapter of the catalog."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from chameleon_ray.adapters.base_model import BaseModelShapes
from chameleon_ray.adapters.catalog import AdapterLibrary
from chameleon_ray.adapters.errors import AdapterError, AdapterRetryLaterError
from chameleon_ray.adapters.local import LocalAdapters
from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.config import AppConfig
from chameleon_ray.engine.launch import local_model_folder, start_engine
from chameleon_ray.openai_errors import JSON, ApiError
from chameleon_ray.placement import (
    CatalogStore,
    PlacementUnavailableError,
    ReplicaPublisher,
    ReplicaReport,
    shared_follower,
)
from chameleon_ray.policy.adapter import Tier
from deployments.policy_metrics import PolicyMetrics
from deployments.queues_api import replica_queues
from deployments.tiers import ReplicaTiers

logger = logging.getLogger("ray.serve")

Answer = tuple[int, str, bytes, float, float | None]
"""HTTP status, media type, body (of a stream: its first part), seconds in the engine (of a stream: until that part),
seconds after which to try again (of an error that may pass)."""

REDIS_START_S = 10.0
"""A replica that starts together with Redis waits so long for it before it goes on without."""


class Replica:
    """One engine, its adapter library and its placement reports."""

    async def __init__(self, config: dict[str, Any], redis: DeploymentHandle | None = None):
        """config: an ``AppConfig`` dump. redis: the bundled server's deployment, named so that Serve starts it."""
        self._config = AppConfig.model_validate(config)
        self._id = serve.get_replica_context().replica_id.unique_id
        self._num_streams = 0
        self._metrics = PolicyMetrics()
        self._tiers = ReplicaTiers()
        self._reporter: asyncio.Task[None] | None = None
        model_folder = await asyncio.to_thread(local_model_folder, self._config.model)
        shapes = await asyncio.to_thread(BaseModelShapes.from_folder, model_folder)
        self._library = AdapterLibrary(self._config.adapters, shapes, self._config.model.served_name)
        self._node_id = ray.get_runtime_context().get_node_id()
        self._follower = shared_follower(self._config.redis)
        self._store = CatalogStore(self._config.redis, self._follower.view)
        self._publisher = ReplicaPublisher(self._id, self._node_id, self._config.redis)
        self._unregistered: list[AdapterRecord] = []
        scan = asyncio.create_task(self._register_configured())
        self._engine = await self._start_engine()
        self._adapters = LocalAdapters(
            self._library,
            self._engine.accept,
            self._config.adapters.retry_after_s,
            ThreadPoolExecutor(self._config.adapters.fetch_concurrency, thread_name_prefix="fetch"),
            time.monotonic,
        )
        await scan
        self._reporter = asyncio.create_task(self._report_forever())
        logger.info("replica %s serves %s", self._id, self._config.model.served_name)

    async def answer(self, path: str, body: bytes, model: str, record: AdapterRecord | None) -> Answer:
        """A whole OpenAI request that is not streamed. ``record``: the adapter's; None for the base model."""
        try:
            async with self._serving(path, body, model, record) as call:
                head, content = await call.head(), await call.body()
                return head.status, head.media_type, content, call.age_s, None
        except ApiError as error:
            return _error_answer(error)
        finally:
            self._die_with_engine()

    async def stream(
        self, path: str, body: bytes, model: str, record: AdapterRecord | None
    ) -> AsyncGenerator[Answer | bytes, None]:
        """A streamed OpenAI request: first an ``Answer`` with the first part of the body, then further parts.

        Nothing is sent before the first token is there, so that the ingress can go elsewhere until then.
        """
        self._num_streams += 1
        try:
            async with self._serving(path, body, model, record) as call:
                head, begun = await call.head(), False
                async for chunk in call.chunks(self._pause_s):
                    self._die_with_engine()  # before vLLM's own word on it counts as the stream's first part
                    yield chunk if begun else (head.status, head.media_type, chunk, call.age_s, None)
                    begun = True
                if not begun:
                    yield head.status, head.media_type, b"", call.age_s, None
        except ApiError as error:
            yield _error_answer(error)
        finally:
            self._num_streams -= 1
            self._die_with_engine()

    async def inspect_adapter(self, name: str, uri: str) -> AdapterRecord | ApiError:
        """Fetch and validate an adapter for a run-time load; nothing is registered."""
        try:
            return await asyncio.to_thread(self._library.inspect, name, uri)
        except AdapterError as error:
            return _api_error(error, param="lora_path")

    async def prepare_adapter(self, record: AdapterRecord) -> ApiError | None:
        """Make the adapter's files local and have the engine load it once: after this it can be served from here."""
        self._adapters.forget_failure(record.digest)
        try:
            async with self._adapters.use(record):
                return None
        except AdapterError as error:
            return _api_error(error, param="lora_path")

    async def queues(self) -> dict[str, Any]:
        """The live queues and adapter cache of this replica, for ``/v1/chameleon/queues``."""
        return replica_queues(self._id, self._engine)

    async def check_health(self) -> None:
        """Serve's health check: the engine's own."""
        await self._engine.check_health()

    async def __del__(self) -> None:
        """Called by Serve once running requests have drained."""
        if self._reporter is not None:
            self._reporter.cancel()
            await asyncio.gather(self._reporter, return_exceptions=True)
            await self._publisher.withdraw()
            await self._store.close()
        if hasattr(self, "_adapters"):
            await self._adapters.close()
        if hasattr(self, "_engine"):
            self._engine.shutdown()

    def _die_with_engine(self) -> None:
        """End this process when its engine is dead: it can do nothing more, and the ingress, which sees the process
        die, sends what was here elsewhere at once instead of after the next health check."""
        if self._engine.is_dead:
            logger.critical("the engine is dead; replica %s ends", self._id)
            self._engine.shutdown()
            os._exit(1)

    async def _start_engine(self) -> Any:
        return await start_engine(self._config)

    @contextlib.asynccontextmanager
    async def _serving(self, path: str, body: bytes, model: str, record: AdapterRecord | None) -> AsyncIterator[Any]:
        try:
            async with (
                contextlib.nullcontext() if record is None else self._adapters.use(record) as folder,
                self._engine.call(path, body, model, record, folder) as call,
            ):
                yield call
        except AdapterError as error:
            raise _api_error(error) from error

    def _pause_s(self) -> float:
        """Pause between two events of one stream, so that all streams together stay below the configured rate."""
        return self._num_streams / self._config.replicas.max_stream_events_per_s

    async def _register_configured(self) -> None:
        """Put the adapters of the configuration into the catalog; broken ones are logged and left out."""
        await asyncio.to_thread(self._follower.wait_ready, REDIS_START_S)
        view = self._follower.view()
        result = await asyncio.to_thread(self._library.scan, {**view.tombstones, **view.catalog})
        self._unregistered = list(result.records.values())
        await self._register_pending()

    async def _register_pending(self) -> None:
        """Write what the catalog does not have yet; without Redis it stays for the next report."""
        try:
            while self._unregistered:
                await self._store.put_config(self._unregistered[-1])
                self._unregistered.pop()
        except PlacementUnavailableError as error:
            logger.warning("%d adapters are not in the catalog yet: %s", len(self._unregistered), error)

    async def _report_forever(self) -> None:
        while True:
            try:
                if self._unregistered:
                    await self._register_pending()
                self._adapters.sweep()
                await self._engine.refresh_residency()
                stored = await asyncio.to_thread(self._stored)
                tiers = self._tiers.merge(self._engine.tiers, stored, self._follower.view().catalog)
                await self._publisher.publish(self._report(tiers), time.monotonic())
                self._metrics.publish(self._engine, tiers)
            except Exception:
                self._die_with_engine()
                logger.exception("a placement report failed; the next one follows")
            await asyncio.sleep(self._config.redis.heartbeat_s)

    def _stored(self) -> frozenset[str]:
        """Digests of the adapters in the node's store; none while it cannot be read."""
        try:
            return self._library.stored()
        except AdapterError as error:
            logger.error("%s", error)
            return frozenset()

    def _report(self, tiers: Mapping[str, Tier]) -> ReplicaReport:
        return ReplicaReport(
            replica_id=self._id,
            node_id=self._node_id,
            load=self._engine.load(),
            tiers=tiers,
            failed={**self._engine.failures(), **self._adapters.failures()},
            catalog_version=self._follower.view().catalog_version,
        )


def _error_answer(error: ApiError) -> Answer:
    return error.status, JSON, error.body, 0.0, error.retry_after_s


def _api_error(error: AdapterError, param: str = "model") -> ApiError:
    retry_after_s = error.retry_after_s if isinstance(error, AdapterRetryLaterError) else None
    return ApiError(error.http_status, str(error), error.code, param=param, retry_after_s=retry_after_s)
