"""What the Serve router tells the policy of each replica, from the placement copy and its own requests."""

from types import MappingProxyType

import pytest

from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.placement import ClusterView, ReplicaStatus
from chameleon_ray.policy.adapter import Adapter, Tier
from chameleon_ray.router import LOOKS_ALWAYS_UP_TO, Adapters, InFlight, Reports
from chameleon_ray.routing.replica_load import ReplicaLoad
from chameleon_ray.routing.replica_table import ReplicaView

ADAPTER = Adapter("ad" * 32, 16, 1000)
MAX_AGE_S = 10.0


def cluster(received_s: dict[str, float], num_running: int = 0, tier: Tier = Tier.GPU) -> ClusterView:
    tiers = MappingProxyType({ADAPTER.digest: tier})
    load = ReplicaLoad(num_running=num_running, max_num_seqs=16)
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
        return table.views.get(name)

    def holders(self, cluster: ClusterView) -> dict[str, Tier]:
        return self.reports.holders(cluster, ADAPTER.digest)


@pytest.mark.parametrize("num_replicas", [3, LOOKS_ALWAYS_UP_TO + 10])
def test_reports_count_until_they_are_too_old(num_replicas: int) -> None:
    router = Router(num_replicas)
    unheard = ReplicaView("r1", Tier.ABSENT, 0)
    assert router.view_of("r1", ClusterView(), 0.0) == unheard
    seen = cluster({"r1": 1.0}, num_running=3)
    for now_s in (1.1, 10.9):
        assert router.view_of("r1", seen, now_s) == ReplicaView("r1", Tier.ABSENT, 0, seen.replicas["r1"].load, 0)
        assert router.holders(seen) == {"r1": Tier.GPU}
    assert (router.view_of("r1", seen, 11.1), router.holders(seen)) == (unheard, {})


@pytest.mark.parametrize("num_replicas", [3, LOOKS_ALWAYS_UP_TO + 10])
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


@pytest.mark.parametrize("num_replicas", [3, LOOKS_ALWAYS_UP_TO + 10])
def test_replicas_that_serve_no_longer_lists_are_forgotten_and_new_ones_known_at_once(num_replicas: int) -> None:
    router = Router(num_replicas)
    seen = cluster({"r0": 0.0, "new": 0.0})
    assert router.view_of("r0", seen, 0.0) is not None
    del router.names["r0"]
    router.names["new"] = None
    assert router.view_of("r0", seen, 0.001) is None
    assert router.view_of("new", seen, 0.002).load is not None
    router.reports.forget("new")
    assert router.view_of("new", seen, 0.003).load is not None


@pytest.mark.parametrize("seen_by_list", [True, False])
def test_requests_on_a_replica_that_died_count_no_more(seen_by_list: bool) -> None:
    router = Router(3)
    router.in_flight.send("r1")
    assert router.view_of("r1", ClusterView(), 0.0).in_flight == 1
    if seen_by_list:
        del router.names["r1"]
        assert router.view_of("r1", ClusterView(), 0.1) is None
    else:
        router.reports.forget("r1")
    assert router.in_flight.count("r1") == 0
    router.in_flight.end("r1")
    assert router.in_flight.count("r1") == 0


def test_adapters_have_the_catalogs_size_also_those_that_come_later() -> None:
    def record(number: int) -> AdapterRecord:
        return AdapterRecord(name=f"a{number}", digest=f"{number:064x}", uri="", rank=8 * number, size_bytes=10**number)

    adapters, catalog = Adapters(), {"a1": record(1)}
    assert adapters.get(f"{1:064x}", ClusterView(catalog=catalog)) == Adapter(f"{1:064x}", 8, 10)
    assert adapters.get(f"{2:064x}", ClusterView(catalog=catalog)) == Adapter(f"{2:064x}", 0, 0)
    assert adapters.get(f"{2:064x}", ClusterView(catalog=catalog | {"a2": record(2)})) == Adapter(f"{2:064x}", 16, 100)
