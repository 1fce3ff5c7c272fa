"""Redis: catalog, placement and heartbeats of one application. Everything in Redis is named in ``keys``.

- ``CatalogStore`` (asyncio) writes the catalog: which content an adapter name stands for.
- ``ReplicaPublisher`` (asyncio, one per replica) publishes load and which tier holds which adapter.
- ``Popularity`` (asyncio) counts how often adapters are asked for, for replicas to come.
- ``ClusterFollower`` (a thread, one per process: ``shared_follower``) keeps a ``ClusterView`` of both in memory:
  a snapshot first, then every change. Request paths read only that view, never Redis.

Redis gone: views stay as they were last known and say so, catalog writes raise PlacementUnavailableError. Redis back,
even empty: followers put the catalog back from memory, replicas publish themselves again.
"""

from chameleon_ray.placement.catalog import CatalogStore
from chameleon_ray.placement.errors import (
    AdapterUnknownError,
    CatalogConflictError,
    PlacementError,
    PlacementUnavailableError,
)
from chameleon_ray.placement.follower import ClusterFollower, shared_follower
from chameleon_ray.placement.keys import Keys
from chameleon_ray.placement.popularity import Popularity
from chameleon_ray.placement.publisher import ReplicaPublisher
from chameleon_ray.placement.view import ClusterView, ReplicaReport, ReplicaStatus

__all__ = [
    "AdapterUnknownError",
    "CatalogConflictError",
    "CatalogStore",
    "ClusterFollower",
    "ClusterView",
    "Keys",
    "PlacementError",
    "PlacementUnavailableError",
    "Popularity",
    "ReplicaPublisher",
    "ReplicaReport",
    "ReplicaStatus",
    "shared_follower",
]
