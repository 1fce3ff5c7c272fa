"""Adapters that no request has named yet: fetched by the rules of ``adapters.resolve``, in the request that does."""

import asyncio
import logging
import time
from typing import Any

from ray.serve.handle import DeploymentHandle

from chameleon_ray.adapters.catalog import check_name
from chameleon_ray.adapters.errors import AdapterError, AdapterNotFoundError
from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.config import AppConfig, ResolveRule
from chameleon_ray.openai_errors import ApiError
from chameleon_ray.placement import CatalogStore, ClusterFollower
from deployments.relay import once_more

logger = logging.getLogger("ray.serve")

MAX_REMEMBERED = 10_000
"""Names that failed; the oldest are forgotten first."""
MAX_FETCHES = 256
"""Fetches under way, over all names; more are refused."""


class OnDemand:
    """One ingress's fetches; one for a name, however many ask. Use from one event loop."""

    def __init__(
        self, config: AppConfig, follower: ClusterFollower, store: CatalogStore, replica: DeploymentHandle[Any]
    ):
        self._options = config.adapters
        self._base = config.model.served_name
        self._follower = follower
        self._store = store
        self._resolve = replica.options(method_name="resolve_adapter")
        self._fetches: dict[str, asyncio.Task[AdapterRecord | None]] = {}
        self._failed: dict[str, tuple[ApiError | None, float]] = {}

    async def find(self, name: str) -> AdapterRecord | None:
        """The adapter, in the catalog by now; None: no rule is about the name, or there is none at its place.

        ApiError: why it cannot be served; 503 when it is not here within ``adapters.resolve_wait_s``. The fetch goes on
        then, as when the client goes.
        """
        place = self._place(name)
        if place is None or self._is_unloaded(name):
            return None
        problem, until_s = self._failed.get(name, (None, 0.0))
        if (left_s := until_s - time.monotonic()) > 0:
            if problem is None:
                return None
            raise ApiError(
                problem.status,
                problem.message,
                problem.kind,
                param="model",
                retry_after_s=None if problem.status < 500 else left_s,
            )
        if (fetch := self._fetches.get(name)) is None:
            if len(self._fetches) >= MAX_FETCHES:
                message = "Too many adapters are being fetched; try again."
                raise ApiError(503, message, "overloaded", retry_after_s=self._options.retry_after_s)
            fetch = self._fetches[name] = asyncio.create_task(self._fetch(name, *place))
            fetch.add_done_callback(lambda done: self._ended(name, done))
        if not (await asyncio.wait({fetch}, timeout=self._options.resolve_wait_s))[0]:
            message = f"The adapter {name!r} is being fetched; try again."
            raise ApiError(503, message, "adapter_fetching", param="model", retry_after_s=self._options.retry_after_s)
        return fetch.result()

    def _place(self, name: str) -> tuple[ResolveRule, str] | None:
        try:
            check_name(name, self._base)
        except AdapterError:
            return None
        for rule in self._options.resolve:
            if (uri := rule.uri_of(name)) is not None:
                return rule, uri
        return None

    def _is_unloaded(self, name: str) -> bool:
        """An operator's word holds until the next one; what a refresh found gone may be back."""
        tombstone = self._follower.view().tombstones.get(name)
        return tombstone is not None and tombstone.origin != "config"

    async def _fetch(self, name: str, rule: ResolveRule, uri: str) -> AdapterRecord | None:
        found: AdapterRecord | ApiError = await once_more(lambda: self._resolve.remote(name, uri, rule.credentials))
        if isinstance(found, ApiError):
            if found.kind == AdapterNotFoundError.code:
                return None
            raise found
        record = await self._store.put_config(found)
        return None if record.deleted else record

    def _ended(self, name: str, fetch: "asyncio.Task[AdapterRecord | None]") -> None:
        """What failed is remembered: for good reasons a while, for others until it may work again."""
        del self._fetches[name]
        self._failed.pop(name, None)
        if fetch.cancelled():
            return
        problem = fetch.exception()
        if problem is None and (record := fetch.result()) is not None:
            logger.info("adapter %s (%s) resolved to %s", name, record.id.short, record.uri)
        elif problem is None or isinstance(problem, ApiError):
            logger.info("adapter %s is not served: %s", name, problem or "there is none")
            pause_s = self._options.absent_s if problem is None or problem.status < 500 else self._options.retry_after_s
            if len(self._failed) >= MAX_REMEMBERED:
                del self._failed[next(iter(self._failed))]
            self._failed[name] = (problem, time.monotonic() + pause_s)
