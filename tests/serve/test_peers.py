"""Adapters taken from another node's store, over a Ray cluster of two nodes."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from chameleon_ray.adapters.catalog import AdapterLibrary
from chameleon_ray.adapters.errors import AdapterNotFoundError
from chameleon_ray.adapters.modules import ModuleTable
from chameleon_ray.adapters.store import content_digest
from chameleon_ray.config import AdaptersConfig, ModelConfig
from chameleon_ray.placement import ClusterView
from chameleon_ray.placement.view import ReplicaStatus
from chameleon_ray.policy.adapter import Tier
from chameleon_ray.routing.replica_load import ReplicaLoad
from deployments.peers import NAMESPACE, NodePeers

ALONE = ClusterView()


@pytest.fixture(scope="module")
def node_ids() -> Iterator[list[str]]:
    """Two Ray nodes on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray._private.ray_constants, "ENABLE_RAY_CLUSTER", True)
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else a token is written into the home folder
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        cluster = Cluster()
        try:
            for _ in range(2):
                cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20, include_dashboard=False)
            ray.init(address=cluster.address, log_to_driver=False)
            yield [node["NodeID"] for node in ray.nodes()]
        finally:
            ray.shutdown()
            cluster.shutdown()


class Replica:
    """What a replica has of this: its node's store, and its peers as placement shows them."""

    def __init__(self, replica_id: str, node_id: str, root: Path, sources: Path, table: Future[ModuleTable]) -> None:
        self.view = ALONE
        self.folder = root / replica_id
        config = AdaptersConfig(store_dir=str(self.folder), allowed_roots=[str(sources)], peer_fetch=True)
        self.peers = NodePeers(replica_id, node_id, config, lambda: self.view)
        self.library = AdapterLibrary(config, ModelConfig(source="base"), table, self.peers)


def view_of(held: dict[str, tuple[str, str]]) -> ClusterView:
    """Placement: replica id -> (its node, the adapter digest that it holds)."""
    load = ReplicaLoad(0, 0, 1, service_s=0.05, ttft_s=0.02)
    replicas = {
        replica_id: ReplicaStatus(replica_id, node_id, load, {digest: Tier.DISK}, {}, 0, 0.0)
        for replica_id, (node_id, digest) in held.items()
    }
    holders: dict[str, dict[str, Tier]] = {}
    for replica_id, (_, digest) in held.items():
        holders.setdefault(digest, {})[replica_id] = Tier.DISK
    return ClusterView(replicas=replicas, holders=holders, connected=True)


def test_a_node_takes_from_another_what_the_source_no_longer_has(
    node_ids: list[str],
    tmp_path: Path,
    write_adapter: Callable[..., Path],
    tiny_table: ModuleTable,
    as_future: Callable[[ModuleTable], Future[ModuleTable]],
) -> None:
    here, there = node_ids
    table, sources = as_future(tiny_table), tmp_path / "sources"
    source = write_adapter(sources / "a")
    holder = Replica("holder", there, tmp_path, sources, table)
    record = holder.library.inspect("a", str(source))
    source.rename(tmp_path / "away")

    asking = Replica("asking", here, tmp_path, sources, table)
    asking.view = view_of({"holder": (here, record.digest)})
    with pytest.raises(AdapterNotFoundError):
        asking.library.ensure(record)  # of a replica on the same node nothing can be had that is not here
    asking.view = view_of({"absent": ("elsewhere", record.digest), "holder": (there, record.digest)})
    assert asking.library.ensure(record) == asking.folder / record.digest
    assert content_digest(asking.folder / record.digest) == record.digest

    files = ray.get_actor("holder", NAMESPACE)
    assert ray.get(files.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())) == there
    ray.kill(files)
    late = Replica("late", here, tmp_path, sources, table)
    late.view = view_of({"holder": (there, record.digest)})
    with pytest.raises(AdapterNotFoundError, match="no such folder"):
        late.library.ensure(record)
    (tmp_path / "away").rename(source)
    assert content_digest(late.library.ensure(record)) == record.digest, "a node that is gone costs nothing but time"
