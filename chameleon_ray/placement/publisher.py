"""A replica's side of placement: its heartbeat, load and tiers."""

import asyncio
import json
import logging
import secrets
from collections.abc import Mapping

import redis

from chameleon_ray.config import RedisConfig
from chameleon_ray.placement.connection import async_client
from chameleon_ray.placement.keys import Keys
from chameleon_ray.placement.messages import Beat, ReplicaChange, Withdrawal
from chameleon_ray.placement.scripts import PUBLISH_REPLICA, WITHDRAW_REPLICA
from chameleon_ray.placement.view import ReplicaReport
from chameleon_ray.policy.adapter import Tier

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 1.0


class ReplicaPublisher:
    """Publishes one replica; use it from one event loop.

    A report is written as changes to the one before, under the condition that Redis still holds that one. If it does
    not (emptied, restarted, expired, or a write of unknown outcome), everything is written anew.
    """

    def __init__(self, replica_id: str, node_id: str, config: RedisConfig) -> None:
        """config: ``url`` must be set (ValueError)."""
        self._replica_id = replica_id
        self._node_id = node_id
        self._keys = Keys(config.key_prefix)
        self._ttl_s = config.heartbeat_ttl_s
        self._timeout_s = config.timeout_s
        self._client = async_client(config)
        self._publish_script = self._client.register_script(PUBLISH_REPLICA)
        self._withdraw_script = self._client.register_script(WITHDRAW_REPLICA)
        self._run = secrets.token_hex(8)
        self._seq = 0
        self._stored_beat = ""
        self._stored_tiers: dict[str, Tier] = {}
        self._one_at_a_time = asyncio.Lock()
        self._num_failures = 0
        self._retry_at_s = float("-inf")
        self._withdrawn = False

    async def publish(self, report: ReplicaReport, now_s: float) -> bool:
        """Publish ``report``; call it every ``heartbeat_s``. Whether Redis has it now.

        now_s: monotonic time. Trouble with Redis is logged once and tried again (with a pause that grows to 1 s), never
        raised: a replica serves on without Redis. After ``withdraw`` it does nothing and returns False.
        ValueError when the report is about another replica.
        """
        if (report.replica_id, report.node_id) != (self._replica_id, self._node_id):
            raise ValueError(f"publisher of {self._replica_id}@{self._node_id} got a report of {report.replica_id}")
        tiers: dict[str, Tier] = {digest: tier for digest, tier in report.tiers.items() if tier is not Tier.ABSENT}
        async with self._one_at_a_time:
            if self._withdrawn or now_s < self._retry_at_s:
                return False
            beat = Beat.of(report, self._run, self._seq + 1)
            self._seq = beat.seq
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._store(beat, tiers)
            except (redis.RedisError, OSError) as error:
                self._note_failure(error, now_s)
                return False
            self._note_success()
            return True

    async def withdraw(self) -> bool:
        """Take the replica out of every view at once (graceful stop) and close. Whether Redis took it; if it did not,
        the heartbeat's TTL does the same later."""
        async with self._one_at_a_time:
            if self._withdrawn:
                return True
            self._withdrawn = True
            message = Withdrawal(replica_id=self._replica_id, run=self._run).model_dump_json()
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._withdraw_script(
                        keys=self._replica_keys(), args=[self._keys.changes, message, self._replica_id]
                    )
            except (redis.RedisError, OSError) as error:
                logger.warning("replica %s leaves by its heartbeat's TTL, Redis: %s", self._replica_id, error)
                return False
            finally:
                await self._client.aclose()
            return True

    async def _store(self, beat: Beat, tiers: dict[str, Tier]) -> None:
        beat_json = beat.model_dump_json()
        stored = self._stored_tiers
        changed = {digest: tier for digest, tier in tiers.items() if stored.get(digest) is not tier}
        changed.update((digest, Tier.ABSENT) for digest in stored.keys() - tiers.keys())
        message = ReplicaChange(beat=beat, changed=changed).model_dump_json()
        if not (self._stored_beat and await self._send(beat_json, message, self._stored_beat, changed)):
            message = ReplicaChange(beat=beat, changed=None).model_dump_json()
            await self._send(beat_json, message, "", tiers)
        self._stored_beat, self._stored_tiers = beat_json, tiers

    async def _send(self, beat_json: str, message: str, expected_beat: str, changed: Mapping[str, Tier]) -> bool:
        ttl_ms = max(1, round(self._ttl_s * 1000))
        stored = await self._publish_script(
            keys=self._replica_keys(),
            args=[
                self._keys.changes,
                message,
                self._replica_id,
                ttl_ms,
                beat_json,
                expected_beat,
                len(self._stored_tiers),
                json.dumps(changed),
            ],
        )
        return bool(stored)

    def _replica_keys(self) -> list[str]:
        return [self._keys.heartbeat(self._replica_id), self._keys.tiers(self._replica_id), self._keys.replicas]

    def _note_failure(self, error: Exception, now_s: float) -> None:
        if self._num_failures == 0:
            logger.warning("replica %s serves on without Redis: %s", self._replica_id, error or type(error).__name__)
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(self._num_failures, 10))
        self._num_failures += 1
        self._retry_at_s = now_s + pause_s

    def _note_success(self) -> None:
        if self._num_failures:
            logger.warning("replica %s is published in Redis again", self._replica_id)
        self._num_failures = 0
