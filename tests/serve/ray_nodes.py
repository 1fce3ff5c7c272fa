"""An application on Ray nodes that share this machine, each with an HTTP proxy of its own."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
from live.service import ANSWER_LIMIT_S, LAST_CHARACTERS, command_of
from paced_engines import NODE_VARIABLE
from ray._private.node import Node
from ray.cluster_utils import Cluster

from chameleon_ray.redis_server import BundledRedis, free_port

REPO = Path(__file__).parents[2]
HEAD, WORKER = "head", "worker"
OBJECT_STORE_BYTES = 80 * 2**20
CPUS = 3
"""Of a node: for one replica and one ingress."""


class Front:
    """One node's HTTP proxy."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=ANSWER_LIMIT_S)

    def placement(self) -> list[dict[str, Any]]:
        """The replicas as ``/v1/chameleon/placement`` lists them; none while nobody answers there."""
        try:
            answer = self.http.get("/v1/chameleon/placement")
            return list(answer.json()["replicas"]) if answer.status_code == 200 else []
        except httpx.HTTPError:
            return []

    def health(self) -> dict[str, Any]:
        """``/health``; empty while nobody answers there."""
        try:
            return dict(self.http.get("/health").json())
        except (httpx.HTTPError, ValueError):
            return {}


class RayNodes:
    """A head, whose state is in a Redis of its own, and workers. This process never connects to them."""

    def __init__(self, gcs_redis: BundledRedis) -> None:
        self._gcs_redis = gcs_redis
        self._cluster = Cluster()
        self._nodes: dict[str, Node] = {}
        self._gcs_port, self._dashboard_port = free_port(), free_port()
        self.port = free_port()
        self.worker_port = int(os.environ["RAY_SERVE_WORKER_PROXY_HTTP_PORT"])

    def start(self, name: str) -> None:
        """Start the head or a worker."""
        options: dict[str, Any] = {"include_dashboard": False}
        if name == HEAD:
            options = {
                "include_dashboard": True,
                "dashboard_host": "127.0.0.1",
                "dashboard_port": self._dashboard_port,
                "gcs_server_port": self._gcs_port,
            }
        self._nodes[name] = self._cluster.add_node(
            num_cpus=CPUS, object_store_memory=OBJECT_STORE_BYTES, env_vars={NODE_VARIABLE: name}, **options
        )

    def node_id(self, name: str) -> str:
        """As placement names it."""
        return str(self._nodes[name].node_id)

    def processes(self, name: str, title: str = "") -> list[psutil.Process]:
        """A node's processes whose command lines have ``title`` in them."""
        roots = [info.process.pid for infos in self._nodes[name].all_processes.values() for info in infos]
        found: list[psutil.Process] = []
        for pid in roots:
            with suppress(psutil.NoSuchProcess):
                root = psutil.Process(pid)
                found += [root, *root.children(recursive=True)]
        return [one for one in found if title in command_of(one)]

    def kill(self, name: str) -> None:
        """All of a node's processes, at once and without warning."""
        for process in self.processes(name):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self._cluster.remove_node(self._nodes.pop(name), allow_graceful=False)

    def deploy(self, config: dict[str, Any]) -> None:
        """What ``serve deploy`` does: hand the configuration to Serve's REST API, which returns at once."""
        answer = httpx.put(f"{self._serve_url}", json=config, timeout=ANSWER_LIMIT_S)
        assert answer.status_code == 200, answer.text

    def application(self) -> dict[str, Any]:
        """Serve's word on the application; empty while there is none."""
        try:
            return dict(httpx.get(self._serve_url, timeout=ANSWER_LIMIT_S).json()["applications"]["chameleon"])
        except (httpx.HTTPError, KeyError, ValueError):
            return {}

    def is_running(self) -> bool:
        """Whether Serve has brought about what was deployed last."""
        return self.application().get("status") == "RUNNING"

    def stop(self) -> None:
        """End every node."""
        for name in (WORKER, HEAD):
            if name in self._nodes:
                self.kill(name)

    def logs(self) -> str:
        """The end of each of Serve's logs, for failures."""
        folder = Path(self._cluster.head_node.get_session_dir_path(), "logs/serve")
        return "\n".join(f"--- {file}\n{file.read_text()[-LAST_CHARACTERS:]}" for file in sorted(folder.glob("*.log")))

    @property
    def _serve_url(self) -> str:
        return f"http://127.0.0.1:{self._dashboard_port}/api/serve/applications/"


@contextmanager
def running_nodes(folder: Path) -> Iterator[RayNodes]:
    """A head and a worker. folder: for the logs of Ray's Redis."""
    with pytest.MonkeyPatch.context() as patch, BundledRedis(directory=folder / "gcs") as gcs_redis:
        patch.setattr(ray._private.ray_constants, "ENABLE_RAY_CLUSTER", True)
        for name, value in {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
            "RAY_AUTH_MODE": "disabled",  # else a token is written into the home folder
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "600",  # A worker's patience without a head.
            "RAY_REDIS_ADDRESS": f"127.0.0.1:{gcs_redis.port}",
            "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(free_port()),
            "PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "tests/serve")]),
        }.items():
            patch.setenv(name, value)
        nodes = RayNodes(gcs_redis)
        try:
            nodes.start(HEAD)
            nodes.start(WORKER)
            yield nodes
        finally:
            nodes.stop()
