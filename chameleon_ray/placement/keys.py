"""Every key and channel that the application has in Redis."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Keys:
    """Names in Redis below one application's prefix; two applications with different prefixes never meet.

    prefix: ``RedisConfig.key_prefix``.
    """

    prefix: str

    @property
    def catalog(self) -> str:
        """Hash: adapter name -> AdapterRecord as JSON, tombstones included."""
        return f"{self.prefix}:catalog"

    @property
    def catalog_head(self) -> str:
        """Hash: ``epoch`` (random, new when Redis was emptied), ``seq`` (of the last catalog message), ``version``
        (the highest ever given to a record)."""
        return f"{self.prefix}:catalog:head"

    @property
    def replicas(self) -> str:
        """Set of the ids of replicas that may be alive: whoever has no heartbeat key is dead."""
        return f"{self.prefix}:replicas"

    def heartbeat(self, replica_id: str) -> str:
        """String with TTL: the replica's last report as JSON, without its tiers."""
        return f"{self.prefix}:heartbeat:{replica_id}"

    def tiers(self, replica_id: str) -> str:
        """Hash with TTL: adapter digest -> Tier as a number, for every adapter the replica holds somewhere."""
        return f"{self.prefix}:tiers:{replica_id}"

    @property
    def popularity(self) -> str:
        """Sorted set: adapter digest -> how often it was asked for, older uses counting less (``Popularity``)."""
        return f"{self.prefix}:popularity"

    @property
    def popularity_total(self) -> str:
        """String: the sum of these, as if none had been dropped."""
        return f"{self.prefix}:popularity:total"

    @property
    def changes(self) -> str:
        """Channel: every change of catalog, reports and tiers (see ``messages``)."""
        return f"{self.prefix}:changes"
