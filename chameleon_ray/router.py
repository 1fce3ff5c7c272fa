"""The Serve request router of the replica deployment: translation between Ray Serve and ``routing``, no policy.

Runs in every process that holds a handle of the deployment (each ingress replica), on Serve's router event loop. Serve
pickles this module by value: whatever the process shares (follower, metrics) lives in other modules.

A request names its adapter by content digest: ``handle.options(multiplexed_model_id=digest)``, empty for the base
model. Without ``@serve.multiplexed`` and Serve's multiplex mixin that id only travels along (except for an index that
Serve would never empty, see ``_drop_model_index``).

What Serve 2.60 demands of a router, found by trying: an exception in ``choose_replicas`` or an empty answer without
back-off hangs the request for good; routing tasks are capped so low that a full replica's requests block the others;
deaths of idle replicas show only as their absence from ``update_replicas``.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from chameleon_ray import metrics
from chameleon_ray.config import RedisConfig, RouterConfig
from chameleon_ray.placement import ClusterView, ReplicaStatus, shared_follower
from chameleon_ray.policy.adapter import Adapter, Tier
from chameleon_ray.routing.ranking import Decision, LoadCosts, rank_replicas
from chameleon_ray.routing.replica_table import ReplicaTable, ReplicaView

logger = logging.getLogger("ray.serve")

GIB = 2**30
_MAX_ROUTING_TASKS = 1000
_LOG_PAUSE_S = 10.0
_GAUGE_PAUSE_S = 1.0
LOOKS_ALWAYS_UP_TO = 64
"""Replicas whose reports are all looked through for every request."""
_LOOK_PAUSE_S = 0.05
"""How often to look through the reports of a larger cluster."""


def request_router_config(redis: RedisConfig, router: RouterConfig) -> RequestRouterConfig:
    """What to deploy the replicas with, so that handles route through ``AffinityRouter``.

    The back-off is far below Serve's default (up to 0.5 s), which leaves replicas idle when all were full.
    """
    return RequestRouterConfig(
        request_router_class="chameleon_ray.router:AffinityRouter",  # type: ignore[arg-type]
        request_router_kwargs={"redis": redis.model_dump(mode="json"), "router": router.model_dump(mode="json")},
        initial_backoff_s=0.005,  # type: ignore[arg-type]
        max_backoff_s=0.02,  # type: ignore[arg-type]
    )


def load_costs(router: RouterConfig) -> LoadCosts:
    """The policy's view of the router's configuration."""
    return LoadCosts(
        host_load_bytes_s=router.host_load_gib_s * GIB,
        disk_load_bytes_s=router.disk_load_gib_s * GIB,
        source_load_bytes_s=router.source_load_gib_s * GIB,
        load_overhead_s=router.load_overhead_s,
        hysteresis=router.hysteresis,
    )


class AffinityRouter(RequestRouter):
    """Sends each request to the replica with the least expected time to first token (``routing``)."""

    def initialize_state(self, redis: dict[str, Any], router: dict[str, Any]) -> None:  # type: ignore[override]
        """redis, router: dumps of RedisConfig (with ``url``) and RouterConfig."""
        settings = RouterConfig.model_validate(router)
        self._costs = load_costs(settings)
        self._follower = shared_follower(RedisConfig.model_validate(redis))
        self._in_flight = InFlight()
        self._adapters = Adapters()
        self._reports = Reports(self._in_flight, settings.max_report_age_s)
        self._started_s = time.monotonic()
        self._log_again_s = self._gauge_again_s = 0.0
        self._decisions = metrics.ROUTING_DECISIONS.counter()
        self._lookups, self._hits = metrics.ROUTING_LOOKUPS.counter(), metrics.ROUTING_HITS.counter()
        self._failures = metrics.ROUTING_FAILURES.counter()
        self._placement_age = metrics.PLACEMENT_AGE_S.gauge()

    @property
    def max_num_routing_tasks(self) -> int:
        """Serve's own bound, twice the replicas, lets requests for one full replica block those for idle ones."""
        return _MAX_ROUTING_TASKS

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The candidates in ranks of one, best first, then the rest together. Never raises, never waits."""
        candidates = list(candidate_replicas)
        if pending_request is None:
            return [candidates]
        pending_request.routing_context.should_backoff = True
        try:
            return self._rank(candidates, pending_request)
        except Exception:
            self._failures.inc()
            if time.monotonic() >= self._log_again_s:
                self._log_again_s = time.monotonic() + _LOG_PAUSE_S
                logger.exception("Ranking replicas failed: requests are balanced by load until it works again.")
            random.shuffle(candidates)  # a burst is ranked before its first request counts as in flight
            return [sorted(candidates, key=lambda replica: self._in_flight.count(replica.replica_id.unique_id))]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """A request leaves for the replica."""
        super().on_send_request(replica_id)
        self._in_flight.send(replica_id.unique_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """A request that left has ended: answered, failed, cancelled or refused by the replica."""
        super().on_request_completed(replica_id, internal_request_id)
        self._in_flight.end(replica_id.unique_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Serve noticed by a failed call that the replica is dead."""
        super().on_replica_actor_died(replica_id)
        self._forget(replica_id.unique_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """The controller's list of running replicas changed; it is the only word about one that died while idle."""
        gone = {replica_id.unique_id for replica_id in self.curr_replicas}
        gone -= {replica.replica_id.unique_id for replica in replicas}
        super().update_replicas(replicas)
        for replica_id in gone:
            self._forget(replica_id)

    def _rank(self, candidates: list[RunningReplica], pending: PendingRequest) -> list[list[RunningReplica]]:
        digest = pending.metadata.multiplexed_model_id
        self._drop_model_index(digest)
        is_retry = self._in_flight.withdraw(pending.future)
        cluster, now_s = self._follower.view(), time.monotonic()
        by_id = {replica.replica_id.unique_id: replica for replica in candidates}
        table = self._reports.update(_without_silent(by_id, cluster), cluster, now_s)
        adapter = self._adapters.get(digest, cluster) if digest else None
        holders = self._reports.holders(cluster, digest)
        decision = rank_replicas(adapter, table, holders, self._costs, pending.metadata.internal_request_id)
        self._in_flight.choose(pending.future, decision.replica_ids[0])
        if not is_retry:
            self._record(decision, cluster, now_s)
        ranked = [[by_id.pop(replica_id)] for replica_id in decision.replica_ids]
        return [*ranked, list(by_id.values())] if by_id else ranked

    def _record(self, decision: Decision, cluster: ClusterView, now_s: float) -> None:
        self._decisions.inc(tags={"reason": decision.reason})
        if decision.reason != "base":
            self._lookups.inc()
            if decision.tier == Tier.GPU:
                self._hits.inc()
        if now_s >= self._gauge_again_s:
            self._gauge_again_s = now_s + _GAUGE_PAUSE_S
            self._placement_age.set(min(cluster.age_s(now_s), now_s - self._started_s))

    def _drop_model_index(self, digest: str) -> None:
        """Serve indexes pending requests by model id for its multiplex mixin, which alone ever removes one: without
        the mixin every request, its body included, would stay in that index for the life of the process."""
        self._pending_requests_by_model_id.pop(digest, None)

    def _forget(self, replica_id: str) -> None:
        self._follower.forget(replica_id)
        self._reports.forget(replica_id)


def _without_silent(by_id: dict[str, RunningReplica], cluster: ClusterView) -> dict[str, RunningReplica]:
    """The replicas that report themselves, when some do not: those hang, are cut off, or have only just started."""
    if not cluster.connected or len(by_id) <= len(cluster.replicas):
        return by_id
    return {replica_id: by_id[replica_id] for replica_id in by_id.keys() & cluster.replicas.keys()} or by_id


class Adapters:
    """What the catalog says of contents, which never change."""

    def __init__(self) -> None:
        self._known: dict[str, Adapter] = {}

    def get(self, digest: str, cluster: ClusterView) -> Adapter:
        """The adapter of that content; of one that the catalog does not know (yet), that it has no size."""
        if digest not in self._known:
            records = cluster.catalog.values()
            self._known = {record.digest: Adapter(record.digest, record.rank, record.size_bytes) for record in records}
        return self._known.get(digest) or Adapter(digest, rank=0, size_bytes=0)


class InFlight:
    """This router's own requests per replica: sent and not ended, or decided on and about to be sent.

    Serve's queue-length cache counts something else: all handles' requests, as of the replica's last reply, forgotten
    after 10 s without traffic. And of a burst it knows nothing until the first requests are sent: all of them would be
    ranked within one turn of the event loop, on the same counts, and go to the same replica.

    Serve calls ``on_send_request`` and ``on_request_completed`` once each for every request sent; what was decided on
    counts until its future is done: then it is either sent or cancelled. (``handle.choose_replica`` without a
    reservation never ends that future: do not use it with this router.)
    """

    def __init__(self) -> None:
        self._sent: Counter[str] = Counter()
        self._chosen: Counter[str] = Counter()
        self._changed: set[str] = set()
        self._choices: dict[asyncio.Future[Any], str] = {}

    def count(self, replica_id: str) -> int:
        """Requests sent there and not ended, and about to be sent there."""
        return self._sent[replica_id] + self._chosen[replica_id]

    def count_sent(self, replica_id: str) -> int:
        """Requests sent there and not ended."""
        return self._sent[replica_id]

    def choose(self, request: asyncio.Future[Any], replica_id: str) -> None:
        """``request`` is about to be sent there, until it is done or withdrawn."""
        self._choices[request] = replica_id
        self._chosen[replica_id] += 1
        self._changed.add(replica_id)
        request.add_done_callback(self.withdraw)

    def withdraw(self, request: asyncio.Future[Any]) -> bool:
        """Take back what ``choose`` noted for ``request``. Whether there was something."""
        request.remove_done_callback(self.withdraw)
        replica_id = self._choices.pop(request, None)
        if replica_id is None:
            return False
        _lower(self._chosen, replica_id)
        self._changed.add(replica_id)
        return True

    def send(self, replica_id: str) -> None:
        """A request leaves for the replica."""
        self._sent[replica_id] += 1
        self._changed.add(replica_id)

    def end(self, replica_id: str) -> None:
        """A request sent there has ended."""
        _lower(self._sent, replica_id)
        self._changed.add(replica_id)

    def forget(self, replica_id: str) -> None:
        """The replica is gone."""
        self._sent.pop(replica_id, None)
        self._chosen.pop(replica_id, None)
        self._changed.add(replica_id)

    def take_changed(self) -> set[str]:
        """The replicas whose counts have changed since this was last asked."""
        changed, self._changed = self._changed, set()
        return changed


class Reports:
    """The policy's table of replicas, kept up with Serve's list, the placement copy and this router's own requests."""

    def __init__(self, in_flight: InFlight, max_age_s: float) -> None:
        """max_age_s: older reports count as none."""
        self._in_flight = in_flight
        self._max_age_s = max_age_s
        self._table = ReplicaTable()
        self._statuses: dict[str, ReplicaStatus | None] = {}
        self._sent_at_report: dict[str, int] = {}
        self._look_again_s = 0.0

    def update(self, replicas: Mapping[str, Any], cluster: ClusterView, now_s: float) -> ReplicaTable:
        """The table for a decision now over ``replicas``, by id; up to ``LOOKS_ALWAYS_UP_TO`` it lags in nothing."""
        changed = self._in_flight.take_changed()
        if replicas.keys() != self._statuses.keys():
            for replica_id in self._statuses.keys() - replicas.keys():
                self.forget(replica_id)
            self._look_again_s = now_s
        if len(replicas) > LOOKS_ALWAYS_UP_TO and now_s < self._look_again_s:
            for replica_id in changed & replicas.keys():
                self._put(replica_id, self._statuses[replica_id])
            return self._table
        self._look_again_s = now_s + _LOOK_PAUSE_S
        for replica_id in replicas:
            status = cluster.replicas.get(replica_id)
            if status is not None and now_s - status.received_at_s > self._max_age_s:
                status = None
            known = replica_id in self._statuses
            if not known or replica_id in changed or status is not self._statuses[replica_id]:
                self._put(replica_id, status)
        return self._table

    def holders(self, cluster: ClusterView, digest: str) -> dict[str, Tier]:
        """Where the adapter lies, by replicas whose reports are not too old."""
        held = cluster.holders.get(digest, {})
        return {replica_id: tier for replica_id, tier in held.items() if self._statuses.get(replica_id) is not None}

    def forget(self, replica_id: str) -> None:
        """The replica is gone, and with it this router's requests there."""
        self._in_flight.forget(replica_id)
        self._table.remove(replica_id)
        self._statuses.pop(replica_id, None)
        self._sent_at_report.pop(replica_id, None)

    def _put(self, replica_id: str, status: ReplicaStatus | None) -> None:
        if status is not self._statuses.get(replica_id):
            self._sent_at_report[replica_id] = self._in_flight.count_sent(replica_id)
        self._statuses[replica_id] = status
        in_flight = self._in_flight.count(replica_id)
        load, sent = (status.load, self._sent_at_report[replica_id]) if status is not None else (None, 0)
        self._table.put(ReplicaView(replica_id, Tier.ABSENT, in_flight, load, report_in_flight=sent))


def _lower(counts: Counter[str], key: str) -> None:
    """Down by one, never below zero (Serve reports the end of what it failed to send, too); zeros leave."""
    if counts[key] > 1:
        counts[key] -= 1
    else:
        counts.pop(key, None)
