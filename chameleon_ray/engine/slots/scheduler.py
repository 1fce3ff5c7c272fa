"""``engine.paged``'s scheduler with adapters in vLLM's slots, which take nothing of the KV cache.

vLLM's own bound, ``max_loras`` adapters in a step, stays and never bites: requests run once their adapters have slots.
"""

from typing import Any

from vllm.v1.request import Request

from chameleon_ray.engine.paged.messages import tells_starter
from chameleon_ray.engine.paged.scheduler import ChameleonScheduler
from chameleon_ray.engine.slots.connector import SlotsConnector
from chameleon_ray.engine.slots.messages import SlotsUnsupportedError
from chameleon_ray.engine.slots.options import unsupported_reason


@tells_starter
def check_supported(vllm_config: Any) -> None:
    """Raises SlotsUnsupportedError for a configuration whose slots cannot be under our policy."""
    if (reason := unsupported_reason(vllm_config)) is not None:
        raise SlotsUnsupportedError(reason)


class SlotsScheduler(ChameleonScheduler):
    """Admits requests in the policy's order, once their adapters are in slots."""

    connector_type = SlotsConnector
    unsupported = SlotsUnsupportedError

    def prepare(self, vllm_config: Any) -> None:
        check_supported(vllm_config)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """As vLLM's. reset_running_requests, as before sleep and pause: adapters leave their slots as well, as these
        may lose their memory. Raises RuntimeError while an adapter is being loaded."""
        if reset_running_requests and self._memory.cache.loading:
            raise RuntimeError("an adapter is being loaded into its slot: try again when that has ended")
        return super().reset_prefix_cache(reset_running_requests, reset_connector)

    def _fits(self, request: Request) -> bool:
        # Where groups of layers take blocks of their own, only vLLM's allocation can say what fits; it then admits
        # nobody else in this step.
        return len(self.kv_cache_config.kv_cache_groups) > 1 or super()._fits(request)
