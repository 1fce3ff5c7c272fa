"""Names that no request has used yet: one fetch for all who ask, bounded waiting, and what failed is remembered."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.config import AppConfig, RedisConfig
from chameleon_ray.openai_errors import ApiError
from chameleon_ray.placement import CatalogStore, ClusterFollower
from deployments.models import Models
from deployments.on_demand import OnDemand

pytestmark = pytest.mark.asyncio

LIMIT_S = 30.0


class Replicas:
    """What ``resolve_adapter`` of a replica says. outcome: by name; a name without one is of no adapter."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, str | None]] = []
        self.outcome: dict[str, AdapterRecord | ApiError] = {}
        self.open = asyncio.Event()
        self.open.set()

    def options(self, method_name: str) -> Any:
        assert method_name == "resolve_adapter"
        return self

    async def remote(self, name: str, uri: str, credentials: str | None) -> AdapterRecord | ApiError:
        self.calls.append((name, uri, credentials))
        await self.open.wait()
        return self.outcome.get(name, ApiError(404, f"no {uri}", "adapter_not_found", param="lora_path"))


def adapter(name: str, digest: str = "d0") -> AdapterRecord:
    return AdapterRecord(name=name, digest=digest, uri=f"s3://b/{name}", rank=8, size_bytes=1)


@pytest.fixture
def make(
    config: RedisConfig, make_store: Callable[..., CatalogStore], follow: Callable[..., ClusterFollower]
) -> Callable[..., tuple[OnDemand, Replicas, CatalogStore]]:
    def make(**options: Any) -> tuple[OnDemand, Replicas, CatalogStore]:
        adapters = {
            "credentials": {"acme": {"type": "s3", "anonymous": True}},
            "resolve": [
                {"pattern": "acme/*", "uri": "s3://b/acme/{name}/v1", "credentials": "acme"},
                {"pattern": "*-lora", "uri": "hf://org/{name}"},
            ],
        } | options
        app = AppConfig.model_validate({"model": {"source": "base"}, "adapters": adapters})
        replicas, store = Replicas(), make_store(config)
        return OnDemand(app, follow(config), store, replicas), replicas, store  # type: ignore[arg-type]

    return make


async def test_all_who_ask_share_one_fetch_which_gets_into_the_catalog(make: Any) -> None:
    on_demand, replicas, store = make()
    replicas.outcome["acme/sql"] = adapter("acme/sql")
    replicas.open.clear()
    asking = [asyncio.create_task(on_demand.find("acme/sql")) for _ in range(16)]
    await asyncio.sleep(0)
    asking.pop().cancel()
    replicas.open.set()
    found = await asyncio.gather(*asking)
    assert {one.digest for one in found} == {"d0"} and all(one.version == 1 for one in found)
    assert replicas.calls == [("acme/sql", "s3://b/acme/sql/v1", "acme")]
    assert await store.lookup("acme/sql") == found[0]


async def test_names_without_a_rule_and_odd_names_ask_nobody(make: Any) -> None:
    on_demand, replicas, _ = make()
    for name in ("sql", "acme/", "acme", "other/acme/sql", "-lora", "acme/%2e", "acme/x y", "", "acme/" + "x" * 200):
        assert await on_demand.find(name) is None
    assert not replicas.calls
    await on_demand.find("x-lora")
    assert replicas.calls == [("x-lora", "hf://org/x", None)]


async def test_absent_names_are_remembered_for_a_while(make: Any) -> None:
    on_demand, replicas, _ = make()
    for _ in range(3):
        assert await on_demand.find("acme/absent") is None
    assert len(replicas.calls) == 1
    on_demand, replicas, _ = make(absent_s=1e-9)
    assert await on_demand.find("acme/later") is None
    replicas.outcome["acme/later"] = adapter("acme/later")
    assert (await on_demand.find("acme/later")).digest == "d0"


@pytest.mark.parametrize(("status", "kind"), [(502, "adapter_source_unavailable"), (400, "adapter_invalid")])
async def test_failures_say_when_to_come_back(make: Any, status: int, kind: str) -> None:
    on_demand, replicas, _ = make(retry_after_s=60.0)
    replicas.outcome["acme/sql"] = ApiError(status, "why", kind)
    for _ in range(2):
        with pytest.raises(ApiError, match="why") as caught:
            await on_demand.find("acme/sql")
        assert caught.value.status == status
    assert len(replicas.calls) == 1
    assert (caught.value.retry_after_s is not None) == (status == 502)


async def test_waiting_is_bounded_and_the_fetch_goes_on(make: Any, follow: Any, config: RedisConfig) -> None:
    on_demand, replicas, _ = make(resolve_wait_s=0.01)
    replicas.outcome["acme/big"] = adapter("acme/big")
    replicas.open.clear()
    with pytest.raises(ApiError, match="being fetched") as caught:
        await on_demand.find("acme/big")
    assert (caught.value.status, caught.value.kind) == (503, "adapter_fetching")
    assert caught.value.retry_after_s is not None
    replicas.open.set()
    assert await asyncio.to_thread(follow(config).wait_for, lambda view: "acme/big" in view.catalog, LIMIT_S)
    assert len(replicas.calls) == 1


async def test_an_operators_word_holds(make: Any) -> None:
    on_demand, replicas, store = make()
    loaded = await store.put(adapter("acme/sql", "mine").model_copy(update={"origin": "runtime"}), replace=False)
    replicas.outcome["acme/sql"] = adapter("acme/sql")
    assert await on_demand.find("acme/sql") == loaded
    await store.remove("acme/sql")
    assert await on_demand.find("acme/sql") is None


async def test_many_names_at_once_are_bounded(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.on_demand.MAX_FETCHES", 4)
    monkeypatch.setattr("deployments.on_demand.MAX_REMEMBERED", 2)
    on_demand, replicas, _ = make()
    replicas.open.clear()
    asking = [asyncio.create_task(on_demand.find(f"acme/{number}")) for number in range(6)]
    done, _ = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
    assert [task.exception().status for task in asking if task in done] == [503, 503]
    replicas.open.set()
    assert await asyncio.gather(*asking[:4]) == [None] * 4
    for name in ("acme/0", "acme/3"):  # only the last two are remembered
        await on_demand.find(name)
    assert len(replicas.calls) == 5


async def test_the_list_of_models_comes_in_pages(make: Any, config: RedisConfig, follow: Any) -> None:
    on_demand, _, store = make()
    for name in ("b", "a", "d", "c"):
        await store.put(adapter(name), replace=False)
    follower = follow(config)
    assert await asyncio.to_thread(follower.wait_for, lambda view: len(view.catalog) == 4, LIMIT_S)
    app = AppConfig.model_validate({"model": {"source": "base"}})
    models = Models(app, follower, store, on_demand.find)

    def page(**query: str) -> tuple[list[str], bool]:
        found = models.page(query)
        return [card["id"] for card in found["data"]], found["has_more"]

    assert page() == (["base", "a", "b", "c", "d"], False)
    assert page(limit="2") == (["base", "a", "b"], True)
    assert page(limit="2", after="b") == (["c", "d"], False)
    for limit in ("0", "-1", "x", "10001", "1" * 5000, "²"):
        with pytest.raises(ApiError, match="limit"):
            page(limit=limit)
