"""What a replica holds of the catalog's adapters, and that it lets go of all others."""

from collections.abc import Mapping

from chameleon_ray.adapters.local import LocalAdapters
from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.policy.adapter import Tier
from deployments.engine import Engine


class CatalogDigests:
    """The contents that a catalog names; a follower's catalog is the same object until it changes."""

    def __init__(self) -> None:
        self._catalog: Mapping[str, AdapterRecord] = {}
        self._digests: frozenset[str] = frozenset()

    def of(self, catalog: Mapping[str, AdapterRecord]) -> frozenset[str]:
        """Adapter digests."""
        if catalog is not self._catalog:
            self._catalog = catalog
            self._digests = frozenset(record.digest for record in catalog.values())
        return self._digests


def merge_tiers(engine: Mapping[str, Tier], stored: frozenset[str], named: frozenset[str]) -> dict[str, Tier]:
    """Where a replica holds each adapter, from the two that know; what neither holds is in no tier.

    engine: what the engine holds; only ``Tier.GPU`` and ``Tier.HOST`` count. stored: digests in the node's store, which
    other applications may share: of these, the ones that the catalog names count.
    """
    tiers = dict.fromkeys(stored & named, Tier.DISK)
    tiers.update((digest, tier) for digest, tier in engine.items() if tier > Tier.DISK)
    return tiers


async def let_go(adapters: LocalAdapters, engine: Engine, named: frozenset[str]) -> None:
    """Let go of files that neither a request nor the engine's memory uses, and have the engine forget adapters that
    neither the catalog names nor a request wants. What is in use now is for a later call.

    named: digests in the catalog.
    """
    adapters.sweep(named, engine.tiers.keys())
    if gone := engine.known - named - adapters.held:
        await engine.retire(gone)
