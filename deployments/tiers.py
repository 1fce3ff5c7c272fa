"""Where a replica holds each adapter, from the two that know: its engine (GPU and host memory) and its node's store."""

from collections.abc import Mapping

from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.policy.adapter import Tier


class ReplicaTiers:
    """Merges the engine's tiers with the store's content; what neither holds is in no tier."""

    def __init__(self) -> None:
        self._catalog: Mapping[str, AdapterRecord] | None = None
        self._named: frozenset[str] = frozenset()

    def merge(
        self, engine: Mapping[str, Tier], stored: frozenset[str], catalog: Mapping[str, AdapterRecord]
    ) -> dict[str, Tier]:
        """Adapter digest -> tier.

        engine: what the engine holds; only ``Tier.GPU`` and ``Tier.HOST`` count. stored: digests in the node's store,
        which other applications may share: of these, the ones that the catalog names count.
        """
        if catalog is not self._catalog:  # a follower's catalog is the same object until it changes
            self._catalog = catalog
            self._named = frozenset(record.digest for record in catalog.values())
        tiers = dict.fromkeys(stored & self._named, Tier.DISK)
        tiers.update((digest, tier) for digest, tier in engine.items() if tier > Tier.DISK)
        return tiers
