"""What a worker with slots tells the scheduler at start-up."""

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata

from chameleon_ray.adapters.modules import ModuleTable
from chameleon_ray.engine.paged.messages import UnsupportedError


class SlotsUnsupportedError(UnsupportedError):
    """This model's slots cannot be under our policy."""

    problem = "vLLM's adapter slots cannot be under Chameleon's policy"
    instead = "stock"


@dataclass(frozen=True)
class SlotLayout(KVConnectorHandshakeMetadata):
    """table: the modules that take LoRA. experts: vLLM's names of a layer's expert projections (``experts.0.w1``), of
    which an adapter has all or none. slot_bytes: of one slot on one rank. element_bytes: of a weight."""

    table: ModuleTable
    experts: frozenset[str]
    num_slots: int
    slot_bytes: int
    element_bytes: int
