"""Routing policies on stale hints: the product's (``routing``), and those it is compared with."""

from abc import ABC, abstractmethod
from collections import defaultdict
from random import Random

from chameleon_ray.policy.adapter import Tier
from chameleon_ray.routing.ranking import LoadCosts, rank_replicas
from chameleon_ray.routing.replica_load import ReplicaLoad
from chameleon_ray.routing.replica_table import ReplicaTable, ReplicaView
from chameleon_ray.sim.workload import SimRequest


class Hints:
    """What a router knows: membership and requests in flight of its own, tiers and loads as last heard of.

    holders: adapter digest -> {replica id: tier}, for copies in host or GPU memory. table: as ``policy`` keeps it.
    Every replica has all adapters on disk, as in the product after a load, and says so with its first report; a replica
    that has not reported yet is not known to have any.
    """

    def __init__(self) -> None:
        self.in_flight: list[int] = []
        self.holders: defaultdict[str, dict[str, Tier]] = defaultdict(dict)
        self.table = ReplicaTable()
        self._members: dict[int, None] = {}
        self._member_list: list[int] | None = None
        self._loads: dict[int, tuple[ReplicaLoad, int]] = {}
        self._names: list[str] = []

    @property
    def members(self) -> list[int]:
        """Live replicas, in order."""
        if self._member_list is None:
            self._member_list = sorted(self._members)
        return self._member_list

    def join(self, index: int) -> None:
        """A replica came up."""
        while index >= len(self.in_flight):
            self.in_flight.append(0)
            self._names.append(name(len(self._names)))
        self._members[index] = self._member_list = None
        self._put(index)

    def leave(self, index: int) -> None:
        """A replica is known to be gone, with all that it held."""
        self._members.pop(index, None)
        self._member_list = None
        self._loads.pop(index, None)
        self.table.remove(self._names[index])
        for holders in self.holders.values():
            holders.pop(self._names[index], None)

    def count(self, index: int, change: int) -> None:
        """So many more of the router's requests are in flight there."""
        self.in_flight[index] += change
        if index in self._members:
            self._put(index)

    def report(self, index: int, load: ReplicaLoad) -> None:
        """A replica's load is heard of."""
        if index in self._members:
            self._loads[index] = load, self.in_flight[index]
            self._put(index)

    def set_tier(self, digest: str, index: int, tier: Tier) -> None:
        """A replica holds the adapter there now."""
        if tier >= Tier.HOST and index in self._members:
            self.holders[digest][self._names[index]] = tier
        else:
            self.holders[digest].pop(self._names[index], None)

    def held_by(self, index: int) -> dict[str, Tier]:
        """Adapter digest -> tier, of those that the replica is taken to have in host or GPU memory."""
        replica_id = self._names[index]
        return {digest: tiers[replica_id] for digest, tiers in self.holders.items() if replica_id in tiers}

    def _put(self, index: int) -> None:
        load, at_report = self._loads.get(index, (None, 0))
        tier = Tier.ABSENT if load is None else Tier.DISK
        self.table.put(ReplicaView(self._names[index], tier, self.in_flight[index], load, at_report))


class Router(ABC):
    """Chooses a replica for each request."""

    def __init__(self, hints: Hints, rng: Random) -> None:
        self.hints = hints
        self.rng = rng

    @abstractmethod
    def choose(self, request: SimRequest) -> int:
        """The replica's index; it is alive as far as the router knows."""

    def less_loaded_of_two(self, candidates: list[int]) -> int:
        """Of two drawn at random, the one with fewer requests in flight."""
        two = self.rng.sample(candidates, 2) if len(candidates) > 2 else candidates
        return min(two, key=lambda index: (self.hints.in_flight[index], index))


class RandomRouter(Router):
    """Any replica."""

    def choose(self, request: SimRequest) -> int:
        return self.rng.choice(self.hints.members)


class PowerOfTwo(Router):
    """Ray Serve's default: the less loaded of two drawn at random."""

    def choose(self, request: SimRequest) -> int:
        return self.less_loaded_of_two(self.hints.members)


class StickyMultiplexing(Router):
    """Like Ray Serve's model multiplexing: the less loaded of two that hold the adapter, else of any two."""

    def choose(self, request: SimRequest) -> int:
        holders = [index_of(holder) for holder in self.hints.holders[request.adapter.digest]] if request.adapter else []
        return self.less_loaded_of_two(holders or self.hints.members)


class ConsistentHashing(Router):
    """Always the adapter's home; any replica for the base model."""

    def choose(self, request: SimRequest) -> int:
        if request.adapter is None:
            return self.rng.choice(self.hints.members)
        return index_of(self.hints.table.home(request.adapter.digest))


class Affinity(Router):
    """The product's: by expected time to first token."""

    def __init__(self, hints: Hints, rng: Random, costs: LoadCosts) -> None:
        super().__init__(hints, rng)
        self._costs = costs

    def choose(self, request: SimRequest) -> int:
        holders = self.hints.holders[request.adapter.digest] if request.adapter is not None else {}
        decision = rank_replicas(request.adapter, self.hints.table, holders, self._costs, request.request_id)
        return index_of(decision.replica_ids[0])


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
