"""The engine replica: one vLLM engine that answers whole OpenAI requests for any adapter of the catalog."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from chameleon_ray.adapters.catalog import AdapterLibrary, log_refusal
from chameleon_ray.adapters.checkpoint import AdapterShape
from chameleon_ray.adapters.errors import AdapterError, AdapterRefusedError, AdapterRetryLaterError
from chameleon_ray.adapters.fetch_pool import FetchPool
from chameleon_ray.adapters.local import LocalAdapters
from chameleon_ray.adapters.modules import ModuleTable
from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.config import AppConfig
from chameleon_ray.engine.asgi import AsgiCall
from chameleon_ray.engine.launch import local_model_folder, start_engine
from chameleon_ray.openai_errors import JSON, ApiError
from chameleon_ray.placement import (
    CatalogStore,
    PlacementUnavailableError,
    Popularity,
    ReplicaPublisher,
    ReplicaReport,
    shared_follower,
)
from chameleon_ray.progress import Progress
from deployments.broadcast import everywhere
from deployments.engine import Engine
from deployments.parts import AnswerHead, Part, RelayedRequest
from deployments.peers import NodePeers
from deployments.policy_metrics import PolicyMetrics
from deployments.prewarm import prewarm, prewarm_order
from deployments.queues_api import replica_queues
from deployments.tiers import CatalogDigests, let_go, merge_tiers

logger = logging.getLogger("ray.serve")

PROGRESS_PAUSE_S = 0.25
"""Pause between two reports on an answer that is not streamed."""

WORDS_PER_SILENCE = 5
"""How many words of a replica must be lost before the ingress takes it for silent."""

REDIS_START_S = 10.0
"""A replica that starts together with Redis waits so long for it before it goes on without."""


class Replica:
    """One engine, its adapter library and its placement reports."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: dict[str, Any], redis: "DeploymentHandle[Any] | None" = None
    ):
        """config: an ``AppConfig`` dump. redis: the bundled server's deployment, named so that Serve starts it."""
        self._config = AppConfig.model_validate(config)
        context = serve.get_replica_context()
        self._id = context.replica_id.unique_id
        self._replicas: DeploymentHandle[Any] = serve.get_deployment_handle(context.deployment, context.app_name)
        self._num_streams = 0
        self._metrics = PolicyMetrics()
        self._named = CatalogDigests()
        self._tasks: list[asyncio.Task[None]] = []
        await asyncio.to_thread(local_model_folder, self._config.model)
        table: Future[ModuleTable] = Future()
        self._node_id = ray.get_runtime_context().get_node_id()
        self._follower = shared_follower(self._config.redis)
        adapters = self._config.adapters
        peers = NodePeers(self._id, self._node_id, adapters, self._follower.view) if adapters.peer_fetch else None
        bounds = self._config.engine.adapter_bounds()
        self._library = AdapterLibrary(adapters, self._config.model, table, peers, bounds)
        self._store = CatalogStore(self._config.redis, self._follower.view)
        self._publisher = ReplicaPublisher(self._id, self._node_id, self._config.redis)
        self._popularity = Popularity(self._config.redis)
        self._unregistered: list[AdapterRecord] = []
        scan = asyncio.create_task(self._register_configured())
        try:
            self._engine = await self._start_engine()
            table.set_result(self._engine.module_table)
        except BaseException as error:
            table.set_exception(error)  # The scan waits for it in a thread.
            raise
        self._adapters = LocalAdapters(
            self._library,
            self._engine.accept,
            self._config.adapters.retry_after_s,
            FetchPool(self._config.adapters.fetch_concurrency),
            time.monotonic,
        )
        await scan
        self._tasks = [asyncio.create_task(self._repeat(work)) for work in (self._report, self._let_go)]
        if (refresh_s := self._config.adapters.refresh_s) is not None:
            self._tasks.append(asyncio.create_task(self._refresh_forever(refresh_s)))
        if self._config.adapters.prewarm:
            self._tasks.append(asyncio.create_task(self._prewarm()))
        logger.info("replica %s serves %s", self._id, self._config.model.served_name)

    async def answer(self, request: RelayedRequest, earlier: Progress) -> AsyncGenerator[Part, None]:
        """An OpenAI request. earlier: what a replica that died had made of the answer.

        Nothing of a stream is sent before its first token is there, so that the ingress can go elsewhere until then.
        """
        self._num_streams += request.is_streamed
        try:
            async with contextlib.AsyncExitStack() as stack:
                opening = asyncio.create_task(stack.enter_async_context(self._serving(request, earlier)))
                try:
                    async for part in self._opened(opening, request.is_streamed):
                        self._die_with_engine()  # before vLLM's own word on it counts as a part of the answer
                        yield part
                finally:
                    opening.cancel()
                    await asyncio.gather(opening, return_exceptions=True)
        except ApiError as error:
            yield Part(error.body, head=AnswerHead(error.status, JSON, 0.0, error.retry_after_s))
        finally:
            self._num_streams -= request.is_streamed
            self._die_with_engine()

    async def _opened(self, opening: asyncio.Task[AsgiCall], is_streamed: bool) -> AsyncIterator[Part]:
        """The answer of the call that is being opened; an empty part whenever there is nothing else for a while."""
        word_s = self._config.relay.max_silence_s / WORDS_PER_SILENCE
        while not (await asyncio.wait({opening}, timeout=word_s))[0]:
            yield Part()
        call = opening.result()
        async for part in self._streamed(call, word_s) if is_streamed else _whole(call, min(PROGRESS_PAUSE_S, word_s)):
            yield part

    async def _streamed(self, call: AsgiCall, word_s: float) -> AsyncIterator[Part]:
        answer: AnswerHead | None = None
        async for chunk in call.chunks(self._pause_s, word_s):
            progress = call.take_progress()
            if chunk and answer is None:
                head = await call.head()
                answer = AnswerHead(head.status, head.media_type, call.age_s)
                yield Part(chunk, progress, answer)
            else:
                yield Part(chunk, progress)
        if answer is None:
            head = await call.head()
            yield Part(head=AnswerHead(head.status, head.media_type, call.age_s))

    async def inspect_adapter(self, name: str, uri: str, credentials: str | None) -> AdapterRecord | ApiError:
        """Fetch and validate an adapter for a run-time load, and probe its effect; nothing is registered."""
        inspect = partial(self._library.inspect, name, uri, credentials)
        try:
            record = await self._adapters.fetches.run(self._library.tenant(uri, credentials), inspect)
        except AdapterError as error:
            return self._api_error(error, param="lora_path")
        if self._config.adapters.check_effect == "probe":
            return await self._tried(record, self._engine.check_effect) or record
        return record

    async def prepare_adapter(self, record: AdapterRecord) -> ApiError | None:
        """Make the adapter's files local and have the engine try all of it: after this it can be served from here."""

        async def accept(record: AdapterRecord, folder: Path) -> None:
            await self._engine.accept(record, folder, whole=True)

        return await self._tried(record, accept)

    async def _tried(
        self, record: AdapterRecord, trial: Callable[[AdapterRecord, Path], Awaitable[None]]
    ) -> ApiError | None:
        """What is wrong with an adapter that is being loaded: brought here, accepted by the engine, and tried."""
        self._adapters.forget_failure(record.digest)
        try:
            async with self._adapters.use(record) as folder:
                await trial(record, folder)
                return None
        except AdapterError as error:
            self._adapters.forget_failure(record.digest)  # Nobody will ask for it.
            return self._api_error(error, param="lora_path")

    async def resolve_adapter(self, name: str, uri: str, credentials: str | None) -> AdapterRecord | ApiError:
        """Fetch, validate and try an adapter that a rule of ``adapters.resolve`` is about; nothing is registered."""
        found = await self.inspect_adapter(name, uri, credentials)
        if isinstance(found, ApiError):
            return found
        return await self.prepare_adapter(found) or found.model_copy(update={"origin": "config"})

    async def queues(self) -> dict[str, Any]:
        """The live queues and adapter cache of this replica, for ``/v1/chameleon/queues``."""
        return replica_queues(self._id, self._engine)

    async def check_health(self) -> None:
        """Serve's health check: the engine's own."""
        await self._engine.check_health()

    async def __del__(self) -> None:
        """Called by Serve once running requests have drained."""
        if self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._publisher.withdraw()
            await self._store.close()
            await self._popularity.close()
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

    async def _start_engine(self) -> Engine:
        return await start_engine(self._config)

    @contextlib.asynccontextmanager
    async def _serving(self, request: RelayedRequest, earlier: Progress) -> AsyncIterator[AsgiCall]:
        record = request.record
        try:
            async with (
                contextlib.nullcontext() if record is None else self._adapters.use(record) as folder,
                self._engine.call(
                    request.path, request.body, request.model, record, folder, request.request_id, earlier
                ) as call,
            ):
                yield call
        except AdapterError as error:
            if record is not None:
                self._adapters.note_failure(record, error)
            raise self._api_error(error) from error

    def _api_error(self, error: AdapterError, param: str = "model") -> ApiError:
        """The answer to a client; who may try again is told when."""
        retry_after_s = None
        if isinstance(error, AdapterRetryLaterError):
            retry_after_s = error.retry_after_s
        elif error.http_status >= 500:
            retry_after_s = self._config.adapters.retry_after_s
        return ApiError(error.http_status, str(error), error.code, param=param, retry_after_s=retry_after_s)

    def _pause_s(self) -> float:
        """Pause between two events of one stream, so that all streams together stay below the configured rate."""
        return self._num_streams / self._config.replicas.max_stream_events_per_s

    async def _register_configured(self) -> None:
        """Put the adapters of the configuration into the catalog; those that cannot be served with the reason."""
        await asyncio.to_thread(self._follower.wait_ready, REDIS_START_S)
        view = self._follower.view()
        found = await asyncio.to_thread(self._library.scan, {**view.tombstones, **view.catalog})
        problems = await self._measured(found.shapes)
        for name, error in problems.items():
            log_refusal(name, error)
        self._unregistered = [
            self._library.refused(record, problems[name]) if name in problems else record
            for name, record in found.records.items()
        ] + [*found.refused]
        await self._register_pending()
        await self._withdraw(found.gone)

    async def _measured(self, shapes: Mapping[str, AdapterShape]) -> dict[str, AdapterError]:
        """Why the engine can never hold an adapter, by its name. shapes: by name."""
        distinct = list(dict.fromkeys(shapes.values()))
        answers = dict(zip(distinct, await self._engine.measure(distinct), strict=True))
        return {name: error for name, shape in shapes.items() if (error := answers[shape]) is not None}

    async def _register_pending(self) -> None:
        """Write what the catalog does not have yet; without Redis it stays for the next report."""
        try:
            while self._unregistered:
                record = self._unregistered[-1]
                await (self._store.put_config(record) if record.refusal is None else self._store.put_refused(record))
                self._unregistered.pop()
        except PlacementUnavailableError as error:
            logger.warning("%d adapters are not in the catalog yet: %s", len(self._unregistered), error)

    async def _withdraw(self, names: Sequence[str]) -> None:
        """Take out of the catalog what is gone from its source; without Redis a later look does."""
        try:
            for name in names:
                await self._store.withdraw(name)
                logger.info("adapter %s is gone from its source", name)
        except PlacementUnavailableError as error:
            logger.warning("adapters that are gone are still in the catalog: %s", error)

    async def _repeat(self, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await work()
            except Exception:
                self._die_with_engine()
                logger.exception("a round of the replica's own work failed; the next one follows")
            await asyncio.sleep(self._config.redis.heartbeat_s)

    async def _report(self) -> None:
        if self._unregistered:
            await self._register_pending()
        await self._engine.refresh_residency()
        stored = await asyncio.to_thread(self._stored)
        view = self._follower.view()
        tiers = merge_tiers(self._engine.tiers, stored, self._named.of(view.catalog))
        report = ReplicaReport(
            replica_id=self._id,
            node_id=self._node_id,
            load=self._engine.load(),
            tiers=tiers,
            failed=self._adapters.failures(),
            catalog_version=view.catalog_version,
        )
        await self._publisher.publish(report, time.monotonic())
        await self._popularity.add(self._engine.take_uses())
        self._metrics.publish(self._engine, tiers)

    async def _prewarm(self) -> None:
        """Requests are served meanwhile."""
        options, catalog = self._config.adapters, self._follower.view().catalog
        try:
            order = prewarm_order(
                catalog.values(), options.prewarm, await self._popularity.counts(), options.store_max_bytes
            )
            await prewarm(self._adapters, order, await asyncio.to_thread(self._stored))
        except Exception:
            logger.exception("no more adapters are fetched ahead")

    async def _let_go(self) -> None:
        """See ``let_go``. A catalog that cannot be followed may lack what others load meanwhile: nothing happens."""
        view = self._follower.view()
        if view.connected:
            await let_go(self._adapters, self._engine, self._named.of(view.catalog))

    async def _refresh_forever(self, pause_s: float) -> None:
        """Keep the catalog as the sources are; of all replicas, the one with the first name does it."""
        while True:
            await asyncio.sleep(pause_s)
            try:
                view = self._follower.view()
                if self._id == min({self._id, *view.replicas}):
                    await self._refresh({**view.tombstones, **view.catalog})
            except Exception as error:
                logger.warning("the adapters' sources could not be looked at, the next look follows: %s", error)

    async def _refresh(self, known: Mapping[str, AdapterRecord]) -> None:
        """Every replica tries what has changed, as at a load, before the catalog names it."""
        changes = await asyncio.to_thread(self._library.refresh, known)
        for record in changes.changed:
            problem = next((one for one in await everywhere(self._replicas, "prepare_adapter", record) if one), None)
            if problem is None:
                await self._store.put_config(record)
                logger.info("adapter %s is now %s", record.name, record.id.short)
            else:
                logger.warning("adapter %s as it is now is not served: %s", record.name, problem)
                refusal = AdapterRefusedError(problem.status, problem.kind, problem.message, problem.status < 500)
                await self._store.put_refused(self._library.refused(record, refusal))
        for record in changes.refused:
            await self._store.put_refused(record)
        await self._withdraw(changes.gone)

    def _stored(self) -> frozenset[str]:
        """Digests of the adapters in the node's store; none while it cannot be read."""
        try:
            return self._library.stored()
        except AdapterError as error:
            logger.error("%s", error)
            return frozenset()


async def _whole(call: AsgiCall, pause_s: float) -> AsyncIterator[Part]:
    """The progress of an answer that is not streamed, as it grows, and then the answer."""
    body = asyncio.create_task(call.body())
    try:
        while not (await asyncio.wait({body}, timeout=pause_s))[0]:
            yield Part(progress=call.take_progress())
        head, content = await call.head(), body.result()
        yield Part(content, head=AnswerHead(head.status, head.media_type, call.age_s))
    finally:
        body.cancel()
        await asyncio.gather(body, return_exceptions=True)
