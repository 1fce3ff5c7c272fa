"""What a process knows about the cluster: immutable values that request paths read without locks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeVar

from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.policy.adapter import Tier
from chameleon_ray.routing.replica_load import ReplicaLoad

K = TypeVar("K")
V = TypeVar("V")


def _nothing() -> Mapping[K, V]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """What a replica says about itself with each heartbeat.

    replica_id: Serve's unique id of the replica; node_id: Ray's id of its node.
    tiers: adapter digest -> where the replica holds it. Adapters at ``Tier.ABSENT`` may be left out.
    failed: adapter digest -> why it cannot be served there; sent whole with every report, so keep it short.
    catalog_version: the ``ClusterView.catalog_version`` that the replica acts on.
    """

    replica_id: str
    node_id: str
    load: ReplicaLoad
    tiers: Mapping[str, Tier] = field(default_factory=_nothing)
    failed: Mapping[str, str] = field(default_factory=_nothing)
    catalog_version: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """A live replica's last report, as a follower holds it (fields: see ReplicaReport).

    tiers: no entry is at ``Tier.ABSENT``.
    received_at_s: when this process got the report, on the follower's own clock.
    """

    replica_id: str
    node_id: str
    load: ReplicaLoad
    tiers: Mapping[str, Tier]
    failed: Mapping[str, str]
    catalog_version: int
    received_at_s: float


@dataclass(frozen=True, slots=True)
class ClusterView:
    """The cluster as last known. Never changes; the follower makes a new one per change (hints, not truth).

    catalog: adapter name -> its live record. tombstones: adapter name -> record of an adapter that was unloaded.
    replicas: replica id -> its status, for replicas believed alive.
    holders: adapter digest -> {replica id: Tier}, only adapters that some replica holds.
    catalog_version: the highest version of any record seen.
    connected: whether changes arrive; when not, ``current_at_s`` says until when they did (None: never connected).
    """

    catalog: Mapping[str, AdapterRecord] = field(default_factory=_nothing)
    tombstones: Mapping[str, AdapterRecord] = field(default_factory=_nothing)
    replicas: Mapping[str, ReplicaStatus] = field(default_factory=_nothing)
    holders: Mapping[str, Mapping[str, Tier]] = field(default_factory=_nothing)
    catalog_version: int = 0
    connected: bool = False
    current_at_s: float | None = None

    @property
    def is_known(self) -> bool:
        """Whether the catalog has ever been read: before that, what is not in it may exist all the same."""
        return self.connected or self.current_at_s is not None

    def age_s(self, now_s: float) -> float:
        """Seconds since this was known to be current: 0 while connected, infinite before the first connection.

        now_s: now, on the follower's clock.
        """
        if self.connected:
            return 0.0
        return float("inf") if self.current_at_s is None else max(0.0, now_s - self.current_at_s)

    def tier(self, replica_id: str, digest: str) -> Tier:
        """Where that replica holds that adapter; ``Tier.ABSENT`` when unknown."""
        return self.holders.get(digest, {}).get(replica_id, Tier.ABSENT)
