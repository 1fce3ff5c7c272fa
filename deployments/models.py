"""Which model a request means, from the process's copy of the catalog."""

import heapq
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from chameleon_ray.adapters.catalog import split_model
from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.config import AppConfig
from chameleon_ray.openai_errors import ApiError, unknown_model
from chameleon_ray.placement import CatalogStore, ClusterFollower, ClusterView, PlacementUnavailableError
from deployments.http import CATALOG_RETRY_AFTER_S

LOOKUP_MEMORY_S = 0.5
"""A name that Redis did not know is not looked up again for this long."""
MAX_ABSENT_NAMES = 10_000
MAX_CARDS = 10_000
"""Adapters in one answer of ``/v1/models``."""


class Models:
    """The base model and the adapters of the catalog."""

    def __init__(
        self,
        config: AppConfig,
        follower: ClusterFollower,
        store: CatalogStore,
        find: Callable[[str], Awaitable[AdapterRecord | None]],
    ):
        """find: fetches what the catalog does not have, if that is a name to be fetched."""
        self.base = config.model.served_name
        self._source = config.model.source
        self._max_model_len = config.engine.max_model_len
        self._retry_after_s = config.adapters.retry_after_s
        self._follower = follower
        self._store = store
        self._find = find
        self._absent: dict[str, float] = {}
        self._started_s = int(time.time())

    async def resolve(self, model: str) -> AdapterRecord | None:
        """The adapter that ``model`` names (flat or ``base:adapter``); None for the base model.

        ApiError 404 when there is no such model, 503 for an adapter before the catalog has been read once. Requests to
        the base model need no catalog and are served without one.
        """
        name = split_model(model, self.base)
        if name is None:
            return None
        record = self._known_view().catalog.get(name) or await self._lookup(name) or await self._find(name)
        if record is None:
            raise self._refused(name) or unknown_model(model)
        return record

    def _refused(self, name: str) -> ApiError | None:
        """Why an adapter that the configuration names is not served."""
        tombstone = self._follower.view().tombstones.get(name)
        if tombstone is None or (refusal := tombstone.refusal) is None:
            return None
        message = f"The adapter {name!r} is not served: {refusal.reason}"
        retry_after_s = self._retry_after_s if refusal.status >= 500 else None
        return ApiError(refusal.status, message, refusal.code, param="model", retry_after_s=retry_after_s)

    def page(self, query: Mapping[str, str]) -> dict[str, Any]:
        """``/v1/models``: the base model, then the adapters by name, at most ``limit`` of them and those behind the
        name ``after`` only. ApiError 400 for a limit that is no such number, 503 as ``resolve``."""
        limit = query.get("limit", str(MAX_CARDS))
        if not re.fullmatch("[0-9]{1,5}", limit) or not 1 <= int(limit) <= MAX_CARDS:
            raise ApiError(400, f"'limit' must be from 1 to {MAX_CARDS}.", "invalid_request_error", param="limit")
        catalog = self._known_view().catalog
        after = query.get("after", "")
        names = heapq.nsmallest(int(limit) + 1, (name for name in catalog if name > after))
        has_more = len(names) > int(limit)
        cards = [self.card(catalog[name]) for name in names[: int(limit)]]
        return {"object": "list", "data": cards if after else [self.card(None), *cards], "has_more": has_more}

    def card(self, record: AdapterRecord | None) -> dict[str, Any]:
        """One entry of ``/v1/models``; None: the base model's. ``warnings``: what is odd about an adapter, if any."""
        card: dict[str, Any] = {
            "id": record.name if record else self.base,
            "object": "model",
            "created": self._started_s,
            "owned_by": "chameleon-ray",
            "root": record.uri if record else self._source,
            "parent": self.base if record else None,
            "max_model_len": self._max_model_len,
        }
        return card | {"warnings": list(record.warnings)} if record and record.warnings else card

    def _known_view(self) -> ClusterView:
        view = self._follower.view()
        if not view.is_known:
            message = f"The adapter catalog has not been read yet, try again: {self._follower.problem}."
            raise ApiError(503, message, "catalog_unavailable", retry_after_s=CATALOG_RETRY_AFTER_S)
        return view

    async def _lookup(self, name: str) -> AdapterRecord | None:
        """A name that the copy lacks may have been added a moment ago: ask Redis, but not for every request."""
        now_s = time.monotonic()
        if self._absent.get(name, 0.0) > now_s:
            return None
        try:
            record = await self._store.lookup(name)
        except PlacementUnavailableError:
            return None
        if record is None:
            if len(self._absent) >= MAX_ABSENT_NAMES:
                self._absent.clear()
            self._absent[name] = now_s + LOOKUP_MEMORY_S
        return record
