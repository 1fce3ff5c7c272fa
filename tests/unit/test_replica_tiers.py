"""Where a replica says that it holds an adapter: GPU and host memory by its engine, disk by its node's store."""

from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.policy.adapter import Tier
from deployments.tiers import CatalogDigests, merge_tiers


def catalog(*digests: str) -> dict[str, AdapterRecord]:
    return {f"name-{d}": AdapterRecord(name=f"name-{d}", digest=d, uri="/", rank=1, size_bytes=1) for d in digests}


def test_the_store_says_disk_for_what_the_catalog_names() -> None:
    assert merge_tiers({}, frozenset({"a", "b", "other's"}), frozenset("abc")) == {"a": Tier.DISK, "b": Tier.DISK}


def test_the_engine_says_gpu_and_host_and_nothing_else() -> None:
    engine = {"a": Tier.GPU, "b": Tier.HOST, "c": Tier.DISK, "d": Tier.ABSENT, "gone": Tier.GPU}
    merged = merge_tiers(engine, frozenset({"a", "d"}), frozenset("abcd"))
    assert merged == {"a": Tier.GPU, "b": Tier.HOST, "d": Tier.DISK, "gone": Tier.GPU}


def test_evicted_and_unloaded_adapters_leave() -> None:
    digests, names = CatalogDigests(), catalog("a", "b")
    assert merge_tiers({}, frozenset({"b"}), digests.of(names)).keys() == {"b"}
    assert digests.of(names) is digests.of(names)
    assert merge_tiers({}, frozenset({"a", "b"}), digests.of(catalog("a"))).keys() == {"a"}
