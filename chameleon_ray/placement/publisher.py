"""A replica's side of placement: its heartbeat, load and tiers."""

from chameleon_ray.config import RedisConfig
from chameleon_ray.placement.view import ReplicaReport


class ReplicaPublisher:
    """Publishes one replica; use it from one event loop."""

    def __init__(self, replica_id: str, node_id: str, config: RedisConfig) -> None:
        """config: ``url`` must be set (ValueError)."""
        raise NotImplementedError

    async def publish(self, report: ReplicaReport, now_s: float) -> bool:
        """Publish ``report``; call it every ``heartbeat_s``. Whether Redis has it.

        now_s: monotonic time. Trouble with Redis is logged once and tried again (with a pause that grows to 1 s), never
        raised: a replica serves on without Redis. After ``withdraw`` it does nothing and returns False.
        ValueError when the report is about another replica.
        """
        raise NotImplementedError

    async def withdraw(self) -> bool:
        """Take the replica out of every view at once (graceful stop) and close. Whether Redis took it; if it did not,
        the heartbeat's TTL does the same later."""
        raise NotImplementedError
