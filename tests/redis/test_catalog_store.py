"""Catalog writes against a real server."""

import asyncio
import os
import signal
import time

import pytest
import redis

from chameleon_ray.adapters.record import AdapterRecord, Refusal
from chameleon_ray.config import RedisConfig
from chameleon_ray.placement import (
    AdapterUnknownError,
    CatalogConflictError,
    CatalogStore,
    Keys,
    PlacementUnavailableError,
)

pytestmark = pytest.mark.asyncio

LIMIT_S = 30.0


def record(name: str, digest: str = "d0", **fields: object) -> AdapterRecord:
    values = {"origin": "runtime", "uri": f"file:///adapters/{name}", "rank": 8, "size_bytes": 12_345_678_901} | fields
    return AdapterRecord.model_validate({"name": name, "digest": digest, **values})


async def seen(follower, predicate) -> bool:
    return await asyncio.to_thread(follower.wait_for, predicate, LIMIT_S)


def delete_keys(config: RedisConfig) -> None:
    with redis.Redis.from_url(config.url) as raw:
        raw.delete(*raw.scan_iter(f"{config.key_prefix}:*"))


async def test_put_assigns_growing_versions_and_followers_see_it(config, make_store, follow):
    follower, store = follow(config), make_store(config)
    first = await store.put(record("sql", version=999), replace=False)
    second = await store.put(record("chat", "d1"), replace=False)
    assert (first.version, second.version) == (1, 2)
    assert first == record("sql", version=1), "everything but the version is kept as given"
    assert await seen(follower, lambda view: view.catalog_version == 2)
    assert follower.view().catalog == {"sql": first, "chat": second}


async def test_names_keep_any_text(config, make_store):
    name = 'größe/"v2"\\n-模型'
    store = make_store(config)
    written = await store.put(record(name), replace=False)
    assert written.name == name
    assert await store.lookup(name) == written


async def test_warnings_survive_redis_and_so_does_having_none(config, make_store):
    store = make_store(config)
    for warnings in ((), ("it is odd", 'it is "quoted"')):
        written = await store.put(record("sql", warnings=warnings), replace=True)
        assert written.warnings == warnings
        assert await store.lookup("sql") == written
        assert (await store.remove("sql")).warnings == warnings


async def test_a_live_name_is_replaced_only_on_request(config, make_store, follow):
    follower, store = follow(config), make_store(config)
    first = await store.put(record("sql"), replace=False)
    with pytest.raises(CatalogConflictError, match="'sql' exists"):
        await store.put(record("sql", "d1"), replace=False)
    assert await store.lookup("sql") == first
    replaced = await store.put(record("sql", "d1"), replace=True)
    assert (replaced.digest, replaced.version) == ("d1", 2)
    assert await seen(follower, lambda view: view.catalog.get("sql") == replaced)


async def test_removed_names_stay_as_tombstones(config, make_store, follow):
    follower, store = follow(config), make_store(config)
    await store.put(record("sql"), replace=False)
    tombstone = await store.remove("sql")
    assert tombstone == record("sql", version=2, deleted=True)
    assert await store.lookup("sql") is None
    assert await seen(follower, lambda view: view.tombstones == {"sql": tombstone})
    assert follower.view().catalog == {}
    with pytest.raises(AdapterUnknownError, match="'sql'"):
        await store.remove("sql")
    with pytest.raises(AdapterUnknownError, match="'never'"):
        await store.remove("never")
    again = await store.put(record("sql", "d1"), replace=False)
    assert again.version == 3
    assert await seen(follower, lambda view: view.catalog == {"sql": again})
    assert follower.view().tombstones == {}


async def test_configured_adapters_are_added_once_and_follow_their_files(config, make_store):
    stores = make_store(config), make_store(config)
    offered = record("sql", origin="config", fingerprint="node 1")
    first = await stores[0].put_config(offered)
    assert first.version == 1
    assert await stores[1].put_config(offered.model_copy(update={"fingerprint": "node 2"})) == first
    changed = await stores[1].put_config(record("sql", "d1", origin="config"))
    assert (changed.digest, changed.version) == ("d1", 2)
    moved = await stores[0].put_config(record("sql", "d1", origin="config", uri="file:///elsewhere"))
    assert (moved.uri, moved.version) == ("file:///elsewhere", 3)


async def test_configuration_does_not_overrule_run_time(config, make_store):
    store = make_store(config)
    loaded = await store.put(record("sql", "d1"), replace=False)
    assert await store.put_config(record("sql", "d2", origin="config")) == loaded
    unloaded = await store.remove("sql")
    assert await store.put_config(record("sql", "d2", origin="config")) == unloaded
    assert await store.lookup("sql") is None
    await store.put_config(record("chat", origin="config"))
    unloaded = await store.remove("chat")
    assert unloaded.origin == "runtime"
    assert await store.put_config(record("chat", "d9", origin="config")) == unloaded


async def test_what_was_withdrawn_comes_back_and_what_an_operator_loaded_stays(config, make_store):
    store = make_store(config)
    offered = await store.put_config(record("sql", origin="config"))
    await store.withdraw("sql")
    assert await store.lookup("sql") is None
    again = await store.put_config(record("sql", origin="config"))
    assert (again.deleted, again.version) == (False, offered.version + 2)
    loaded = await store.put(record("chat"), replace=False)
    for name in ("chat", "absent"):
        await store.withdraw(name)
    assert await store.lookup("chat") == loaded


def refused(name: str, digest: str = "", *, is_permanent: bool = True, reason: str = "too large") -> AdapterRecord:
    refusal = Refusal(status=413, code="adapter_too_large", reason=reason, is_permanent=is_permanent)
    return record(name, digest, origin="config", deleted=True, refusal=refusal)


async def test_refusals_are_known_by_name_until_they_are_over(config, make_store, follow):
    follower, store = follow(config), make_store(config)
    await store.put_refused(refused("sql"))
    assert await seen(follower, lambda view: "sql" in view.tombstones)
    told = follower.view().tombstones["sql"]
    assert told == refused("sql").model_copy(update={"version": 1}) and not follower.view().catalog
    assert await store.lookup("sql") is None
    await store.put_refused(refused("sql"))
    await store.put_refused(refused("sql", reason="not finite"))
    assert await seen(follower, lambda view: view.catalog_version >= 2)
    assert follower.view().tombstones["sql"].refusal.reason == "not finite", "the same again is not written"
    served = await store.put_config(record("sql", origin="config"))
    assert (served.version, served.refusal, served.deleted) == (3, None, False)
    await store.put_refused(refused("chat"))
    await store.withdraw("chat")
    assert await seen(follower, lambda view: view.catalog_version == 5)
    assert follower.view().tombstones["chat"].refusal is None


async def test_what_is_served_goes_only_when_just_that_is_refused_for_good(config, make_store):
    store = make_store(config)
    served = await store.put_config(record("sql", "d1", origin="config"))
    for other in (refused("sql", "d2"), refused("sql"), refused("sql", "d1", is_permanent=False)):
        await store.put_refused(other)
        assert await store.lookup("sql") == served
    await store.put_refused(refused("sql", "d1"))
    assert await store.lookup("sql") is None
    loaded = await store.put(record("sql", "d1"), replace=False)
    await store.put_refused(refused("sql", "d1"))
    assert await store.lookup("sql") == loaded, "an operator's word"
    unloaded = await store.remove("sql")
    await store.put_refused(refused("sql", "d1"))
    assert await store.put_config(record("sql", "d1", origin="config")) == unloaded


async def test_records_checked_against_other_rules_are_written_anew(config, make_store):
    store = make_store(config)
    first = await store.put_config(record("sql", origin="config", checked="these"))
    assert await store.put_config(record("sql", origin="config", checked="these")) == first
    again = await store.put_config(record("sql", origin="config", checked="those"))
    assert (again.checked, again.version) == ("those", 2)


async def test_misuse_is_refused(config, make_store):
    store = make_store(config)
    with pytest.raises(ValueError, match="use put for 'runtime'"):
        await store.put_config(record("sql"))
    with pytest.raises(ValueError, match=r"remove\(\)"):
        await store.put(record("sql", deleted=True), replace=True)
    with pytest.raises(ValueError, match="with a refusal"):
        await store.put_refused(record("sql", origin="config", deleted=True))
    with pytest.raises(ValueError, match=r"redis\.url"):
        CatalogStore(RedisConfig())


async def test_concurrent_writers_never_share_a_version(config, make_store, follow):
    config = config.model_copy(update={"timeout_s": 60.0})  # A hundred writes at once may take a busy machine long.
    follower, stores = follow(config), [make_store(config), make_store(config)]
    written = await asyncio.gather(
        *(store.put(record("sql", f"w{i}-{n}"), replace=True) for n in range(50) for i, store in enumerate(stores))
    )
    assert sorted(r.version for r in written) == list(range(1, 101))
    newest = max(written, key=lambda r: r.version)
    assert await stores[0].lookup("sql") == newest
    assert await seen(follower, lambda view: view.catalog.get("sql") == newest)


async def test_of_concurrent_loads_of_one_name_exactly_one_wins(config, make_store):
    stores = [make_store(config), make_store(config)]
    outcomes = await asyncio.gather(
        *(store.put(record("sql", f"w{n}"), replace=False) for n in range(10) for store in stores),
        return_exceptions=True,
    )
    winners = [outcome for outcome in outcomes if isinstance(outcome, AdapterRecord)]
    assert len(winners) == 1
    assert {type(outcome) for outcome in outcomes if outcome is not winners[0]} == {CatalogConflictError}
    assert await stores[0].lookup("sql") == winners[0]


async def test_restore_takes_what_is_newer_only(config, make_store, follow):
    follower, store = follow(config), make_store(config)
    await store.restore([record("old", "d1", version=5), record("gone", version=6, deleted=True)])
    assert await store.restore([record("old", "d0", version=4), record("old", "d2", version=5)]) == 0
    many = [record(f"a{n}", version=10 + n) for n in range(600)]
    assert await store.restore([*many, record("old", "d3", version=7)]) == 601
    assert await seen(follower, lambda view: len(view.catalog) == 601 and view.catalog_version == 609)
    assert follower.view().catalog["old"].digest == "d3"
    assert (await store.put(record("new"), replace=False)).version == 610


async def test_a_write_to_an_emptied_store_puts_the_rest_back_first(config, make_store, follow):
    follower = follow(config)
    store = make_store(config, follower)
    for name in ("a", "b", "c"):
        await store.put(record(name), replace=False)
    await store.remove("c")
    assert await seen(follower, lambda view: view.catalog_version == 4)
    delete_keys(config)
    with pytest.raises(CatalogConflictError):
        await store.put(record("b", "d1"), replace=False)
    assert (await store.put(record("b", "d1"), replace=True)).version == 5
    late = follow(config)
    assert {n: (r.digest, r.version) for n, r in late.view().catalog.items()} == {"a": ("d0", 1), "b": ("d1", 5)}
    assert late.view().tombstones["c"].version == 4


async def test_versions_do_not_go_back_without_a_follower_either(config, make_store):
    store = make_store(config)
    for digest in ("d0", "d1", "d2"):
        await store.put(record("sql", digest), replace=True)
    delete_keys(config)
    assert (await store.put(record("sql", "d3"), replace=False)).version == 4


async def test_prefixes_separate_applications(config, make_store, follow):
    other = config.model_copy(update={"key_prefix": config.key_prefix + "-other"})
    mine, theirs = make_store(config), make_store(other)
    my_follower, their_follower = follow(config), follow(other)
    await mine.put(record("sql"), replace=False)
    assert await theirs.lookup("sql") is None
    await theirs.put(record("chat"), replace=False)
    assert await seen(my_follower, lambda view: set(view.catalog) == {"sql"})
    assert await seen(their_follower, lambda view: set(view.catalog) == {"chat"})
    with redis.Redis.from_url(config.url) as raw:
        prefixes = {key.decode().split(":")[0] for key in raw.scan_iter(f"{config.key_prefix}*")}
        listeners = dict(raw.pubsub_numsub(Keys(config.key_prefix).changes, Keys(other.key_prefix).changes))
    assert prefixes == {config.key_prefix, other.key_prefix}
    assert list(listeners.values()) == [1, 1], "each listens to its own channel"


async def test_entries_that_are_not_ours_do_no_harm(config, make_store, follow):
    store = make_store(config)
    good = await store.put(record("good"), replace=False)
    with redis.Redis.from_url(config.url) as raw:
        raw.hset(
            Keys(config.key_prefix).catalog, mapping={b"\xff": b"\x00", "bad": "[1]", "swapped": good.model_dump_json()}
        )
    assert await store.lookup("bad") is None
    assert follow(config).view().catalog == {"good": good}
    repaired = await store.put(record("bad"), replace=False)
    assert await store.lookup("bad") == repaired


async def test_writes_to_a_killed_server_fail_at_once_and_work_again_after(make_server, make_config, make_store, kill):
    server = make_server()
    config = make_config(server)
    store = make_store(config)
    await store.put(record("sql"), replace=False)
    kill(server)
    started_s = time.monotonic()
    for attempt in (
        store.put(record("sql"), replace=True),
        store.put_config(record("sql", origin="config")),
        store.remove("sql"),
        store.restore([record("sql", version=9)]),
        store.lookup("sql"),
    ):
        with pytest.raises(PlacementUnavailableError, match="Redis is not available"):
            await attempt
    assert time.monotonic() - started_s < config.timeout_s, "none has waited for an answer"
    server.start()
    assert (await store.put(record("sql"), replace=False)).version == 2


async def test_writes_to_a_hanging_server_end_within_the_timeout_and_are_not_done_later(
    make_server, make_config, make_store
):
    server = make_server()
    store = make_store(make_config(server).model_copy(update={"timeout_s": 1.0}))
    kept = await store.put(record("sql"), replace=False)
    os.kill(server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(PlacementUnavailableError):
            async with asyncio.timeout(LIMIT_S):
                await store.put(record("sql", "d1"), replace=True)
    finally:
        os.kill(server.pid, signal.SIGCONT)
    written = await store.put(record("chat"), replace=False)
    assert written.name == "chat", "the late answer to the write before must not be taken for this one's"
    assert await store.lookup("chat") == written
    assert await store.lookup("sql") == kept, "what has failed for its caller is not done later"
