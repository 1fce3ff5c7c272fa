"""Which replicas of a large cluster are worth ranking for a request (``routing.py``); its cost does not grow with them.

Three kinds of replicas can come first in a ranking; so many of each are on the list:

1. those that hold the adapter (of many, the least busy ones),
2. the first in the adapter's rendezvous order, where it would go for want of a better place,
3. the least busy ones, which win when all of the others are busy.

Clusters of up to ``EXACT_UP_TO`` replicas are ranked whole.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from heapq import nlargest, nsmallest

from chameleon_ray.policy.adapter import Adapter, Tier
from chameleon_ray.policy.routing import UNKNOWN_MAX_RUNNING, ReplicaView, rendezvous_weight

NUM_LISTED = 16
"""Replicas of each kind on the list."""

EXACT_UP_TO = 64
"""Replicas that are all ranked."""

_FEWEST_HOMES = 8
"""An adapter's order is made anew when deaths have left fewer of its first homes than that."""

_MOST_CHANGES = 1000
"""Joins and deaths remembered, for orders that were made before them."""

_MOST_ORDERS = 20_000
"""Adapters whose order is remembered; one takes some 2 KB."""

_Busyness = tuple[float, float, int, str]


@dataclass(slots=True)
class _Order:
    """The first homes of an adapter as (weight, replica id), ascending, as of so many changes of membership."""

    homes: list[tuple[int, str]]
    num_changes: int


class ReplicaTable:
    """What one router believes about its cluster's replicas, kept in order of how busy they are."""

    def __init__(self, salt: str = "") -> None:
        """salt: differs between routers, so that they do not all take equally busy replicas in the same order."""
        self._salt = salt
        self._views: dict[str, ReplicaView] = {}
        self._busyness: dict[str, _Busyness] = {}
        self._by_busyness: list[_Busyness] = []
        self._orders: OrderedDict[str, _Order] = OrderedDict()
        self._changes: list[tuple[str, bool]] = []
        self._num_forgotten_changes = 0

    def __len__(self) -> int:
        return len(self._views)

    def __contains__(self, replica_id: str) -> bool:
        return replica_id in self._views

    def put(self, view: ReplicaView) -> None:
        """A replica is new, or what is believed of it has changed. Its tier is the one it has without other hints."""
        replica_id = view.replica_id
        known = self._busyness.get(replica_id)
        if known is None:
            self._note_change(replica_id, True)
            tie = rendezvous_weight(self._salt, replica_id)
        else:
            tie = known[2]
        self._views[replica_id] = view
        now = (*_busyness(view), tie, replica_id)
        if now != known:
            if known is not None:
                del self._by_busyness[bisect_left(self._by_busyness, known)]
            insort(self._by_busyness, now)
            self._busyness[replica_id] = now

    def remove(self, replica_id: str) -> None:
        """A replica is gone; one that is not known is none."""
        if self._views.pop(replica_id, None) is not None:
            del self._by_busyness[bisect_left(self._by_busyness, self._busyness.pop(replica_id))]
            self._note_change(replica_id, False)

    def candidates(self, adapter: Adapter | None, holders: Mapping[str, Tier]) -> list[ReplicaView]:
        """Views of the replicas to rank. holders: where the adapter is known to be, in any replica, alive or not."""
        views = self._views
        if len(views) <= EXACT_UP_TO:
            return [_at(view, holders.get(replica_id)) for replica_id, view in views.items()]
        chosen = [busyness[3] for busyness in self._by_busyness[:NUM_LISTED]]
        if adapter is not None:
            chosen += [replica_id for _, replica_id in self._homes(adapter.digest)]
            chosen += self._least_busy(holders)
        listed = {replica_id: views[replica_id] for replica_id in chosen}
        for replica_id in listed.keys() & holders.keys():
            listed[replica_id] = _at(listed[replica_id], holders[replica_id])
        return list(listed.values())

    def home(self, key: str) -> str:
        """The first replica in a key's rendezvous order. There must be one."""
        return self._homes(key)[-1][1]

    def check(self) -> None:
        """AssertionError unless the orders are those that would be made anew."""
        busyness = {view.replica_id: _busyness(view) for view in self._views.values()}
        assert self._by_busyness == sorted(self._busyness.values())
        assert {key: (value[0], value[1]) for key, value in self._busyness.items()} == busyness
        for key in list(self._orders):
            homes = self._homes(key)
            assert homes == self._ranked(key)[-len(homes) :], f"homes of {key} are not its first ones"

    def _least_busy(self, holders: Mapping[str, Tier]) -> Iterable[str]:
        known = [replica_id for replica_id in holders if replica_id in self._views]
        if len(known) <= NUM_LISTED:
            return known
        in_gpu = [replica_id for replica_id in known if holders[replica_id] is Tier.GPU]
        elsewhere = [replica_id for replica_id in known if holders[replica_id] is not Tier.GPU]
        return [
            replica_id
            for group in (in_gpu, elsewhere)
            for replica_id in nsmallest(NUM_LISTED, group, key=self._busyness.__getitem__)
        ]

    def _homes(self, key: str) -> list[tuple[int, str]]:
        """Up to ``NUM_LISTED`` first homes, the first one last, brought up to date with the membership."""
        order = self._orders.get(key)
        num_changes = self._num_forgotten_changes + len(self._changes)
        if order is None or order.num_changes < self._num_forgotten_changes:
            order = self._orders[key] = _Order(self._ranked(key), num_changes)
            if len(self._orders) > _MOST_ORDERS:
                self._orders.popitem(last=False)
        elif order.num_changes < num_changes:
            for replica_id, joined in self._changes[order.num_changes - self._num_forgotten_changes :]:
                place = (rendezvous_weight(key, replica_id), replica_id)
                if not joined:
                    order.homes = [home for home in order.homes if home != place]
                elif order.homes and place > order.homes[0]:
                    insort(order.homes, place)
            if len(order.homes) < min(_FEWEST_HOMES, len(self._views)):
                order.homes = self._ranked(key)
            del order.homes[:-NUM_LISTED]
            order.num_changes = num_changes
        return order.homes

    def _ranked(self, key: str) -> list[tuple[int, str]]:
        return nlargest(NUM_LISTED, [(rendezvous_weight(key, name), name) for name in self._views])[::-1]

    def _note_change(self, replica_id: str, joined: bool) -> None:
        self._changes.append((replica_id, joined))
        if len(self._changes) > _MOST_CHANGES:
            del self._changes[: _MOST_CHANGES // 2]
            self._num_forgotten_changes += _MOST_CHANGES // 2


def _busyness(view: ReplicaView) -> tuple[float, float]:
    """(requests in excess of what runs at once, all requests), per seat: the order of the delays that they mean."""
    if view.load is None:
        num_requests, num_waiting, seats = view.in_flight, 0, UNKNOWN_MAX_RUNNING
    else:
        num_waiting, seats = view.load.num_waiting, view.load.max_running
        num_requests = view.load.num_running + num_waiting + max(0, view.in_flight - view.report_in_flight)
    return max(0, num_requests - seats + 1, num_waiting) / seats, num_requests / seats


def _at(view: ReplicaView, tier: Tier | None) -> ReplicaView:
    if tier is None or tier is view.tier:
        return view
    return ReplicaView(view.replica_id, tier, view.in_flight, view.load, view.report_in_flight)
