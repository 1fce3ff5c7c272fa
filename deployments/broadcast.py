"""One question to all replicas of a deployment."""

from typing import Any

from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from chameleon_ray.openai_errors import ApiError


async def everywhere(handle: DeploymentHandle[Any], method: str, *arguments: Any) -> list[Any]:
    """What every live replica of a deployment answers; one that dies meanwhile is not live."""
    results = await handle.broadcast(method, *arguments).results_async(return_exceptions=True)
    for result in results:
        if isinstance(result, Exception) and not isinstance(result, ApiError | RayActorError):
            raise result
    return [result for result in results if not isinstance(result, RayActorError)]
