"""What the Serve router tells the policy of each replica, from the placement copy and its own requests."""

from types import MappingProxyType

import pytest

from chameleon_ray.placement import ClusterView, ReplicaStatus
from chameleon_ray.policy.adapter import Adapter, Tier
from chameleon_ray.policy.routing import ReplicaLoad, ReplicaView
from chameleon_ray.policy.shortlist import EXACT_UP_TO
from chameleon_ray.router import InFlight, Reports

ADAPTER = Adapter("ad" * 32, 16, 1000)
MAX_AGE_S = 10.0


def cluster(received_s: dict[str, float], num_running: int = 0, tier: Tier = Tier.GPU) -> ClusterView:
    tiers = MappingProxyType({ADAPTER.digest: tier})
    load = ReplicaLoad(num_running=num_running, max_running=16)
    statuses = {
        name: ReplicaStatus(name, "node", load, tiers, MappingProxyType({}), 0, at_s)
        for name, at_s in received_s.items()
    }
    return ClusterView(replicas=statuses, holders={ADAPTER.digest: dict.fromkeys(received_s, tier)})


class Router:
    def __init__(self, num_replicas: int) -> None:
        self.names = {f"r{index}": None for index in range(num_replicas)}
        self.in_flight = InFlight()
        self.reports = Reports(self.in_flight, MAX_AGE_S)

    def view_of(self, name: str, cluster: ClusterView, now_s: float) -> ReplicaView | None:
        table = self.reports.update(self.names, cluster, now_s)
        table.check()
        views = table.candidates(ADAPTER, self.reports.holders(cluster, ADAPTER.digest))
        return next((view for view in views if view.replica_id == name), None)


@pytest.mark.parametrize("num_replicas", [3, EXACT_UP_TO + 10])
def test_reports_count_until_they_are_too_old(num_replicas: int) -> None:
    router = Router(num_replicas)
    assert router.view_of("r1", ClusterView(), 0.0) in (None, ReplicaView("r1", Tier.ABSENT, 0))
    seen = cluster({"r1": 1.0}, num_running=3)
    assert router.view_of("r1", seen, 1.1) == ReplicaView("r1", Tier.GPU, 0, seen.replicas["r1"].load, 0)
    assert router.view_of("r1", seen, 10.9).tier is Tier.GPU
    aged = router.view_of("r1", seen, 11.1)
    assert aged is None or (aged.load, aged.tier) == (None, Tier.ABSENT)


@pytest.mark.parametrize("num_replicas", [3, EXACT_UP_TO + 10])
def test_only_what_was_sent_since_a_report_is_added_to_it(num_replicas: int) -> None:
    router = Router(num_replicas)
    router.in_flight.send("r1")
    seen = cluster({"r1": 1.0})
    assert router.view_of("r1", seen, 1.0).report_in_flight == 1
    router.in_flight.send("r1")
    view = router.view_of("r1", seen, 1.01)
    assert (view.in_flight, view.report_in_flight) == (2, 1)
    later = cluster({"r1": 1.2})
    view = router.view_of("r1", later, 1.2)
    assert (view.in_flight, view.report_in_flight) == (2, 2)
    router.in_flight.end("r1")
    assert router.view_of("r1", later, 1.21).in_flight == 1


def test_replicas_that_serve_no_longer_lists_are_forgotten_and_new_ones_known_at_once() -> None:
    router = Router(EXACT_UP_TO + 10)
    seen = cluster({"r0": 0.0, "new": 0.0})
    assert router.view_of("r0", seen, 0.0) is not None
    del router.names["r0"]
    router.names["new"] = None
    assert router.view_of("r0", seen, 0.001) is None
    assert router.view_of("new", seen, 0.002).tier is Tier.GPU
    router.reports.forget("new")
    assert router.view_of("new", seen, 0.003).tier is Tier.GPU
