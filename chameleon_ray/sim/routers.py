"""Routing policies on stale hints: the product's (``policy.routing``), and those it is compared with."""

from abc import ABC, abstractmethod
from collections import defaultdict
from random import Random

import numpy as np

from chameleon_ray.policy.adapter import Adapter, Tier
from chameleon_ray.policy.routing import LoadCosts, ReplicaLoad, ReplicaView, rank_replicas, rendezvous_weight
from chameleon_ray.sim.workload import SimRequest

SHORTLIST = 16
"""In clusters above ``EXACT_UP_TO``, affinity routing looks at the replicas that hold the adapter, at so many first in
its rendezvous order, and at so many with the fewest requests in flight, instead of at all of them."""
EXACT_UP_TO = 64


class Hints:
    """What a router knows: membership and requests in flight of its own, tiers and loads as last heard of."""

    def __init__(self, num_replicas: int) -> None:
        self.alive: set[int] = set(range(num_replicas))
        self.in_flight = np.zeros(num_replicas, np.int64)
        self.tiers: defaultdict[str, dict[int, Tier]] = defaultdict(dict)
        self.loads: dict[int, tuple[ReplicaLoad, int]] = {}
        self.version = 0

    def join(self, index: int) -> None:
        """A replica came up; indices are handed out in order."""
        self.in_flight = np.append(self.in_flight, np.zeros(max(0, index + 1 - len(self.in_flight)), np.int64))
        self.alive.add(index)
        self.version += 1

    def leave(self, index: int) -> None:
        """A replica is known to be gone, with all that it held."""
        self.alive.discard(index)
        self.loads.pop(index, None)
        for holders in self.tiers.values():
            holders.pop(index, None)
        self.version += 1

    def set_tier(self, digest: str, index: int, tier: Tier) -> None:
        """A replica holds the adapter there now; DISK and below is as good as nowhere."""
        if tier >= Tier.HOST and index in self.alive:
            self.tiers[digest][index] = tier
        else:
            self.tiers[digest].pop(index, None)


class Router(ABC):
    """Chooses a replica for each request."""

    def __init__(self, hints: Hints, rng: Random) -> None:
        self.hints = hints
        self.rng = rng
        self._order: dict[str, tuple[int, list[int]]] = {}
        self._members: tuple[int, list[int]] = (-1, [])

    @abstractmethod
    def choose(self, request: SimRequest) -> int:
        """The replica's index; it is alive as far as the router knows."""

    @property
    def members(self) -> list[int]:
        """Live replicas in order."""
        if self._members[0] != self.hints.version:
            self._members = (self.hints.version, sorted(self.hints.alive))
        return self._members[1]

    def home_order(self, digest: str) -> list[int]:
        """The adapter's first ``SHORTLIST`` replicas in rendezvous order."""
        known = self._order.get(digest)
        if known is None or known[0] != self.hints.version:
            order = sorted(self.members, key=lambda index: rendezvous_weight(digest, name(index)), reverse=True)
            known = self._order[digest] = (self.hints.version, order[:SHORTLIST])
        return known[1]

    def less_loaded_of_two(self, candidates: list[int]) -> int:
        """Of two drawn at random, the one with fewer requests in flight."""
        two = self.rng.sample(candidates, 2) if len(candidates) > 2 else candidates
        return min(two, key=lambda index: (int(self.hints.in_flight[index]), index))


class RandomRouter(Router):
    """Any replica."""

    def choose(self, request: SimRequest) -> int:
        return self.rng.choice(self.members)


class PowerOfTwo(Router):
    """Ray Serve's default: the less loaded of two drawn at random."""

    def choose(self, request: SimRequest) -> int:
        return self.less_loaded_of_two(self.members)


class StickyMultiplexing(Router):
    """Like Ray Serve's model multiplexing: the less loaded of two that hold the adapter, else of any two."""

    def choose(self, request: SimRequest) -> int:
        holders = list(self.hints.tiers[request.adapter.digest]) if request.adapter else []
        return self.less_loaded_of_two(holders or self.members)


class ConsistentHashing(Router):
    """Always the adapter's home."""

    def choose(self, request: SimRequest) -> int:
        return self.home_order(request.adapter.digest if request.adapter else request.request_id)[0]


class Affinity(Router):
    """The product's: by expected time to first token."""

    def __init__(self, hints: Hints, rng: Random, costs: LoadCosts, shortlist: bool | None = None) -> None:
        """shortlist: None decides by the size of the cluster."""
        super().__init__(hints, rng)
        self._costs = costs
        self._shortlist = shortlist

    def choose(self, request: SimRequest) -> int:
        views = [self._view(request.adapter, index) for index in self._candidates(request.adapter)]
        decision = rank_replicas(request.adapter, views, self._costs, request.request_id)
        return index_of(decision.replica_ids[0])

    def _candidates(self, adapter: Adapter | None) -> list[int]:
        members = self.members
        shortlist = len(members) > EXACT_UP_TO if self._shortlist is None else self._shortlist
        if not shortlist or len(members) <= SHORTLIST:
            return members
        in_flight = self.hints.in_flight[members]
        least = np.argpartition(in_flight, SHORTLIST)[:SHORTLIST]
        chosen = {members[place] for place in least.tolist()}
        if adapter is not None:
            chosen.update(self.hints.tiers[adapter.digest])
            chosen.update(self.home_order(adapter.digest))
        return sorted(chosen)

    def _view(self, adapter: Adapter | None, index: int) -> ReplicaView:
        load, at_report = self.hints.loads.get(index, (None, 0))
        tier = self.hints.tiers[adapter.digest].get(index, Tier.DISK) if adapter is not None else Tier.GPU
        return ReplicaView(name(index), tier, int(self.hints.in_flight[index]), load, at_report)


ROUTERS = {
    "affinity": Affinity,
    "power_of_two": PowerOfTwo,
    "sticky": StickyMultiplexing,
    "random": RandomRouter,
    "consistent_hashing": ConsistentHashing,
}


def make_router(routing: str, hints: Hints, rng: Random, costs: LoadCosts) -> Router:
    """A router by its name in ``ROUTERS``."""
    return Affinity(hints, rng, costs) if routing == "affinity" else ROUTERS[routing](hints, rng)


def name(index: int) -> str:
    """A replica's id."""
    return f"replica-{index}"


def index_of(replica_id: str) -> int:
    """The index of a replica by its id."""
    return int(replica_id.removeprefix("replica-"))
