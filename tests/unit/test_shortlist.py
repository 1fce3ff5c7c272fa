"""The shortlist of large clusters: it decides as the whole cluster would, and stays short and true through changes."""

import random
from collections import defaultdict

import pytest

from chameleon_ray.policy.adapter import Adapter, Tier
from chameleon_ray.policy.routing import LoadCosts, ReplicaLoad, ReplicaView, rank_replicas, rendezvous_weight
from chameleon_ray.policy.shortlist import EXACT_UP_TO, NUM_LISTED, ReplicaTable

COSTS = LoadCosts(1e10, 2e9, 2e8, 0.0, 0.2)


def adapter_of(number: int) -> Adapter:
    return Adapter(f"{number:064x}", rank=16, size_bytes=32_000_000)


def random_view(name: str, rng: random.Random) -> ReplicaView:
    waiting = rng.randrange(20) if rng.random() < 0.3 else 0
    running = rng.randrange(60)
    load = ReplicaLoad(running, waiting, 64, 5.0, 0.1)
    return ReplicaView(name, Tier.DISK, running + waiting + rng.randrange(3), load, running + waiting)


def whole(table_views: dict[str, ReplicaView], holders: dict[str, Tier]) -> list[ReplicaView]:
    return [
        ReplicaView(name, holders.get(name, view.tier), view.in_flight, view.load, view.report_in_flight)
        for name, view in table_views.items()
    ]


@pytest.mark.parametrize("num_replicas", [80, 300, 1000])
def test_the_first_choice_is_that_of_the_whole_cluster(num_replicas: int) -> None:
    rng = random.Random(num_replicas)
    table, views = ReplicaTable(), {}
    for index in range(num_replicas):
        views[f"r{index}"] = random_view(f"r{index}", rng)
        table.put(views[f"r{index}"])
    same = 0
    for number in range(200):
        holders = {
            f"r{rng.randrange(num_replicas)}": rng.choice((Tier.GPU, Tier.HOST)) for _ in range(rng.randrange(4))
        }
        adapter = adapter_of(number)
        listed = rank_replicas(adapter, table.candidates(adapter, holders), COSTS)
        exact = rank_replicas(adapter, whole(views, holders), COSTS)
        same += listed.replica_ids[0] == exact.replica_ids[0]
    assert same >= 190


def test_a_base_request_finds_the_least_busy_replica() -> None:
    rng = random.Random(1)
    table, views = ReplicaTable(), {}
    for index in range(200):
        views[f"r{index}"] = random_view(f"r{index}", rng)
        table.put(views[f"r{index}"])
    listed = rank_replicas(None, table.candidates(None, {}), COSTS, "request")
    assert listed.expected_ttft_s == pytest.approx(
        rank_replicas(None, list(views.values()), COSTS, "request").expected_ttft_s, rel=0.05
    )


def test_small_clusters_are_ranked_whole_with_the_tiers_that_hints_tell() -> None:
    table = ReplicaTable()
    for index in range(EXACT_UP_TO):
        table.put(ReplicaView(f"r{index}", Tier.ABSENT, 0))
    views = table.candidates(adapter_of(0), {"r3": Tier.GPU, "gone": Tier.GPU})
    assert {view.replica_id for view in views} == {f"r{index}" for index in range(EXACT_UP_TO)}
    assert [view.replica_id for view in views if view.tier is Tier.GPU] == ["r3"]


def test_an_adapter_held_everywhere_keeps_the_list_short_and_its_least_busy_holders_on_it() -> None:
    table = ReplicaTable()
    names = [f"r{index}" for index in range(500)]
    for index, name in enumerate(names):
        table.put(ReplicaView(name, Tier.ABSENT, index))
    holders = {name: Tier.GPU if index >= 300 else Tier.HOST for index, name in enumerate(names)}
    listed = {view.replica_id for view in table.candidates(adapter_of(1), holders)}
    assert len(listed) <= 4 * NUM_LISTED
    assert {"r300", "r315", "r0", "r15"} <= listed


def test_joins_deaths_and_changes_leave_the_same_as_a_new_table() -> None:
    rng = random.Random(4)
    table, alive = ReplicaTable("salt"), {}
    choices: defaultdict[bool, int] = defaultdict(int)
    for step in range(3000):
        action = rng.random()
        if action < 0.1 or not alive:
            name = f"r{rng.randrange(150)}"
            choices[name in alive] += 1
            alive[name] = random_view(name, rng)
            table.put(alive[name])
        elif action < 0.18:
            name = rng.choice(list(alive))
            del alive[name]
            table.remove(name)
            table.remove(name)
        elif action < 0.6:
            name = rng.choice(list(alive))
            alive[name] = random_view(name, rng)
            table.put(alive[name])
        elif action < 0.9:
            adapter = adapter_of(rng.randrange(20))
            listed = {view.replica_id for view in table.candidates(adapter, {})}
            assert listed <= alive.keys()
            assert table.home(adapter.digest) == max(alive, key=lambda name: rendezvous_weight(adapter.digest, name))
        if step % 100 == 0:
            assert len(table) == len(alive)
            table.check()
    assert choices[False] > 100
