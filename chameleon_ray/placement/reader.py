"""Snapshots out of Redis, each a consistent one. Blocking; entries that are not ours are logged and left out."""

import logging
from dataclasses import dataclass
from typing import Any

import redis

from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.placement.keys import Keys
from chameleon_ray.placement.messages import Beat, GarbageError, decode_record, decode_report
from chameleon_ray.placement.scripts import READ_REPLICA
from chameleon_ray.policy.adapter import Tier

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CatalogPosition:
    """Which message the catalog is at: number ``seq`` of ``epoch``; the default for one nobody ever wrote to."""

    epoch: str = ""
    seq: int = 0


class SnapshotReader:
    """Raises redis.RedisError and OSError like the client it is given."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._client = client
        self._keys = keys
        self._read_replica = client.register_script(READ_REPLICA)

    def catalog_position(self) -> tuple[CatalogPosition, int]:
        """The catalog's position and how many records it has."""
        pipeline = self._client.pipeline(transaction=True)
        pipeline.hmget(self._keys.catalog_head, "epoch", "seq")
        pipeline.hlen(self._keys.catalog)
        head, num_records = pipeline.execute()
        return _position(head), num_records

    def catalog(self) -> tuple[CatalogPosition, dict[str, AdapterRecord]]:
        """The catalog's position and its records by name, tombstones included."""
        pipeline = self._client.pipeline(transaction=True)
        pipeline.hmget(self._keys.catalog_head, "epoch", "seq")
        pipeline.hgetall(self._keys.catalog)
        head, entries = pipeline.execute()
        records: dict[str, AdapterRecord] = {}
        for name, data in entries.items():
            try:
                record = decode_record(name, data)
            except GarbageError as error:
                logger.error("ignored: %s", error)
                continue
            records[record.name] = record
        return _position(head), records

    def alive_replicas(self) -> set[str]:
        """Ids of the replicas whose heartbeat has not expired; the others are taken off Redis's list."""
        listed: list[bytes] = list(self._client.smembers(self._keys.replicas))  # type: ignore[arg-type]
        pipeline = self._client.pipeline(transaction=False)
        for name in listed:
            pipeline.exists(self._keys.heartbeat(name.decode(errors="replace")))
        found = dict(zip(listed, pipeline.execute(), strict=True))
        if dead := [name for name, exists in found.items() if not exists]:
            self._client.srem(self._keys.replicas, *dead)  # whoever is alive after all is back with its next report
        return {name.decode(errors="replace") for name, exists in found.items() if exists}

    def report(self, replica_id: str) -> tuple[Beat, dict[str, Tier]] | None:
        """A replica's last report and all its tiers; None when it has expired."""
        found = self._read_replica(keys=[self._keys.heartbeat(replica_id), self._keys.tiers(replica_id)])
        if found is None:
            return None
        beat_json, entries_json = found
        try:
            return decode_report(replica_id, beat_json, entries_json)
        except GarbageError as error:
            logger.error("ignored: %s", error)
            return None


def _position(head: list[Any]) -> CatalogPosition:
    epoch, seq = head
    return CatalogPosition((epoch or b"").decode(errors="replace"), int(seq or 0))
