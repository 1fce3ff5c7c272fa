"""Adapters from other nodes' stores, over Ray."""

from collections.abc import Callable, Iterator
from pathlib import Path

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from chameleon_ray.adapters.errors import AdapterSourceError
from chameleon_ray.adapters.store import AdapterStore, packed
from chameleon_ray.config import AdaptersConfig
from chameleon_ray.placement import ClusterView

NAMESPACE = "chameleon-files"
CHUNKS_AHEAD = 4
"""So many chunks of one adapter lie in Ray's object store at once, at most."""


class StoredFiles:
    """Gives the adapters of its node's store to others: an actor beside each replica, which ends with it. Ray starts it
    again when it dies alone."""

    def __init__(self, config: AdaptersConfig) -> None:
        self._store = AdapterStore(Path(config.store_dir), config.store_max_bytes)

    def read(self, digest: str) -> Iterator[bytes]:
        """``packed`` content. AdapterNotFoundError when it is not here."""
        with self._store.use(digest) as folder:
            yield from packed(folder)


class NodePeers:
    """One replica's part in giving adapters and asking for them: see ``chameleon_ray.adapters.peers.Peers``."""

    def __init__(self, replica_id: str, node_id: str, config: AdaptersConfig, view: Callable[[], ClusterView]) -> None:
        self._node_id = node_id
        self._timeout_s = config.source_timeout_s
        self._view = view
        self._files = (
            ray.remote(StoredFiles)
            .options(
                name=replica_id,
                namespace=NAMESPACE,
                num_cpus=0,
                max_restarts=-1,
                max_concurrency=config.fetch_concurrency,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            )
            .remote(config)
        )

    def __call__(self, digest: str) -> Iterator[tuple[str, Iterator[bytes]]]:
        """The nodes whose replicas report the adapter, in the order of placement."""
        view = self._view()
        asked = {self._node_id}
        for replica_id in view.holders.get(digest, {}):
            status = view.replicas.get(replica_id)
            if status is not None and status.node_id not in asked:
                asked.add(status.node_id)
                yield f"replica {replica_id}", self._read(replica_id, digest)

    def _read(self, replica_id: str, digest: str) -> Iterator[bytes]:
        try:
            files = ray.get_actor(replica_id, NAMESPACE)
            options = {"num_returns": "streaming", "_generator_backpressure_num_objects": CHUNKS_AHEAD}
            chunks: ray.ObjectRefGenerator = files.read.options(**options).remote(digest)
            while True:
                ready, _ = ray.wait([chunks], timeout=self._timeout_s)
                if not ready:
                    raise AdapterSourceError(f"no word for {self._timeout_s:g} s")
                try:
                    chunk = next(chunks)
                except StopIteration:
                    return
                yield ray.get(chunk, timeout=self._timeout_s)
        except (ValueError, RayError, GetTimeoutError) as error:  # no such actor; it died, or raised
            raise AdapterSourceError(str(error).strip().rpartition("\n")[2]) from error
