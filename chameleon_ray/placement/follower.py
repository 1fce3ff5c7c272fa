"""A process's copy of catalog and placement, kept current by its own thread."""

import logging
import random
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import closing

import redis
from redis.client import PubSub

from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.config import RedisConfig
from chameleon_ray.placement.connection import sync_client
from chameleon_ray.placement.keys import Keys
from chameleon_ray.placement.messages import (
    CatalogChange,
    GarbageError,
    ReplicaChange,
    decode_message,
)
from chameleon_ray.placement.reader import CatalogPosition, SnapshotReader
from chameleon_ray.placement.scripts import RESTORE_CATALOG, RESTORE_CHUNK, restore_arguments
from chameleon_ray.placement.state import ClusterState
from chameleon_ray.placement.view import ClusterView

logger = logging.getLogger(__name__)

_POLL_S = 0.5
"""Pause between two looks at what no message tells: expired replicas, an emptied store, a subscription gone silent."""
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
_MAX_BATCH = 500
"""Messages taken in before the view is renewed."""


class ClusterFollower:
    """Follows catalog and placement in Redis on a daemon thread that starts at once. All methods are thread-safe.

    Messages carry sequence numbers (one sequence for the catalog, one per replica), so a hole is noticed at the next
    message and only what it touches is read again. A connection that breaks is made again with growing pauses and
    starts over with a whole snapshot. While it is gone, everything stays as last known; after that, replicas have
    ``heartbeat_ttl_s`` to show up again, and what the catalog lost is put back from memory.
    """

    def __init__(self, config: RedisConfig, clock: Callable[[], float] = time.monotonic) -> None:
        """config: ``url`` must be set (ValueError). clock: seconds, for ``received_at_s`` and ages."""
        self._config = config
        self._keys = Keys(config.key_prefix)
        self._clock = clock
        self._client = sync_client(config)
        self._reader = SnapshotReader(self._client, self._keys)
        self._restore_script = self._client.register_script(RESTORE_CATALOG)

        # Shared with callers: guarded by _changed, except that _view is read without it.
        self._changed = threading.Condition()
        self._state = ClusterState()
        self._view = self._state.view()
        self._problem: str | None = "Redis has not answered yet"
        self._forgotten: dict[str, float] = {}
        self._ready = threading.Event()
        self._closing = threading.Event()

        # The thread's own.
        self._catalog_position = CatalogPosition()
        self._resync_due = False
        self._restore_at_s: float | None = None
        self._grace_until_s = 0.0
        self._heard_at_s = 0.0
        self._ping_sent_at_s: float | None = None
        self._num_failures = 0

        self._thread = threading.Thread(target=self._run, name=f"follow {config.key_prefix}", daemon=True)
        self._thread.start()

    def view(self) -> ClusterView:
        """What is known now: no lock, no copy, the same object until something changes."""
        return self._view

    @property
    def problem(self) -> str | None:
        """Why Redis is not followed at the moment; None while it is."""
        return None if self._view.connected else self._problem

    def wait_ready(self, timeout_s: float) -> bool:
        """Block until the first whole snapshot is in (True) or the time is up. Not for an event loop's thread."""
        return self._ready.wait(timeout_s)

    def wait_for(self, predicate: Callable[[ClusterView], bool], timeout_s: float) -> bool:
        """Block until ``predicate(view)`` holds (True) or the time is up; it is asked after every change.

        In asyncio code: ``await asyncio.to_thread(follower.wait_for, ...)``.
        """
        with self._changed:
            return self._changed.wait_for(lambda: predicate(self._view), timeout_s)

    def forget(self, replica_id: str) -> None:
        """Take a replica out of the view at once (Serve says it died); it comes back only if it still reports after
        ``heartbeat_ttl_s``."""
        with self._changed:
            # Until then its last heartbeat may still lie in Redis or be on its way.
            self._forgotten[replica_id] = time.monotonic() + self._config.heartbeat_ttl_s
            self._state.drop_replica(replica_id)
            self._renew_view()

    def is_running(self) -> bool:
        """Whether the thread follows: not after ``close``, nor in a forked copy of the process."""
        return self._thread.is_alive() and not self._closing.is_set()

    def close(self) -> None:
        """Stop following; the thread is gone when this returns. The last view stays readable, as not connected."""
        self._closing.set()
        self._thread.join()

    # The thread: connection

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                with closing(self._client.pubsub()) as subscription:  # type: ignore[no-untyped-call]
                    self._subscribe(subscription)
                    self._grant_grace()
                    self._resync()
                    self._set_connected(True)
                    self._ready.set()
                    if self._num_failures:
                        logger.warning("following catalog and placement in Redis again")
                    self._follow(subscription)
            except (redis.RedisError, OSError) as error:
                self._problem = f"Redis cannot be used: {error or type(error).__name__}"
                if self._num_failures == 0:
                    logger.warning("placement stays as last known, Redis: %s", error)
            except Exception as error:
                self._problem = f"following Redis failed: {error!r}"
                # Whatever it is, a process without a follower would be worse than one that starts over.
                logger.exception("following catalog and placement failed; starting over")
            self._client.close()
            self._set_connected(False)
            # Jitter, so that all processes of a cluster do not come back to Redis in the same moment.
            pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(self._num_failures, 10))
            self._num_failures += 1
            self._closing.wait(pause_s * random.uniform(0.5, 1.0))

    def _subscribe(self, subscription: PubSub) -> None:
        subscription.subscribe(self._keys.changes)
        confirmation = subscription.get_message(timeout=self._config.timeout_s)
        if confirmation is None or confirmation["type"] != "subscribe":
            raise redis.ConnectionError(f"no answer to SUBSCRIBE within {self._config.timeout_s:g} s")
        self._heard_at_s = time.monotonic()
        self._ping_sent_at_s = None

    def _set_connected(self, connected: bool) -> None:
        with self._changed:
            was_connected = self._view.connected
            if connected:
                self._state.set_connected(True, None)
            elif was_connected:
                self._state.set_connected(False, self._clock() - (time.monotonic() - self._heard_at_s))
            self._renew_view()

    def _follow(self, subscription: PubSub) -> None:
        next_poll_s = time.monotonic() + _POLL_S
        while not self._closing.is_set():
            self._take_messages(subscription, next_poll_s)
            if time.monotonic() >= next_poll_s:
                self._poll(subscription)
                next_poll_s = time.monotonic() + _POLL_S
                self._num_failures = 0
            with self._changed:
                self._renew_view()

    def _take_messages(self, subscription: PubSub, until_s: float) -> None:
        timeout_s = max(0.0, until_s - time.monotonic())
        for _ in range(_MAX_BATCH):
            message = subscription.get_message(timeout=timeout_s)
            if message is None:
                return
            self._heard_at_s = time.monotonic()
            self._ping_sent_at_s = None
            if message["type"] == "message":
                self._take(message["data"])
            elif message["type"] == "subscribe":
                raise redis.ConnectionError("the subscription was made anew, changes may be missing")
            timeout_s = 0.0

    def _renew_view(self) -> None:
        view = self._state.view()
        if view is not self._view:
            self._view = view
            self._changed.notify_all()

    # The thread: changes

    def _take(self, data: bytes) -> None:
        try:
            message = decode_message(data)
        except GarbageError as error:
            if not self._resync_due:
                logger.error("ignored, reading everything again: %s", error)
            self._resync_due = True
            return
        if isinstance(message, CatalogChange):
            self._take_catalog_change(message)
        elif isinstance(message, ReplicaChange):
            self._take_replica_change(message)
        else:
            with self._changed:
                if self._state.is_run(message.replica_id, message.run):
                    self._state.drop_replica(message.replica_id)

    def _take_catalog_change(self, change: CatalogChange) -> None:
        position = self._catalog_position
        if change.epoch == position.epoch and change.seq <= position.seq:
            return
        if change.epoch == position.epoch and change.seq == position.seq + 1:
            with self._changed:
                self._state.merge_records(change.records)
            self._catalog_position = CatalogPosition(change.epoch, change.seq)
        else:
            self._read_catalog()

    def _take_replica_change(self, change: ReplicaChange) -> None:
        with self._changed:
            if change.beat.replica_id in self._forgotten:
                return
            applied = self._state.apply_report(change.beat, change.changed, self._clock())
        if not applied:
            self._read_replica(change.beat.replica_id)

    # The thread: reading

    def _poll(self, subscription: PubSub) -> None:
        now_s = time.monotonic()
        if self._ping_sent_at_s is None:
            subscription.ping()
            self._ping_sent_at_s = now_s
        elif now_s - self._ping_sent_at_s > self._config.timeout_s:
            raise redis.ConnectionError("the subscription is silent")
        if self._resync_due:
            self._resync()
        else:
            position, num_records = self._reader.catalog_position()
            if position != self._catalog_position or num_records < self._state.num_records:
                self._read_catalog()
            self._check_replicas(self._reader.alive_replicas())
        if self._restore_at_s is not None and now_s >= self._restore_at_s:
            self._restore(self._read_catalog())

    def _resync(self) -> None:
        self._resync_due = False
        self._read_catalog()
        alive = self._reader.alive_replicas()
        for replica_id in alive:
            self._read_replica(replica_id)
        self._check_replicas(alive)

    def _read_catalog(self) -> list[AdapterRecord]:
        """Take in the whole catalog; the records that are missing or older in Redis than here."""
        position, stored = self._reader.catalog()
        if position.epoch != self._catalog_position.epoch:
            self._grant_grace()  # Redis was emptied, so placement is gone as well
        with self._changed:
            self._state.merge_records(stored.values())
            missing = self._state.records_newer_than(stored)
        self._catalog_position = position
        if missing and self._restore_at_s is None:
            # Every follower of the cluster is about to do the same: whoever is first saves the others the work.
            self._restore_at_s = time.monotonic() + random.uniform(0.0, 2 * _POLL_S)
        return missing

    def _restore(self, missing: list[AdapterRecord]) -> None:
        self._restore_at_s = None
        taken = 0
        for start in range(0, len(missing), RESTORE_CHUNK):
            arguments = restore_arguments(self._keys, secrets.token_hex(8), missing[start : start + RESTORE_CHUNK])
            taken += int(self._restore_script(keys=[self._keys.catalog, self._keys.catalog_head], args=arguments))
        if taken:
            logger.warning("the catalog in Redis was older than ours: put back %d records", taken)

    def _check_replicas(self, alive: set[str]) -> None:
        """Drop replicas that expired, read those that are new here."""
        now_s = time.monotonic()
        with self._changed:
            self._forgotten = {name: until_s for name, until_s in self._forgotten.items() if until_s > now_s}
            known = self._state.replica_ids
            if now_s >= self._grace_until_s:
                for replica_id in known - alive:
                    self._state.drop_replica(replica_id)
            unknown = alive - known - self._forgotten.keys()
        for replica_id in unknown:
            self._read_replica(replica_id)

    def _read_replica(self, replica_id: str) -> None:
        if (report := self._reader.report(replica_id)) is None:
            return
        with self._changed:
            if replica_id not in self._forgotten:
                self._state.set_report(*report, self._clock())

    def _grant_grace(self) -> None:
        """Replicas could not report or their reports are lost: wait for the next ones before any counts as dead."""
        self._grace_until_s = time.monotonic() + self._config.heartbeat_ttl_s


_shared: dict[tuple[str | None, str], ClusterFollower] = {}
_shared_lock = threading.Lock()


def shared_follower(config: RedisConfig) -> ClusterFollower:
    """This process's follower of (``url``, ``key_prefix``), made at the first call and again after a ``close``.

    Code that Serve pickles by value (the router class) must get its follower here: a module-level object is shared by
    all code in the process, a pickled class's attribute is not.
    """
    with _shared_lock:
        follower = _shared.get((config.url, config.key_prefix))
        if follower is None or not follower.is_running():
            follower = _shared[(config.url, config.key_prefix)] = ClusterFollower(config)
        return follower
