"""Loading and unloading adapters at run time, for the whole cluster."""

import logging
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from chameleon_ray.adapters.catalog import check_name
from chameleon_ray.adapters.errors import AdapterError
from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.config import AppConfig
from chameleon_ray.openai_errors import ApiError
from chameleon_ray.placement import AdapterUnknownError, CatalogConflictError, CatalogStore, ClusterFollower
from deployments.broadcast import everywhere
from deployments.http import CATALOG_RETRY_AFTER_S
from deployments.relay import once_more

logger = logging.getLogger("ray.serve")


class AdapterApi:
    """vLLM's run-time adapter API, where success holds for every replica and every ingress."""

    def __init__(
        self, config: AppConfig, follower: ClusterFollower, store: CatalogStore, replica: DeploymentHandle[Any]
    ):
        self._config = config
        self._follower = follower
        self._store = store
        self._replica = replica
        self._ingresses: DeploymentHandle[Any] | None = None

    async def load(self, name: str, uri: str, *, replace: bool, credentials: str | None = None) -> str:
        """Fetch, validate and register an adapter; the message for the client. credentials: see ``Sources.find``.

        Every replica has its files and its engine has loaded it once before it gets into the catalog; a failure
        anywhere leaves everything as it was. Raises ApiError, PlacementUnavailableError.
        """
        try:
            check_name(name, self._config.model.served_name)
        except AdapterError as error:
            raise ApiError(error.http_status, str(error), error.code, param="lora_name") from None
        if not replace and name in self._follower.view().catalog:
            raise _already_loaded(name)
        inspect = self._replica.options(method_name="inspect_adapter")
        inspected: AdapterRecord | ApiError = await once_more(lambda: inspect.remote(name, uri, credentials))
        if isinstance(inspected, ApiError):
            raise inspected
        for problem in await everywhere(self._replica, "prepare_adapter", inspected):
            if problem is not None:
                raise problem
        try:
            record = await self._store.put(inspected, replace=replace)
        except CatalogConflictError:
            raise _already_loaded(name) from None
        await self._wait_until_seen(record.version)
        logger.info("adapter %s (%s) loaded from %s", name, record.id.short, uri)
        warnings = "".join(f" Warning: {warning}." for warning in record.warnings)
        return f"Success: LoRA adapter '{name}' added successfully.{warnings}"

    async def unload(self, name: str) -> str:
        """Take an adapter out of the catalog; running requests end on it. The message for the client.

        Raises ApiError, PlacementUnavailableError.
        """
        try:
            tombstone = await self._store.remove(name)
        except AdapterUnknownError:
            message = f"The lora adapter '{name}' cannot be found."
            raise ApiError(404, message, "NotFoundError", param="lora_name") from None
        await self._wait_until_seen(tombstone.version)
        logger.info("adapter %s unloaded", name)
        return f"Success: LoRA adapter '{name}' removed successfully."

    async def _wait_until_seen(self, version: int) -> None:
        """Until every ingress acts on the catalog's ``version``. ApiError 503 when one does not in time."""
        if self._ingresses is None:
            context = serve.get_replica_context()
            self._ingresses = serve.get_deployment_handle(context.deployment, context.app_name)
        timeout_s = self._config.redis.heartbeat_ttl_s
        if not all(await everywhere(self._ingresses, "sees", version, timeout_s)):
            message = f"The change is in the catalog, but an ingress did not take it up within {timeout_s:g} s."
            raise ApiError(503, message, "catalog_unavailable", retry_after_s=CATALOG_RETRY_AFTER_S)


def _already_loaded(name: str) -> ApiError:
    message = (
        f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
        "'load_inplace' to True."
    )
    return ApiError(400, message, "InvalidUserInput", param="lora_name")
