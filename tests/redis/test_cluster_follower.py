"""Replicas publish, followers follow: against a real server, through all that can happen to it."""

import asyncio
import contextlib
import itertools
import os
import signal
import time

import cloudpickle
import pytest
import redis

from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.config import RedisConfig
from chameleon_ray.placement import ClusterFollower, ClusterView, Keys, ReplicaPublisher, ReplicaReport, shared_follower
from chameleon_ray.placement.messages import Beat, ReplicaChange, Withdrawal
from chameleon_ray.policy.adapter import Tier
from chameleon_ray.routing.replica_load import ReplicaLoad

pytestmark = pytest.mark.asyncio

LIMIT_S = 30.0
"""Shorter than the time to live of ``config``: what is seen within it did not merely expire."""
NUM_FOLLOWERS = 8


def record(name: str, digest: str = "d0", **fields: object) -> AdapterRecord:
    values = {"origin": "runtime", "uri": f"file:///adapters/{name}", "rank": 8, "size_bytes": 1000} | fields
    return AdapterRecord.model_validate({"name": name, "digest": digest, **values})


def report(replica_id: str, tiers: dict[str, Tier] | None = None, num_running: int = 0, **fields) -> ReplicaReport:
    load = ReplicaLoad(num_running=num_running, max_num_seqs=8)
    return ReplicaReport(replica_id, "node-1", load, tiers or {}, **fields)


def short_lived(config: RedisConfig) -> RedisConfig:
    """For tests of what expires; twenty heartbeats long, so that no pause of the machine is taken for a death."""
    return config.model_copy(update={"heartbeat_ttl_s": 2.0})


async def seen(follower: ClusterFollower, predicate, limit_s: float = LIMIT_S) -> bool:
    return await asyncio.to_thread(follower.wait_for, predicate, limit_s)


def held(view: ClusterView) -> dict[str, dict[str, Tier]]:
    """The index as plain dicts, after a check that it says what the replicas say."""
    index = {digest: dict(replicas) for digest, replicas in view.holders.items()}
    expected: dict[str, dict[str, Tier]] = {}
    for replica_id, status in view.replicas.items():
        for digest, tier in status.tiers.items():
            expected.setdefault(digest, {})[replica_id] = tier
    assert index == expected
    return index


@contextlib.asynccontextmanager
async def reporting(publisher: ReplicaPublisher, latest: ReplicaReport, config: RedisConfig):
    """Report again and again, as a replica does; yields nothing, ends by dying (no withdrawal) between two reports."""
    dead = asyncio.Event()

    async def beat() -> None:
        while not dead.is_set():
            await publisher.publish(latest, time.monotonic())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(config.heartbeat_s):
                    await dead.wait()

    task = asyncio.create_task(beat())
    try:
        yield
    finally:
        dead.set()
        await task


def raw_client(config: RedisConfig) -> redis.Redis:
    return redis.Redis.from_url(config.url)


async def test_reports_become_a_view(config, follow, make_publisher):
    follower = follow(config)
    assert follower.view().connected
    assert follower.view().age_s(1e9) == 0
    one, two = make_publisher("r1", config), make_publisher("r2", config)
    assert await one.publish(report("r1", {"a": Tier.GPU, "b": Tier.HOST}, num_running=3), 0.0)
    assert await two.publish(
        report("r2", {"a": Tier.DISK, "z": Tier.ABSENT}, failed={"c": "rank 512 is over the bound"}, catalog_version=7),
        0.0,
    )
    assert await seen(follower, lambda view: len(view.replicas) == 2)
    view = follower.view()
    assert held(view) == {"a": {"r1": Tier.GPU, "r2": Tier.DISK}, "b": {"r1": Tier.HOST}}
    assert view.tier("r2", "a") is Tier.DISK
    assert view.tier("r2", "b") is Tier.ABSENT
    assert view.tier("r9", "nobody has it") is Tier.ABSENT
    assert view.replicas["r1"].load == ReplicaLoad(num_running=3, max_num_seqs=8)
    assert view.replicas["r2"].failed == {"c": "rank 512 is over the bound"}
    assert (view.replicas["r2"].catalog_version, view.replicas["r2"].node_id) == (7, "node-1")
    assert 0 <= time.monotonic() - view.replicas["r2"].received_at_s < LIMIT_S


async def test_changes_of_tiers_arrive_and_old_views_stay_as_they_were(config, follow, make_publisher):
    follower, publisher = follow(config), make_publisher("r1", config)
    await publisher.publish(report("r1", {"a": Tier.GPU, "b": Tier.HOST}), 0.0)
    assert await seen(follower, lambda view: "r1" in view.replicas)
    before = follower.view()
    await publisher.publish(report("r1", {"b": Tier.GPU, "c": Tier.DISK}, num_running=1), 0.1)
    assert await seen(follower, lambda view: view.replicas["r1"].load.num_running == 1)
    assert held(follower.view()) == {"b": {"r1": Tier.GPU}, "c": {"r1": Tier.DISK}}
    assert held(before) == {"a": {"r1": Tier.GPU}, "b": {"r1": Tier.HOST}}
    assert held(follow(config).view()) == held(follower.view()), "the snapshot says the same as the messages"


async def test_a_report_that_changes_only_the_load_keeps_tiers_and_index(config, follow, make_publisher):
    follower, publisher = follow(config), make_publisher("r1", config)
    await publisher.publish(report("r1", {"a": Tier.GPU}), 0.0)
    assert await seen(follower, lambda view: "r1" in view.replicas)
    before = follower.view()
    await publisher.publish(report("r1", {"a": Tier.GPU}, num_running=5), 0.1)
    assert await seen(follower, lambda view: view.replicas["r1"].load.num_running == 5)
    assert follower.view().holders is before.holders
    assert follower.view().catalog is before.catalog
    assert follower.view().replicas["r1"].tiers is before.replicas["r1"].tiers


async def test_a_view_is_the_same_object_until_something_changes(config, follow, make_store, make_publisher):
    follower, store, publisher = follow(config), make_store(config), make_publisher("r1", config)
    await store.put(record("sql"), replace=False)
    await publisher.publish(report("r1", {"a": Tier.GPU}), 0.0)
    assert await seen(follower, lambda view: "r1" in view.replicas and "sql" in view.catalog)
    before = follower.view()
    with raw_client(config) as raw:
        raw.publish(Keys(config.key_prefix).changes, "garbage: even reading all again is no change")
    assert not await seen(follower, lambda view: view is not before, limit_s=1.5)
    await store.put(record("chat"), replace=False)
    assert await seen(follower, lambda view: view is not before)


async def test_no_update_is_lost_between_snapshot_and_messages(config, follow, make_store, make_publisher):
    store, publisher = make_store(config), make_publisher("r1", config)
    followers: list[ClusterFollower] = []
    last: list[ReplicaReport] = []

    async def hammer() -> None:
        """Until all followers have come; at least all names once."""
        for n in itertools.count():
            if n > 40 and len(followers) == NUM_FOLLOWERS:
                return
            await store.put(record(f"a{n % 40}", f"d{n}"), replace=True)
            if n % 7 == 0:
                await store.remove(f"a{n % 40}")
            last[:] = [report("r1", {f"d{m}": Tier(1 + m % 3) for m in range(n, n + 30)}, num_running=n)]
            assert await publisher.publish(last[0], float(n))

    task = asyncio.create_task(hammer())
    for _ in range(NUM_FOLLOWERS):
        followers.append(await asyncio.to_thread(follow, config))
        await asyncio.sleep(0.02)
    await task
    expected = follow(config).view()
    assert len(expected.catalog) + len(expected.tombstones) == 40
    for follower in followers:
        assert await seen(follower, lambda v: v.catalog == expected.catalog and v.tombstones == expected.tombstones)
        assert await seen(follower, lambda v: v.replicas["r1"].load == last[0].load)
        assert held(follower.view()) == {digest: {"r1": tier} for digest, tier in last[0].tiers.items()}


async def test_a_hole_in_a_replicas_messages_is_read_again(config, follow, make_publisher):
    follower, publisher, keys = follow(config), make_publisher("r1", config), Keys(config.key_prefix)
    await publisher.publish(report("r1", {"a": Tier.GPU}), 0.0)
    assert await seen(follower, lambda view: "r1" in view.replicas)
    with raw_client(config) as raw:
        first = Beat.model_validate_json(raw.get(keys.heartbeat("r1")))
        raw.hset(keys.tiers("r1"), "b", int(Tier.HOST))  # what the lost message number 2 said
        third = first.model_copy(update={"seq": first.seq + 2})
        raw.set(keys.heartbeat("r1"), third.model_dump_json(), ex=60)
        raw.publish(keys.changes, ReplicaChange(beat=third, changed={"a": Tier.HOST}).model_dump_json())
        assert await seen(follower, lambda view: view.tier("r1", "b") is Tier.HOST)
        assert held(follower.view()) == {"a": {"r1": Tier.GPU}, "b": {"r1": Tier.HOST}}, "what Redis holds counts"
        raw.publish(keys.changes, ReplicaChange(beat=first, changed={"b": Tier.ABSENT}).model_dump_json())
        fourth = first.model_copy(update={"seq": first.seq + 3})
        raw.publish(keys.changes, ReplicaChange(beat=fourth, changed={"c": Tier.DISK}).model_dump_json())
    assert await seen(follower, lambda view: view.tier("r1", "c") is Tier.DISK)
    assert follower.view().tier("r1", "b") is Tier.HOST, "a message of the past changes nothing"


@pytest.mark.parametrize("damage", ["report gone", "an older report", "tiers gone", "tier lost"])
async def test_a_publisher_that_finds_something_else_in_redis_writes_all_anew(config, follow, make_publisher, damage):
    publisher, keys = make_publisher("r1", config), Keys(config.key_prefix)
    tiers = {"a": Tier.GPU, "b": Tier.HOST}
    await publisher.publish(report("r1", tiers), 0.0)
    with raw_client(config) as raw:
        if damage == "report gone":
            raw.delete(keys.heartbeat("r1"))
        elif damage == "an older report":  # as after a restart of Redis from a backup
            raw.set(keys.heartbeat("r1"), "{}")
            raw.hset(keys.tiers("r1"), "a", int(Tier.DISK))
        elif damage == "tiers gone":
            raw.delete(keys.tiers("r1"))
        else:
            raw.hdel(keys.tiers("r1"), "b")
        await publisher.publish(report("r1", tiers | {"c": Tier.DISK}), 0.1)
        assert raw.hgetall(keys.tiers("r1")) == {b"a": b"3", b"b": b"2", b"c": b"1"}
        tiers_ms, heartbeat_ms = raw.pipeline().pttl(keys.tiers("r1")).pttl(keys.heartbeat("r1")).execute()
        assert 0 < tiers_ms <= heartbeat_ms + 1_000 <= 61_000
    assert held(follow(config).view()) == {"a": {"r1": Tier.GPU}, "b": {"r1": Tier.HOST}, "c": {"r1": Tier.DISK}}


async def test_a_cancelled_publish_ends_and_the_next_one_works(config, make_publisher):
    publisher = make_publisher("r1", config)
    num_cancelled = 0
    for num_steps in range(60):
        task = asyncio.create_task(publisher.publish(report("r1", {f"d{num_steps}": Tier.GPU}), 0.0))
        for _ in range(num_steps % 20):
            await asyncio.sleep(0)
        if not task.done():
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            num_cancelled += 1
    assert num_cancelled > 8, "at least those that have just begun, and those that wait for Redis's first answer"
    assert await publisher.publish(report("r1", {"a": Tier.GPU}), 0.0)
    with raw_client(config) as raw:
        assert raw.hgetall(Keys(config.key_prefix).tiers("r1")) == {b"a": b"3"}


@pytest.mark.parametrize("later_message", [True, False])
async def test_a_hole_in_the_catalogs_messages_is_read_again(config, follow, make_store, later_message):
    follower, store, keys = follow(config), make_store(config), Keys(config.key_prefix)
    await store.put(record("sql"), replace=False)
    assert await seen(follower, lambda view: "sql" in view.catalog)
    with raw_client(config) as raw, raw.pipeline() as unannounced:
        unannounced.hset(keys.catalog, "lost", record("lost", version=2).model_dump_json())
        unannounced.hset(keys.catalog_head, "version", 2)
        unannounced.hincrby(keys.catalog_head, "seq", 1)
        unannounced.execute()
    if later_message:
        await store.put(record("chat"), replace=False)
    assert await seen(follower, lambda view: "lost" in view.catalog)
    assert ("chat" in follower.view().catalog) == later_message


async def test_dead_replicas_leave_and_living_ones_stay(config, follow, make_publisher):
    config = short_lived(config)
    follower = follow(config)
    dying, living = make_publisher("dying", config), make_publisher("living", config)
    async with reporting(living, report("living", {"a": Tier.GPU}), config):
        async with reporting(dying, report("dying", {"a": Tier.HOST, "b": Tier.GPU}), config):
            assert await seen(follower, lambda view: len(view.replicas) == 2)
            assert not await seen(follower, lambda view: len(view.replicas) != 2, limit_s=2.5)
        assert await seen(follower, lambda view: "dying" not in view.replicas)
        assert held(follower.view()) == {"a": {"living": Tier.GPU}}
        with raw_client(config) as raw:
            assert raw.smembers(Keys(config.key_prefix).replicas) == {b"living"}


async def test_a_withdrawn_replica_leaves_at_once_and_for_good(config, follow, make_publisher):
    follower, publisher = follow(config), make_publisher("r1", config)
    await publisher.publish(report("r1", {"a": Tier.GPU}), 0.0)
    assert await seen(follower, lambda view: "r1" in view.replicas)
    assert await publisher.withdraw()
    assert await seen(follower, lambda view: not view.replicas and not view.holders)
    assert not await publisher.publish(report("r1", {"a": Tier.GPU}), 1.0)
    assert await publisher.withdraw()
    with raw_client(config) as raw:
        assert not list(raw.scan_iter(f"{config.key_prefix}:*"))


async def test_a_restarted_replica_of_the_same_id_takes_over(config, follow, make_publisher):
    follower, old, new = follow(config), make_publisher("r1", config), make_publisher("r1", config)
    for n in range(5):
        await old.publish(report("r1", {"a": Tier.GPU}), float(n))
    assert await seen(follower, lambda view: view.tier("r1", "a") is Tier.GPU)
    await new.publish(report("r1", {"b": Tier.GPU}), 0.0)
    assert await seen(follower, lambda view: held(view) == {"b": {"r1": Tier.GPU}})
    stale = Withdrawal(replica_id="r1", run="the old one's, late")
    gone = asyncio.create_task(seen(follower, lambda view: "r1" not in view.replicas, limit_s=0.5))
    await asyncio.sleep(0)
    with raw_client(config) as raw:
        raw.publish(Keys(config.key_prefix).changes, stale.model_dump_json())
    assert not await gone
    await new.publish(report("r1", {"b": Tier.GPU}, num_running=1), 0.1)
    assert await seen(follower, lambda view: view.replicas["r1"].load.num_running == 1)


async def test_forgotten_replicas_stay_away_unless_they_live_on(config, follow, make_publisher):
    config = short_lived(config)
    follower, publisher = follow(config), make_publisher("r1", config)
    async with reporting(publisher, report("r1", {"a": Tier.GPU}), config):
        assert await seen(follower, lambda view: "r1" in view.replicas)
        forgotten_at_s = time.monotonic()
        follower.forget("r1")
        assert not follower.view().replicas
        assert not follower.view().holders
        assert await seen(follower, lambda view: "r1" in view.replicas)
        assert time.monotonic() - forgotten_at_s >= config.heartbeat_ttl_s
    follower.forget("r1")
    follower.forget("never known")
    assert not await seen(follower, lambda view: "r1" in view.replicas, limit_s=config.heartbeat_ttl_s + 1.2)


async def test_reports_about_others_are_refused(config, make_publisher):
    publisher = make_publisher("r1", config)
    with pytest.raises(ValueError, match="got a report of r2"):
        await publisher.publish(report("r2"), 0.0)
    assert await publisher.publish(report("r1"), 0.0)


GARBAGE = [
    b"",
    b"\x00\xff\xfe",
    b"null",
    b"[" * 5000,
    b'{"kind":"unknown"}',
    b'{"kind":"catalog","epoch":"x","seq":"many","records":[]}',
    b'{"kind":"catalog","epoch":"x","seq":1,"records":["{}"]}',
    b'{"kind":"catalog","epoch":"forged","seq":1,"records":[]}',
    b'{"kind":"replica","beat":{"replica_id":"r1"},"changed":{}}',
    b'{"kind":"replica","beat":null,"changed":{"a":9}}',
    b'{"kind":"withdrawn","replica_id":"r1"}',
    b'{"kind":"withdrawn","replica_id":"r1","run":"forged"}',
]


async def test_garbage_on_the_channel_harms_nothing(config, follow, make_store, make_publisher, caplog):
    follower, store, publisher = follow(config), make_store(config), make_publisher("r1", config)
    await store.put(record("sql"), replace=False)
    await publisher.publish(report("r1", {"a": Tier.GPU}), 0.0)
    assert await seen(follower, lambda view: "r1" in view.replicas and "sql" in view.catalog)
    before = follower.view()
    broken = asyncio.create_task(seen(follower, lambda view: not view.connected, limit_s=1.0))
    await asyncio.sleep(0)
    with raw_client(config) as raw:
        for data in GARBAGE:
            raw.publish(Keys(config.key_prefix).changes, data)
    await store.put(record("chat"), replace=False)
    await publisher.publish(report("r1", {"a": Tier.GPU, "b": Tier.GPU}), 0.1)
    assert await seen(follower, lambda view: "chat" in view.catalog and view.tier("r1", "b") is Tier.GPU)
    assert follower.view().catalog["sql"] == before.catalog["sql"]
    assert held(follower.view()) == {"a": {"r1": Tier.GPU}, "b": {"r1": Tier.GPU}}
    assert not await broken
    assert "message on the change channel" in caplog.text


async def test_a_report_in_redis_that_is_garbage_hides_that_replica_only(config, follow, make_publisher):
    publisher, keys = make_publisher("good", config), Keys(config.key_prefix)
    with raw_client(config) as raw:
        raw.sadd(keys.replicas, "bad", b"\xff\xfe")
        raw.set(keys.heartbeat("bad"), "{}", ex=60)
        async with reporting(publisher, report("good", {"a": Tier.GPU}), config):
            follower = follow(config)
            assert await seen(follower, lambda view: set(view.replicas) == {"good"})
            assert not await seen(follower, lambda view: set(view.replicas) != {"good"} or not view.connected, 1.2)


async def test_redis_killed_and_back_empty(make_server, make_config, follow, make_store, make_publisher, kill):
    server = make_server()
    config = short_lived(make_config(server))
    followers = [follow(config), follow(config)]
    store = make_store(config, followers[0])
    for n in range(30):
        await store.put(record(f"a{n}", f"d{n}"), replace=False)
    tombstone = await store.remove("a7")
    replicas = {name: make_publisher(name, config) for name in ("r1", "r2")}
    tiers = {"r1": {"d1": Tier.GPU, "d2": Tier.HOST}, "r2": {"d1": Tier.HOST, "d3": Tier.DISK}}
    async with contextlib.AsyncExitStack() as running:
        for name, publisher in replicas.items():
            await running.enter_async_context(reporting(publisher, report(name, tiers[name]), config))
        for follower in followers:
            assert await seen(follower, lambda view: len(view.replicas) == 2 and view.catalog_version == 31)
        before = followers[0].view()

        kill(server)
        for follower in followers:
            assert await seen(follower, lambda view: not view.connected)
        # Longer than any TTL: all stays as last known, and says how old it is.
        assert not await seen(followers[0], lambda view: len(view.replicas) != 2, limit_s=2.5)
        assert followers[0].view().catalog == before.catalog
        assert held(followers[0].view()) == held(before)
        assert followers[0].view().age_s(time.monotonic()) > 2

        server.start()
        # What Redis itself holds has to be whole, not only what was in memory anyway: ask a newcomer.
        newcomer = follow(config)
        assert await seen(newcomer, lambda view: len(view.catalog) == 29 and len(view.replicas) == 2)
        assert newcomer.view().catalog == before.catalog
        assert newcomer.view().tombstones == {"a7": tombstone}
        assert held(newcomer.view()) == held(before)
        for follower in followers:
            assert await seen(follower, lambda view: view.connected)
        assert held(followers[0].view()) == held(before)
        assert (await store.put(record("a7"), replace=False)).version == 32
        for follower in followers:
            assert await seen(follower, lambda view: "a7" in view.catalog and not view.tombstones)


async def test_a_replica_that_died_while_redis_was_away_leaves(make_server, make_config, follow, make_publisher, kill):
    server = make_server()
    config = short_lived(make_config(server))
    follower, publisher = follow(config), make_publisher("r1", config)
    await publisher.publish(report("r1", {"a": Tier.GPU}), 0.0)
    assert await seen(follower, lambda view: "r1" in view.replicas)
    kill(server)
    assert await seen(follower, lambda view: not view.connected)
    server.start()
    assert await seen(follower, lambda view: view.connected)
    assert "r1" in follower.view().replicas, "it may still come back"
    assert await seen(follower, lambda view: not view.replicas and not view.holders)


async def test_redis_emptied_under_open_connections(config, follow, make_store, make_publisher):
    follower, store, publisher = follow(config), make_store(config), make_publisher("r1", config)
    await store.put(record("sql"), replace=False)
    async with reporting(publisher, report("r1", {"a": Tier.GPU}), config):
        assert await seen(follower, lambda view: "r1" in view.replicas and "sql" in view.catalog)
        with raw_client(config) as raw:
            raw.delete(*raw.scan_iter(f"{config.key_prefix}:*"))
            deadline_s = time.monotonic() + LIMIT_S
            keys = Keys(config.key_prefix)
            while not (raw.hexists(keys.catalog, "sql") and raw.hgetall(keys.tiers("r1")) == {b"a": b"3"}):
                assert time.monotonic() < deadline_s
                await asyncio.sleep(0.05)
        assert follower.view().catalog["sql"].version == 1
        assert held(follow(config).view()) == {"a": {"r1": Tier.GPU}}


async def test_redis_back_with_an_older_catalog(config, follow, make_store):
    follower, store, keys = follow(config), make_store(config), Keys(config.key_prefix)
    await store.put(record("sql"), replace=False)
    await store.put(record("chat"), replace=False)
    with raw_client(config) as raw:
        backup = {key: raw.dump(key) for key in (keys.catalog, keys.catalog_head)}
        newest = await store.put(record("sql", "d1"), replace=True)
        gone = await store.remove("chat")
        assert await seen(follower, lambda view: view.catalog_version == 4)
        for key, data in backup.items():
            raw.restore(key, 0, data, replace=True)
    newcomer = follow(config)
    assert await seen(newcomer, lambda view: view.catalog_version == 4)
    assert (newcomer.view().catalog, newcomer.view().tombstones) == ({"sql": newest}, {"chat": gone})
    assert (await store.put(record("new"), replace=False)).version == 5


async def test_a_hanging_server_is_noticed(make_server, make_config, follow, make_publisher):
    server = make_server()
    config = make_config(server).model_copy(update={"timeout_s": 1.0})
    follower, publisher = follow(config), make_publisher("r1", config)
    os.kill(server.pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(LIMIT_S):
            assert not await publisher.publish(report("r1"), 0.0)
        assert await seen(follower, lambda view: not view.connected)
    finally:
        os.kill(server.pid, signal.SIGCONT)
    async with reporting(publisher, report("r1", {"a": Tier.GPU}), config):
        assert await seen(follower, lambda view: view.connected and view.tier("r1", "a") is Tier.GPU)


async def test_a_follower_may_start_before_redis(make_server, make_config, follow, kill):
    server = make_server()
    config = make_config(server)
    kill(server)
    follower = follow(config, wait=False)
    assert not await asyncio.to_thread(follower.wait_ready, 0.3)
    assert follower.view() == ClusterView()
    assert follower.view().age_s(5.0) == float("inf")
    server.start()
    assert await asyncio.to_thread(follower.wait_ready, LIMIT_S)
    assert follower.view().connected


async def test_publishing_pauses_longer_and_longer_without_redis(make_server, make_config, make_publisher, kill):
    server = make_server()
    publisher = make_publisher("r1", make_config(server))
    kill(server)
    assert not await publisher.publish(report("r1"), 0.0)
    server.start()
    assert not await publisher.publish(report("r1"), 0.05), "within the pause"
    assert await publisher.publish(report("r1"), 0.11)


async def test_one_follower_per_process_and_application(config):
    other = config.model_copy(update={"key_prefix": config.key_prefix + "-other"})
    follower = shared_follower(config)
    try:
        assert shared_follower(config.model_copy()) is follower

        def find() -> ClusterFollower:  # Serve pickles routers by value: code is copied, this module is not
            return shared_follower(config)

        copied = cloudpickle.loads(cloudpickle.dumps(find))
        assert copied is not find
        assert copied() is follower
        another = shared_follower(other)
        assert another is not follower
        another.close()
    finally:
        follower.close()
    assert not follower.view().connected
    renewed = shared_follower(config)
    assert renewed is not follower
    assert renewed.wait_ready(LIMIT_S)
    renewed.close()
