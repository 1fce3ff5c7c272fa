"""The ranking of replicas: rule by rule, as properties, and over time in a small simulated cluster."""

import dataclasses
import heapq
import itertools
import math
from collections import Counter, OrderedDict, defaultdict
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chameleon_ray.policy.adapter import Adapter, Tier
from chameleon_ray.routing.ranking import MIN_GAIN_S, NUM_RANKED, Decision, LoadCosts, rank_replicas
from chameleon_ray.routing.replica_load import ReplicaLoad
from chameleon_ray.routing.replica_table import ReplicaTable, ReplicaView, rendezvous_weight

GIB = 2**30
COSTS = LoadCosts(
    host_load_bytes_s=10 * GIB,
    disk_load_bytes_s=1 * GIB,
    source_load_bytes_s=0.2 * GIB,
    load_overhead_s=0.005,
    hysteresis=0.2,
)
ADAPTER = Adapter(digest="ad" * 32, rank=16, size_bytes=64 * 2**20)
IDLE = ReplicaLoad(max_num_seqs=16, service_s=2.0, ttft_s=0.05)


def view(replica_id: str, tier: Tier = Tier.ABSENT, *, sent: int = 0, **load: float) -> ReplicaView:
    return ReplicaView(replica_id, tier, in_flight=sent, load=dataclasses.replace(IDLE, **load))


def rank(adapter: Adapter | None, views: list[ReplicaView], request_key: str = "") -> Decision:
    table = ReplicaTable()
    for one in views:
        table.put(one)
    table.check()
    return rank_replicas(adapter, table, {}, COSTS, request_key)


def first(replicas: list[ReplicaView], adapter: Adapter | None = ADAPTER) -> str:
    return rank(adapter, replicas).replica_ids[0]


def in_rendezvous_order(digest: str, replica_ids: list[str]) -> list[str]:
    return sorted(replica_ids, key=lambda replica_id: -rendezvous_weight(digest, replica_id))


def digest_of(number: int) -> str:
    return f"{number:064x}"


@pytest.mark.parametrize(
    ("tiers", "chosen", "reason"),
    [
        ((Tier.ABSENT, Tier.HOST, Tier.GPU), 2, "resident"),
        ((Tier.ABSENT, Tier.HOST, Tier.DISK), 1, "host"),
        ((Tier.ABSENT, Tier.DISK, Tier.ABSENT), 1, "cold"),
    ],
)
def test_idle_replicas_the_closest_tier_wins(tiers: tuple[Tier, ...], chosen: int, reason: str) -> None:
    decision = rank(ADAPTER, [view(f"r{i}", tier) for i, tier in enumerate(tiers)])
    assert (decision.replica_ids[0], decision.reason, decision.tier) == (f"r{chosen}", reason, tiers[chosen])


def test_cold_adapter_goes_home_and_alternatives_follow_in_rendezvous_order() -> None:
    ids = [f"r{i}" for i in range(5)]
    decision = rank(ADAPTER, [view(replica_id) for replica_id in ids])
    assert decision.reason == "cold"
    assert list(decision.replica_ids) == in_rendezvous_order(ADAPTER.digest, ids)


def test_full_home_of_a_cold_adapter_is_left_as_overload() -> None:
    home, second, third = in_rendezvous_order(ADAPTER.digest, ["a", "b", "c"])
    decision = rank(ADAPTER, [view(home, num_running=16), view(second), view(third)])
    assert (decision.reason, decision.replica_ids) == ("overload", (second, third, home))


def test_holder_keeps_the_adapter_while_waiting_there_costs_less_than_loading_elsewhere() -> None:
    """64 MiB from its source take about 0.4 s; a full batch of 16 frees a place every 2 s / 16 = 0.125 s."""
    chosen = [first([view("holder", Tier.GPU, num_running=16, sent=sent), view("b"), view("c")]) for sent in range(12)]
    moved = next(sent for sent, replica_id in enumerate(chosen) if replica_id != "holder")
    assert 2 <= moved <= 5
    assert set(chosen[:moved]) == {"holder"} and "holder" not in chosen[moved:]


def test_hot_adapter_spreads_to_the_same_second_and_third_place_every_time() -> None:
    order = in_rendezvous_order(ADAPTER.digest, [f"r{i}" for i in range(6)])
    loads = {replica_id: 0 for replica_id in order}
    for _ in range(60):
        chosen = first([view(replica_id, num_running=loads[replica_id]) for replica_id in order])
        loads[chosen] += 1
    used = [replica_id for replica_id in order if loads[replica_id]]
    assert used == order[: len(used)] and 3 <= len(used) <= 4
    assert all(loads[replica_id] == 16 for replica_id in used[:-1])


def test_another_copy_in_gpu_memory_counts_as_resident_not_as_overload() -> None:
    preferred, other = in_rendezvous_order(ADAPTER.digest, ["a", "b"])
    decision = rank(ADAPTER, [view(preferred, Tier.GPU, num_waiting=9), view(other, Tier.GPU)])
    assert (decision.replica_ids[0], decision.reason) == (other, "resident")


def test_holder_in_host_memory_takes_over_from_a_holder_in_gpu_memory_that_is_full() -> None:
    decision = rank(ADAPTER, [view("a", Tier.GPU, num_waiting=9), view("b", Tier.HOST), view("c")])
    assert (decision.replica_ids[0], decision.reason, decision.tier) == ("b", "overload", Tier.HOST)


def test_eviction_is_charged_only_where_the_adapter_would_have_to_be_loaded() -> None:
    home, second = in_rendezvous_order(ADAPTER.digest, ["a", "b"])
    assert first([view(home, eviction_cost_s=1.0), view(second)]) == second
    assert first([view(home, Tier.GPU, eviction_cost_s=1.0), view(second)]) == home


def test_requests_waiting_count_as_excess_even_before_max_running_is_reached() -> None:
    """An engine out of KV blocks queues requests although its batch has free places."""
    preferred, other = in_rendezvous_order(ADAPTER.digest, ["a", "b"])
    as_many = view(other, Tier.GPU, num_running=12)
    assert first([view(preferred, Tier.GPU, num_running=12), as_many]) == preferred
    assert first([view(preferred, Tier.GPU, num_running=4, num_waiting=8), as_many]) == other


def test_a_report_is_corrected_by_the_requests_sent_and_ended_since() -> None:
    reported = dataclasses.replace(IDLE, num_running=10)
    known = ReplicaView("a", Tier.GPU, in_flight=10, report_in_flight=10, load=reported)
    ended = ReplicaView("a", Tier.GPU, in_flight=2, report_in_flight=10, load=reported)
    gone = ReplicaView("a", Tier.GPU, in_flight=0, report_in_flight=30, load=reported)
    since = ReplicaView("a", Tier.GPU, in_flight=30, report_in_flight=10, load=reported)
    expected = [rank(ADAPTER, [replica]).expected_ttft_s for replica in (known, ended, gone, since)]
    assert expected[:3] == pytest.approx([0.05 + 0.05 * 10 / 16, 0.05 + 0.05 * 2 / 16, 0.05])
    assert expected[3] == pytest.approx(0.05 + 0.05 + 2.0 * 15 / 16)


def test_full_kv_memory_delays_as_full_seats_do() -> None:
    """Ten requests hold 80% of the KV memory, 8% each: three more lack 4%, and 80% or so is given back in 2 s."""
    reported = dataclasses.replace(IDLE, num_running=10, max_num_seqs=256, kv_used_share=0.8)
    for unseen, expected_s in ((0, 0.05 * 0.8), (2, 0.05 * 0.96 + 2.0 * 0.04), (3, 0.05 + 2.0 * 0.12)):
        full = ReplicaView("a", Tier.GPU, in_flight=unseen, load=reported)
        assert rank(ADAPTER, [full]).expected_ttft_s == pytest.approx(0.05 + expected_s)


def test_requests_that_wait_for_kv_memory_count_with_what_they_will_hold() -> None:
    holder, other = view("a", Tier.GPU, num_running=10, kv_used_share=0.9, max_num_seqs=256), view("b", Tier.DISK)
    assert first([holder, other]) == "a"
    waiting = dataclasses.replace(holder, load=dataclasses.replace(holder.load, num_waiting=1))
    assert first([waiting, other]) == "b"
    expected_s = rank(ADAPTER, [waiting]).expected_ttft_s
    assert expected_s == pytest.approx(0.05 + 0.05 * 0.99 + 2.0 * 0.09)


def test_a_replica_without_requests_takes_them_to_be_as_large_as_those_of_others() -> None:
    busy = view("busy", Tier.GPU, num_running=10, kv_used_share=0.8, max_num_seqs=256)
    idle = dataclasses.replace(IDLE, max_num_seqs=256)
    for sent, chosen in ((14, "busy"), (2, "idle")):
        assert first([busy, ReplicaView("idle", Tier.GPU, in_flight=sent, load=idle)], None) == chosen


@pytest.mark.parametrize(("num_running", "stays"), [(24, True), (36, True), (56, False)])
def test_a_gain_below_five_milliseconds_moves_no_adapter_however_large_its_share(num_running: int, stays: bool) -> None:
    """The others add 2 ms * num_running / 16 and a bit at the home, and nothing elsewhere."""
    assert MIN_GAIN_S == 0.005
    home, other = in_rendezvous_order(ADAPTER.digest, ["a", "b"])
    quick = dataclasses.replace(IDLE, ttft_s=0.002, service_s=0.002)
    loads = {home: dataclasses.replace(quick, num_running=num_running), other: quick}
    chosen = first([ReplicaView(name, Tier.GPU, 0, load) for name, load in loads.items()])
    assert chosen == (home if stays else other)


def test_expected_ttft_adds_prefill_and_every_hop_of_the_load() -> None:
    size_bytes = ADAPTER.size_bytes
    host_s = 0.005 + size_bytes / (10 * GIB)
    by_tier = {
        Tier.GPU: 0.0,
        Tier.HOST: host_s,
        Tier.DISK: host_s + size_bytes / GIB,
        Tier.ABSENT: host_s + size_bytes / GIB + size_bytes / (0.2 * GIB),
    }
    for tier, load_s in by_tier.items():
        assert rank(ADAPTER, [view("a", tier)]).expected_ttft_s == pytest.approx(0.05 + load_s)


def test_a_replica_that_has_not_reported_yet_is_judged_by_the_others_values() -> None:
    newcomer = ReplicaView("new", Tier.ABSENT, in_flight=40)
    assert first([view("a", num_running=3), newcomer], None) == "a"
    assert first([view("a", num_running=3), dataclasses.replace(newcomer, in_flight=0)], None) == "new"


def test_without_hints_an_adapter_stays_home_until_requests_in_flight_get_uneven() -> None:
    home, *others = in_rendezvous_order(ADAPTER.digest, ["a", "b", "c"])

    def decide(home_in_flight: int) -> Decision:
        views = [ReplicaView(home, Tier.ABSENT, home_in_flight)]
        return rank(ADAPTER, views + [ReplicaView(other, Tier.ABSENT, 0) for other in others])

    assert [decide(count).replica_ids[0] for count in (0, 1, 3)] == [home] * 3
    assert [decide(count).replica_ids[0] for count in (8, 16, 100)] == [others[0]] * 3
    assert {decide(count).reason for count in (0, 8)} == {"no_hint"}


def test_without_hints_a_big_adapter_does_not_blunt_the_balance() -> None:
    home, other = in_rendezvous_order(ADAPTER.digest, ["a", "b"])
    huge = dataclasses.replace(ADAPTER, size_bytes=100 * GIB)
    assert first([ReplicaView(home, Tier.ABSENT, 8), ReplicaView(other, Tier.ABSENT, 0)], huge) == other


def test_base_requests_take_the_least_loaded_and_rotate_over_equals() -> None:
    busy, idle = view("busy", Tier.GPU, num_running=1), [view(f"idle{i}", Tier.GPU) for i in range(4)]
    decisions = [rank(None, [busy, *idle], request_key=str(key)) for key in range(400)]
    assert {decision.reason for decision in decisions} == {"base"}
    assert all(decision.replica_ids[-1] == "busy" for decision in decisions)
    counts = Counter(decision.replica_ids[0] for decision in decisions)
    assert len(counts) == 4 and min(counts.values()) > 60


def test_a_decision_names_at_most_eight_replicas_of_many() -> None:
    decision = rank(ADAPTER, [view(f"r{i}") for i in range(100)])
    assert list(decision.replica_ids) == in_rendezvous_order(ADAPTER.digest, [f"r{i}" for i in range(100)])[:NUM_RANKED]


def test_of_a_large_cluster_the_best_come_first_whatever_they_are_best_for() -> None:
    views = [view(f"r{i}", num_running=16) for i in range(1000)]
    views[700] = view("r700", Tier.HOST, num_running=15)
    views[300] = view("r300", Tier.GPU, num_running=14)
    decision = rank(ADAPTER, views)
    assert (decision.replica_ids[:2], decision.reason) == (("r300", "r700"), "resident")
    assert len(set(decision.replica_ids)) == NUM_RANKED
    views[5] = view("r5")
    assert rank(None, views).replica_ids[:3] == ("r5", "r300", "r700")


def test_what_is_heard_of_replicas_that_are_gone_changes_nothing() -> None:
    table = ReplicaTable()
    for name in ("a", "b", "c"):
        table.put(view(name))
    holders = {"a": Tier.GPU, "b": Tier.HOST}
    assert rank_replicas(ADAPTER, table, holders, COSTS).replica_ids[:2] == ("a", "b")
    table.remove("a")
    decision = rank_replicas(ADAPTER, table, holders, COSTS)
    assert (decision.replica_ids, decision.reason) == (("b", "c"), "host")


def test_joins_deaths_and_changes_leave_the_same_as_a_new_table() -> None:
    rng = Random(4)
    table, alive = ReplicaTable(), {}
    for step in range(3000):
        name = f"r{rng.randrange(60)}"
        if rng.random() < 0.25:
            alive.pop(name, None)
            table.remove(name)
        else:
            alive[name] = view(name, rng.choice(list(Tier)), sent=rng.randrange(9), num_running=rng.randrange(20))
            table.put(alive[name])
        if step % 50 == 0 and alive:
            table.check()
            adapter = dataclasses.replace(ADAPTER, digest=digest_of(step))
            decision = rank_replicas(adapter, table, {}, COSTS)
            assert decision.replica_ids == rank(adapter, list(alive.values())).replica_ids
            assert table.home(adapter.digest) == in_rendezvous_order(adapter.digest, list(alive))[0]


def test_bad_input_is_refused_with_a_hint() -> None:
    with pytest.raises(ValueError, match="no replica to choose from"):
        rank(ADAPTER, [])
    with pytest.raises(ValueError, match="disk_load_bytes_s is 0"):
        dataclasses.replace(COSTS, disk_load_bytes_s=0)
    with pytest.raises(ValueError, match="hysteresis is -1"):
        dataclasses.replace(COSTS, hysteresis=-1)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ReplicaLoad)])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_a_nonsense_load_report_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} of a replica's load"):
        dataclasses.replace(IDLE, **{field: value})


loads = st.builds(
    ReplicaLoad,
    num_running=st.integers(0, 64),
    num_waiting=st.integers(0, 64),
    max_num_seqs=st.integers(1, 64),
    service_s=st.floats(0, 100),
    ttft_s=st.floats(0, 10),
    eviction_cost_s=st.floats(0, 10),
)
views = st.builds(
    ReplicaView,
    replica_id=st.text("abcdef0123456789", min_size=8, max_size=8),
    tier=st.sampled_from(Tier),
    in_flight=st.integers(0, 200),
    load=st.none() | loads,
    report_in_flight=st.integers(0, 200),
)
clusters = st.lists(views, min_size=1, max_size=12, unique_by=lambda one: one.replica_id)
adapters = st.none() | st.builds(
    Adapter,
    digest=st.text("abcdef0123456789", min_size=64, max_size=64),
    rank=st.sampled_from([8, 64, 256]),
    size_bytes=st.integers(0, 4 * GIB),
)


@settings(deadline=None)
@given(adapters, clusters, st.randoms(use_true_random=False))
def test_the_order_in_which_replicas_are_given_does_not_matter(
    adapter: Adapter | None, cluster: list[ReplicaView], random: Random
) -> None:
    shuffled = random.sample(cluster, len(cluster))
    one, other = rank(adapter, shuffled), rank(adapter, cluster)
    assert (one.replica_ids, one.reason, one.tier) == (other.replica_ids, other.reason, other.tier)
    assert one.expected_ttft_s == pytest.approx(other.expected_ttft_s)


@settings(deadline=None)
@given(adapters, clusters)
def test_a_decision_names_the_best_replicas_once_each(adapter: Adapter | None, cluster: list[ReplicaView]) -> None:
    decision = rank(adapter, cluster)
    assert len(set(decision.replica_ids)) == len(decision.replica_ids) == min(len(cluster), 8)
    assert set(decision.replica_ids) <= {one.replica_id for one in cluster}
    assert 0 < decision.expected_ttft_s < math.inf


@settings(deadline=None)
@given(adapters, clusters, st.data())
def test_more_load_never_makes_a_replica_the_first_choice(
    adapter: Adapter | None, cluster: list[ReplicaView], data: st.DataObject
) -> None:
    before = rank(adapter, cluster).replica_ids[0]
    place = data.draw(st.integers(0, len(cluster) - 1))
    calm, more = cluster[place], data.draw(st.integers(1, 50))
    kinds = ["in_flight"] + (["num_running", "num_waiting", "eviction_cost_s"] if calm.load else [])
    kind = data.draw(st.sampled_from(kinds))
    if kind == "in_flight":
        busy = dataclasses.replace(calm, in_flight=calm.in_flight + more)
    else:
        assert calm.load is not None
        busy = dataclasses.replace(calm, load=dataclasses.replace(calm.load, **{kind: getattr(calm.load, kind) + more}))
    after = rank(adapter, [*cluster[:place], busy, *cluster[place + 1 :]]).replica_ids[0]
    assert after != calm.replica_id or before == calm.replica_id


@settings(deadline=None)
@given(st.sets(st.text("abcdef0123456789", min_size=8, max_size=8), min_size=2, max_size=12), st.data())
def test_losing_another_replica_never_moves_a_cold_adapter(replica_ids: set[str], data: st.DataObject) -> None:
    digest = data.draw(st.text("abcdef0123456789", min_size=64, max_size=64))
    adapter = dataclasses.replace(ADAPTER, digest=digest)
    home = first([view(replica_id) for replica_id in replica_ids], adapter)
    lost = data.draw(st.sampled_from(sorted(replica_ids - {home})))
    assert first([view(replica_id) for replica_id in replica_ids - {lost}], adapter) == home


@pytest.mark.parametrize("num_replicas", [1, 2, 5, 20])
def test_a_new_replica_becomes_the_home_of_its_share_of_adapters_and_moves_no_other(num_replicas: int) -> None:
    old = [view(f"replica-{i}") for i in range(num_replicas)]
    adapters = [dataclasses.replace(ADAPTER, digest=digest_of(number)) for number in range(3000)]
    moves = [(first(old, adapter), first([*old, view("new")], adapter)) for adapter in adapters]
    moved = [after for before, after in moves if before != after]
    assert set(moved) == {"new"}
    assert len(moved) / len(adapters) == pytest.approx(1 / (num_replicas + 1), rel=0.25)


def test_routers_with_slightly_different_counts_mostly_agree() -> None:
    random = Random(7)
    agreed = 0
    for number in range(1000):
        adapter = dataclasses.replace(ADAPTER, digest=digest_of(number))
        reports = [
            (f"r{i}", random.choice([Tier.ABSENT] * 6 + [Tier.HOST, Tier.GPU]), random.randrange(14)) for i in range(8)
        ]
        choices = {
            first([view(name, tier, num_running=num, sent=random.randrange(3)) for name, tier, num in reports], adapter)
            for _ in range(2)
        }
        agreed += len(choices) == 1
    assert agreed >= 900


class SimReplica:
    """Eight places in the batch, each request holds one for its service time; least recently used adapters leave."""

    PLACES, GPU_ADAPTERS, HOST_ADAPTERS = 8, 8, 24

    def __init__(self) -> None:
        self.free_at_s = [0.0] * self.PLACES
        self.ends_s: list[float] = []
        self.used: OrderedDict[str, None] = OrderedDict()

    def tier(self, digest: str) -> Tier:
        if digest not in self.used:
            return Tier.ABSENT
        age = list(reversed(self.used)).index(digest)
        return Tier.GPU if age < self.GPU_ADAPTERS else Tier.HOST

    def serve(self, adapter: Adapter, now_s: float, service_s: float) -> tuple[float, float]:
        """When the request starts, and when it ends. Loading holds a place, too."""
        tiers = {Tier.GPU: 0.0, Tier.HOST: 0.01, Tier.ABSENT: 0.4}
        start_s = max(now_s, heapq.heappop(self.free_at_s)) + tiers[self.tier(adapter.digest)]
        heapq.heappush(self.free_at_s, start_s + service_s)
        heapq.heappush(self.ends_s, start_s + service_s)
        self.used[adapter.digest] = None
        self.used.move_to_end(adapter.digest)
        if len(self.used) > self.HOST_ADAPTERS:
            self.used.popitem(last=False)
        return start_s, start_s + service_s

    def load(self, now_s: float) -> ReplicaLoad:
        while self.ends_s and self.ends_s[0] <= now_s:
            heapq.heappop(self.ends_s)
        running = min(self.PLACES, len(self.ends_s))
        return ReplicaLoad(running, len(self.ends_s) - running, self.PLACES, 1.0, 0.05, 0.01)


class SimRouter:
    """Sees reports every half second, and only its own requests in between."""

    def __init__(self, replicas: dict[str, SimReplica]) -> None:
        self.replicas = replicas
        self.ends_s: dict[str, list[float]] = {name: [] for name in replicas}
        self.reported_at_s = -math.inf
        self.reports: dict[str, tuple[ReplicaLoad, int, dict[str, Tier]]] = {}

    def in_flight(self, name: str, now_s: float) -> int:
        self.ends_s[name] = [end_s for end_s in self.ends_s[name] if end_s > now_s]
        return len(self.ends_s[name])

    def choose(self, adapter: Adapter, now_s: float) -> Decision:
        if now_s - self.reported_at_s > 0.5:
            self.reported_at_s = now_s
            for name, replica in self.replicas.items():
                held = {digest: replica.tier(digest) for digest in replica.used}
                self.reports[name] = replica.load(now_s), self.in_flight(name, now_s), held
        seen = []
        for name, (load, report_in_flight, held) in self.reports.items():
            tier = held.get(adapter.digest, Tier.ABSENT)
            seen.append(ReplicaView(name, tier, self.in_flight(name, now_s), load, report_in_flight))
        return rank(adapter, seen)


def simulate(*, utilisation: float, num_requests: int = 6000) -> tuple[list[tuple[int, str, float]], list[Adapter]]:
    """(adapter's place in popularity, replica, seconds until its start) per request; 100 adapters, Zipf 1.2."""
    random = Random(3)
    replicas = {f"r{i}": SimReplica() for i in range(8)}
    routers = itertools.cycle([SimRouter(replicas) for _ in range(2)])
    catalog = [dataclasses.replace(ADAPTER, digest=digest_of(number)) for number in range(100)]
    weights = [1 / place**1.2 for place in range(1, 101)]
    now_s, served = 0.0, []
    for place in random.choices(range(100), weights, k=num_requests):
        now_s += random.expovariate(utilisation * 8 * SimReplica.PLACES)
        router = next(routers)
        chosen = router.choose(catalog[place], now_s).replica_ids[0]
        start_s, end_s = replicas[chosen].serve(catalog[place], now_s, random.expovariate(1.0))
        router.ends_s[chosen].append(end_s)
        served.append((place, chosen, start_s - now_s))
    return served, catalog


@pytest.fixture(scope="module")
def skewed() -> list[tuple[int, str, float]]:
    served, _ = simulate(utilisation=0.7)
    return served[2000:]


def test_skewed_load_spreads_hot_adapters_and_keeps_cold_ones_on_few_replicas(
    skewed: list[tuple[int, str, float]],
) -> None:
    replicas: defaultdict[int, set[str]] = defaultdict(set)
    requests = Counter(place for place, _, _ in skewed)
    for place, chosen, _ in skewed:
        replicas[place].add(chosen)
    assert len(replicas[0]) >= 2
    rare = [place for place in requests if place >= 20]
    assert sum(len(replicas[place]) for place in rare) / len(rare) <= 3.0
    per_replica = Counter(chosen for _, chosen, _ in skewed)
    assert max(per_replica.values()) <= 2 * min(per_replica.values())


def test_skewed_load_starves_nobody(skewed: list[tuple[int, str, float]]) -> None:
    hot = sorted(wait_s for place, _, wait_s in skewed if place < 5)
    rare = sorted(wait_s for place, _, wait_s in skewed if place >= 20)
    assert rare[len(rare) // 2] <= 0.45 and rare[-1] < 3.0
    assert hot[len(hot) // 2] <= 0.05 and hot[-1] < 3.0
