"""The application as a user runs it: ``chameleon serve`` in its own process, and what can be seen of it outside."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import yaml
from object_store import S3
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from chameleon_ray.demo import DemoPaths
from chameleon_ray.redis_server import BundledRedis, free_port

REPO = Path(__file__).parents[3]
START_LIMIT_S = 400.0
STOP_LIMIT_S = 90.0
WHOLE_LIMIT_S = 240.0
"""A killed engine's successor is ready after about 25 s on two idle cores."""
ANSWER_LIMIT_S = 120.0
FRESH_S = 3.0
"""Replicas report twice a second."""
LAST_CHARACTERS = 6000
METRICS_PERIOD_MS = 2000
"""How often Ray's processes hand over their metrics; by default every 10 s."""
OVERSIZED = "oversized"
"""A configured adapter that no engine here can hold."""

Value = TypeVar("Value")


def wait_for(probe: Callable[[], Value], what: str, limit_s: float = 30.0, pause_s: float = 0.1) -> Value:
    """The first true value of ``probe``; fails, saying ``what`` was missing, after ``limit_s``."""
    deadline_s = time.monotonic() + limit_s
    while not (value := probe()):
        assert time.monotonic() < deadline_s, f"not within {limit_s:g} s: {what}; last: {value!r}"
        time.sleep(pause_s)
    return value


def test_config(demo: DemoPaths, redis_url: str, folder: Path, port: int) -> dict[str, Any]:
    """``cluster_configs/local.yaml`` with two replicas of the random model, and the test's own port, Redis, folders."""
    config: dict[str, Any] = yaml.safe_load((REPO / "cluster_configs/local.yaml").read_text())
    config["http_options"]["port"] = port
    arguments = config["applications"][0]["args"]
    arguments["model"] = {"source": str(demo.model), "name": "chameleon-demo"}
    arguments["engine"] |= {"kv_cache_gib": 0.25, "cpu_threads": 1}
    arguments["replicas"]["num_replicas"] = 2
    arguments["adapters"] |= {
        "folder": str(demo.adapters),
        "allowed_roots": [str(demo.adapters), str(folder / "uploads")],
        "store_dir": str(folder / "store"),
    }
    arguments["relay"] = {"max_silence_s": 8.0}
    arguments["redis"] = {"url": redis_url, "key_prefix": f"test-{os.getpid()}-{port}"}
    return config


test_config.__test__ = False  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Metrics:
    """Every sample of one look at a Prometheus endpoint."""

    found: Sequence[Sample]

    def samples(self, name: str) -> list[tuple[Mapping[str, str], float]]:
        """(labels, value) of every sample of that name."""
        return [(one.labels, one.value) for one in self.found if one.name == name]

    def total(self, name: str, **labels: str) -> float:
        """Sum of the samples of that name that carry these labels."""
        return sum(value for having, value in self.samples(name) if labels.items() <= having.items())


class Service:
    """A running application; ``start`` and ``stop`` are the fixture's, the rest is for tests."""

    def __init__(
        self, demo: DemoPaths, redis: BundledRedis, folder: Path, edit: Callable[[Any], None] = lambda _: None
    ):
        """folder: for configuration, logs and adapters. edit: changes the configuration in place before the start."""
        self.demo = demo
        self.redis = redis
        self.uploads = folder / "uploads"
        self.store = folder / "store"
        self.uploads.mkdir(parents=True)
        self.s3: S3 | None = None
        self._port = free_port()
        self._config_path = folder / "local.yaml"
        self._log_path = folder / "chameleon-serve.log"
        self._config = test_config(demo, redis.url, folder, self._port)
        edit(self._config)
        arguments = self._config["applications"][0]["args"]
        self.base: str = arguments["model"]["name"]
        self.adapters_config: dict[str, Any] = arguments["adapters"]
        self.max_model_len: int = arguments["engine"]["max_model_len"]
        self.num_replicas: int = arguments["replicas"]["num_replicas"]
        self.key_prefix: str = arguments["redis"]["key_prefix"]
        self.url = f"http://127.0.0.1:{self._port}"
        self.http = httpx.Client(base_url=self.url, timeout=ANSWER_LIMIT_S)
        self._seen: set[psutil.Process] = set()

    def start(self) -> None:
        """Start the command; returns when it says that it is ready."""
        self._config_path.write_text(yaml.safe_dump(self._config))
        command = [str(Path(sys.executable).parent / "chameleon"), "serve", str(self._config_path)]
        with self._log_path.open("wb") as log:
            # what the engine tests set for engines in their own process is not for this one
            environment = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "OMP_"))}
            environment["RAY_metrics_report_interval_ms"] = str(METRICS_PERIOD_MS)
            self._process = subprocess.Popen(
                command,
                env=environment,
                cwd=REPO,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            wait_for(self._is_ready, "the application says that it is ready", START_LIMIT_S, 0.5)
        except BaseException:
            print(f"--- {' '.join(command)}\n{self._log_path.read_text()[-LAST_CHARACTERS:]}\n{self.serve_logs()}")
            raise
        self.metrics_url = re.findall(r"metrics: (http://\S+)", self._log_path.read_text())[0]
        self.wait_whole()

    def stop(self) -> None:
        """Ctrl-C; everything that was started must end by itself."""
        self.http.close()
        self._note_processes()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            status = self._process.wait(STOP_LIMIT_S)
            psutil.wait_procs(list(self._seen), timeout=5.0)
            names = [command_of(process) for process in self._left()]
        finally:
            for process in self._left():
                _kill(process)
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
        assert status == 0, f"`chameleon serve` ended with {status}:\n{self._log_path.read_text()[-LAST_CHARACTERS:]}"
        assert not names, f"still running after Ctrl-C: {names}"
        assert "stopped" in self._log_path.read_text()

    def placement(self) -> list[dict[str, Any]]:
        """The replicas as ``/v1/chameleon/placement`` lists them."""
        answer = self.http.get("/v1/chameleon/placement")
        assert answer.status_code == 200, answer.text
        return list(answer.json()["replicas"])

    def num_running(self) -> int:
        """Requests that the engines run or hold in their queues."""
        return sum(one["load"]["num_running"] + one["load"]["num_waiting"] for one in self.placement())

    def adapter_names(self) -> list[str]:
        """The names that ``/v1/models`` lists beside the base model."""
        cards = self.http.get("/v1/models").json()["data"]
        return [card["id"] for card in cards if card["parent"] is not None]

    def is_whole(self) -> bool:
        """Whether all replicas serve and report, and Redis is followed."""
        try:
            health = self.http.get("/health").json()
            ages_s = [one["age_s"] for one in self.placement()]
        except (httpx.HTTPError, ValueError, AssertionError):
            return False
        wanted = {"status": "ok", "redis": "connected", "replicas": self.num_replicas}
        return health == wanted and max(ages_s) < FRESH_S and len(self.replica_processes()) == self.num_replicas

    def wait_whole(self, limit_s: float = WHOLE_LIMIT_S) -> None:
        """Until the service has everything that it was started with."""
        wait_for(self.is_whole, "all replicas serve and report", limit_s, 0.25)
        self._note_processes()

    def replica_processes(self) -> list[psutil.Process]:
        """The engine replicas' actor processes."""
        return [process for process in self._descendants() if "ServeReplica:chameleon:Replica" in command_of(process)]

    def engine_processes(self, replica: psutil.Process) -> list[psutil.Process]:
        """The engine processes of a replica: EngineCore first, then its workers."""
        cores = _spawned(replica)
        return cores + [worker for core in cores for worker in _spawned(core)]

    def metrics(self) -> "Metrics":
        """What Ray's Prometheus endpoint says now."""
        text = httpx.get(self.metrics_url, timeout=ANSWER_LIMIT_S).text
        return Metrics([one for family in text_string_to_metric_families(text) for one in family.samples])

    def metric(self, name: str, **labels: str) -> float:
        """See Metrics.total."""
        return self.metrics().total(name, **labels)

    def samples(self, name: str) -> list[tuple[Mapping[str, str], float]]:
        """See Metrics.samples."""
        return self.metrics().samples(name)

    def load(self, name: str, path: str | Path, **more: Any) -> httpx.Response:
        """POST /v1/load_lora_adapter."""
        return self.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)} | more)

    def unload(self, name: str) -> httpx.Response:
        """POST /v1/unload_lora_adapter."""
        return self.http.post("/v1/unload_lora_adapter", json={"lora_name": name})

    def serve_logs(self) -> str:
        """The end of each of Serve's logs, for failures."""
        names = " ".join(command_of(process) for process in self._descendants())
        logs = sorted(Path(session, "logs/serve") for session in set(re.findall(r"/tmp/ray/session_[\w-]+", names)))
        files = [file for folder in logs for file in sorted(folder.glob("*.log"))]
        return "\n".join(f"--- {file}\n{file.read_text(errors='replace')[-LAST_CHARACTERS:]}" for file in files)

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, f"`chameleon serve` ended with {self._process.returncode}"
        return "ready after" in self._log_path.read_text()

    def _descendants(self) -> list[psutil.Process]:
        return psutil.Process(self._process.pid).children(recursive=True)

    def _left(self) -> list[psutil.Process]:
        """What still runs of all processes ever seen below the command, or in a session that one of them opened."""
        sessions = {self._process.pid, *(process.pid for process in self._seen)}
        return [
            process
            for process in psutil.process_iter()
            if process in self._seen or (_session(process) in sessions and process.pid != self._process.pid)
        ]

    def _note_processes(self) -> None:
        if self._process.poll() is None:
            self._seen |= set(self._descendants())


def assert_gone(processes: list[psutil.Process], limit_s: float = 20.0) -> None:
    """Fails unless all of them end within ``limit_s``; one that only its parent has not waited for yet has ended."""

    def have_ended() -> bool:
        return not any(_runs(process) for process in processes)

    wait_for(have_ended, f"the end of {[command_of(process) for process in processes]}", limit_s)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return None


def _spawned(parent: psutil.Process) -> list[psutil.Process]:
    """Processes that vLLM has started. It gives them titles, but they keep their command line where that is not to be
    found from their environment, as after a change of its first variable."""
    try:
        children = parent.children()
    except psutil.NoSuchProcess:
        return []
    return [child for child in children if any(part in command_of(child) for part in ("VLLM::", "spawn_main"))]


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return
