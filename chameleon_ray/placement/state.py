"""The cluster's state as a follower builds it up: changes in, views out. No I/O, no clock, no threads of its own."""

import sys
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Generic, TypeVar

from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.placement.messages import Beat
from chameleon_ray.placement.view import ClusterView, ReplicaStatus
from chameleon_ray.policy.adapter import Tier

K = TypeVar("K")
V = TypeVar("V")


class _CopyOnWrite(Generic[K, V]):
    """A dict that gives out frozen states of itself; it is copied at the first change after that, not per change."""

    def __init__(self) -> None:
        self._entries: dict[K, V] = {}
        self._frozen: Mapping[K, V] | None = None

    @property
    def entries(self) -> Mapping[K, V]:
        """For reading."""
        return self._entries

    def edit(self) -> dict[K, V]:
        """For a change that follows at once."""
        if self._frozen is not None:
            self._entries = self._entries.copy()
            self._frozen = None
        return self._entries

    def freeze(self) -> Mapping[K, V]:
        """This state, for good; the same object until the next ``edit``."""
        if self._frozen is None:
            self._frozen = MappingProxyType(self._entries)
        return self._frozen


_NOTHING: MappingProxyType[str, Tier] = MappingProxyType({})


def _hold(held: dict[str, Tier], key: str, tier: Tier) -> None:
    if tier is Tier.ABSENT:
        held.pop(key, None)
    else:
        held[key] = tier


class ClusterState:
    """Not thread-safe. ``view`` gives an immutable picture, cheap when little changed."""

    def __init__(self) -> None:
        self._catalog: _CopyOnWrite[str, AdapterRecord] = _CopyOnWrite()
        self._tombstones: _CopyOnWrite[str, AdapterRecord] = _CopyOnWrite()
        self._replicas: _CopyOnWrite[str, ReplicaStatus] = _CopyOnWrite()
        self._holders: _CopyOnWrite[str, MappingProxyType[str, Tier]] = _CopyOnWrite()
        self._tiers: dict[str, MappingProxyType[str, Tier]] = {}
        self._reports: dict[str, tuple[str, int]] = {}
        self._catalog_version = 0
        self._connected = False
        self._current_at_s: float | None = None
        self._view = ClusterView()

    def view(self) -> ClusterView:
        """The state as a value; the same object as before when nothing changed."""
        view = ClusterView(
            self._catalog.freeze(),
            self._tombstones.freeze(),
            self._replicas.freeze(),
            self._holders.freeze(),
            self._catalog_version,
            self._connected,
            self._current_at_s,
        )
        old = self._view
        unchanged = (
            old.catalog is view.catalog
            and old.tombstones is view.tombstones
            and old.replicas is view.replicas
            and old.holders is view.holders
            and (old.catalog_version, old.connected, old.current_at_s)
            == (view.catalog_version, view.connected, view.current_at_s)
        )
        if not unchanged:
            self._view = view
        return self._view

    def set_connected(self, connected: bool, current_at_s: float | None) -> None:
        """current_at_s: until when the state was surely current (only while not connected)."""
        self._connected, self._current_at_s = connected, current_at_s

    # Catalog

    @property
    def num_records(self) -> int:
        """Names known, tombstones included."""
        return len(self._catalog.entries) + len(self._tombstones.entries)

    def merge_records(self, records: Iterable[AdapterRecord]) -> None:
        """Take each record from Redis unless a newer one of its name is known (of equal ones, Redis's counts)."""
        for record in records:
            known = self._record(record.name)
            if known == record or (known is not None and known.version > record.version):
                continue
            target, other = (self._tombstones, self._catalog) if record.deleted else (self._catalog, self._tombstones)
            target.edit()[record.name] = record
            if record.name in other.entries:
                del other.edit()[record.name]
            self._catalog_version = max(self._catalog_version, record.version)

    def records_newer_than(self, stored: Mapping[str, AdapterRecord]) -> list[AdapterRecord]:
        """The records, tombstones included, that ``stored`` (name -> record) lacks or has in a lower version."""
        known = [*self._catalog.entries.values(), *self._tombstones.entries.values()]
        return [r for r in known if r.name not in stored or stored[r.name].version < r.version]

    def _record(self, name: str) -> AdapterRecord | None:
        return self._catalog.entries.get(name) or self._tombstones.entries.get(name)

    # Replicas

    @property
    def replica_ids(self) -> set[str]:
        """Replicas in the view."""
        return set(self._replicas.entries)

    def set_report(self, beat: Beat, tiers: Mapping[str, Tier], now_s: float) -> None:
        """Take a replica's whole report, unless the state has that one or a later one of the same run."""
        run, seq = self._reports.get(beat.replica_id, ("", 0))
        if run == beat.run and seq >= beat.seq:
            return
        held: dict[str, Tier] = {sys.intern(d): tier for d, tier in tiers.items() if tier is not Tier.ABSENT}
        before = self._tiers.get(beat.replica_id, _NOTHING)
        changed: dict[str, Tier] = {digest: tier for digest, tier in held.items() if before.get(digest) is not tier}
        changed.update((digest, Tier.ABSENT) for digest in before.keys() - held.keys())
        self._index(beat.replica_id, changed)
        self._set_status(beat, MappingProxyType(held) if changed else before, now_s)

    def apply_report(self, beat: Beat, changed: Mapping[str, Tier] | None, now_s: float) -> bool:
        """Take a report that says what changed since the one before. False, nothing done, when that one is missing
        here: the whole report has to be read. Reports of the past do nothing."""
        run, seq = self._reports.get(beat.replica_id, ("", 0))
        if run == beat.run and beat.seq <= seq:
            return True
        if changed is None or run != beat.run or beat.seq != seq + 1:
            return False
        tiers = self._tiers[beat.replica_id]
        if changed:
            held = tiers.copy()
            for digest, tier in changed.items():
                _hold(held, sys.intern(digest), tier)
            tiers = MappingProxyType(held)
            self._index(beat.replica_id, changed)
        self._set_status(beat, tiers, now_s)
        return True

    def is_run(self, replica_id: str, run: str) -> bool:
        """Whether the state's report of that replica comes from that run of it."""
        return replica_id in self._reports and self._reports[replica_id][0] == run

    def drop_replica(self, replica_id: str) -> None:
        """Remove a replica and all it holds."""
        if replica_id in self._replicas.entries:
            self._index(replica_id, dict.fromkeys(self._tiers.pop(replica_id), Tier.ABSENT))
            del self._replicas.edit()[replica_id]
            del self._reports[replica_id]

    def check(self) -> None:
        """The index says exactly what the replicas say (for tests)."""
        expected: dict[str, dict[str, Tier]] = {}
        for replica_id, status in self._replicas.entries.items():
            for digest, tier in status.tiers.items():
                expected.setdefault(digest, {})[replica_id] = tier
        assert {digest: dict(held) for digest, held in self._holders.entries.items()} == expected
        assert self._reports.keys() == self._tiers.keys() == self._replicas.entries.keys()
        assert not self._catalog.entries.keys() & self._tombstones.entries.keys()

    def _set_status(self, beat: Beat, tiers: MappingProxyType[str, Tier], now_s: float) -> None:
        self._tiers[beat.replica_id] = tiers
        self._reports[beat.replica_id] = (beat.run, beat.seq)
        self._replicas.edit()[beat.replica_id] = ReplicaStatus(
            replica_id=beat.replica_id,
            node_id=beat.node_id,
            load=beat.load,
            tiers=tiers,
            failed=MappingProxyType(beat.failed),
            catalog_version=beat.catalog_version,
            received_at_s=now_s,
        )

    def _index(self, replica_id: str, changed: Mapping[str, Tier]) -> None:
        if not changed:
            return
        holders = self._holders.edit()
        for digest, tier in changed.items():
            held = holders.get(digest, _NOTHING).copy()
            _hold(held, replica_id, tier)
            if held:
                holders[sys.intern(digest)] = MappingProxyType(held)
            else:
                holders.pop(digest, None)
