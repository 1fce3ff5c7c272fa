"""``chameleon serve``: a local Ray head and the application in one foreground command that leaves nothing behind.

Everything runs on loopback. Ctrl-C (or SIGTERM) lets running requests drain and then stops every process that was
started, including those that Ray detaches: this process adopts orphans, so that it can find them.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import psutil
import yaml

from chameleon_ray.config import ApiConfig
from chameleon_ray.redis_server import free_port

HEAD_START_LIMIT_S = 180.0
START_LIMIT_S = 600.0
STOP_LIMIT_S = 60.0
LAST_LINES = 40
CONFIGS = Path(__file__).parents[1] / "cluster_configs"
"""The configurations that come with the package, in a checkout and in an installed wheel alike."""
DASHBOARD_PORT = 8265
METRICS_PORT = 8090
STATUS_PERIOD_S = 2.0
"""How often Serve is asked whether the application can still start."""
OBJECT_STORE_BYTES = 100_000_000
"""Ray's shared memory; requests and answers are far too small to go through it."""
PR_SET_CHILD_SUBREAPER = 36
FIRST_CHOICE = "pirate"
"""Of the demo's adapters, the one to try first."""

SETTINGS = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",  # HAProxy in front of the ingress instead of a Python proxy
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",  # gRPC between actors, no extra threads
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",  # else Serve's logs stay empty until the 1,000th line or an error
    "RAY_SERVE_QUEUE_LENGTH_CACHE_TIMEOUT_S": "3600",  # no probes of replicas that had no request for 10 s: we count
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",  # no load balancer in front that would have to notice
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # one node: Ray's own ports on loopback where it has a choice
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",  # the dashboard asks for the key in ~/.ray/auth_token
}
"""Environment of everything started here; what the caller has set already is kept."""


class LaunchError(RuntimeError):
    """The application could not be started; the message says what to do."""


class Launcher:
    """Starts, watches and stops a local cluster with the application of one Serve configuration file."""

    def __init__(self, config_path: Path, say: Callable[[str], None]):
        self._config_path = config_path
        self._say = say
        self._stopping = False
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._logs = Path(tempfile.mkdtemp(prefix="cham-"))
        serve_config = _read_config(config_path)
        options = serve_config.get("http_options") or {}
        self._host, self._port = options.get("host", "127.0.0.1"), int(options.get("port", 8000))
        applications = serve_config.get("applications") or [{}]
        arguments = applications[0].get("args") or {}
        self._replicas = int((arguments.get("replicas") or {}).get("num_replicas", 1))
        self._model = str((arguments.get("model") or {}).get("name") or "")
        self._api = arguments.get("api") or {}

    @property
    def url(self) -> str:
        """Where clients go."""
        host = "127.0.0.1" if self._host in ("0.0.0.0", "::") else self._host
        return f"http://{host}:{self._port}"

    def run(self) -> int:
        """Serve until interrupted; the exit status. Raises LaunchError when the application does not start."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop_soon)
        try:
            began_s = time.monotonic()
            if self.start():
                self._greet(time.monotonic() - began_s)
                self._watch()
            return 0
        finally:
            self.stop()

    def start(self) -> bool:
        """Start and wait until every replica serves; False when interrupted meanwhile. Raises LaunchError.

        Whatever the outcome, call ``stop`` afterwards.
        """
        _adopt_orphans()
        began_s = time.monotonic()
        return self._start() and self._wait_ready(began_s)

    def _stop_soon(self, _number: int, _frame: FrameType | None) -> None:
        self._stopping = True

    def _start(self) -> bool:
        if _in_use(self._host, self._port):
            raise LaunchError(
                f"{self.url} is in use; stop what listens there or change http_options.port in {self._config_path}"
            )
        self._environment = SETTINGS | self._haproxy_settings() | dict(os.environ)
        self._ensure_token()
        self._dashboard_port, self._metrics_port = _free_or(DASHBOARD_PORT), _free_or(METRICS_PORT)
        gcs_port = free_port()
        ports = {
            "port": gcs_port,
            "dashboard-port": self._dashboard_port,
            "metrics-export-port": self._metrics_port,
            "ray-client-server-port": free_port(),
            "dashboard-agent-listen-port": free_port(),
        }
        self._say(f"starting Ray and the application; logs: {self._logs}")
        self._spawn(
            "ray",
            "start",
            "--head",
            "--block",
            "--node-ip-address=127.0.0.1",
            "--dashboard-host=127.0.0.1",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            *(f"--{name}={port}" for name, port in ports.items()),
        )
        if not self._until(lambda: _in_use("127.0.0.1", gcs_port), HEAD_START_LIMIT_S, "Ray's head"):
            return False
        self._spawn("serve", "run", f"--address=127.0.0.1:{gcs_port}", str(self._config_path))
        return True

    def _haproxy_settings(self) -> dict[str, str]:
        """Files and ports of its own, so that several applications on a machine do not meet."""
        prefix = "RAY_SERVE_HAPROXY_"
        names = {
            "CONFIG_FILE_LOC": "haproxy.cfg",
            "SOCKET_PATH": "a.sock",  # short: Serve adds 80 characters, and a socket's path may have 107
            "SERVER_STATE_BASE": "",
            "SERVER_STATE_FILE": "server-state",
            "METRICS_SOCKET_PATH": "m.sock",
        }
        files = {prefix + key: str(self._logs / name) for key, name in names.items()}
        fallback = {"RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port())}
        return files | fallback | {prefix + "METRICS_PORT": str(free_port()), prefix + "STATS_PORT": str(free_port())}

    def _ensure_token(self) -> None:
        """Ray's token mode needs a token; without one, have Ray make it where it looks for it (~/.ray/auth_token)."""
        given = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & self._environment.keys()
        if self._environment["RAY_AUTH_MODE"] != "token" or given or (Path.home() / ".ray/auth_token").is_file():
            return
        command = [str(Path(sys.executable).parent / "ray"), "get-auth-token", "--generate"]
        made = subprocess.run(command, env=self._environment, capture_output=True, text=True)
        if made.returncode != 0:
            raise LaunchError(f"Ray could not make an authentication token:\n{made.stderr}")

    def _spawn(self, *command: str) -> None:
        """Start a command of this environment in a session of its own, so that Ctrl-C reaches only this process."""
        program = Path(sys.executable).parent / command[0]
        with (self._logs / f"{command[0]}.log").open("wb") as log:
            self._children[command[0]] = subprocess.Popen(
                [str(program), *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )

    def _wait_ready(self, began_s: float) -> bool:
        """Until every replica reports; False when interrupted meanwhile."""
        said, asked_s = "", time.monotonic()
        with httpx.Client(timeout=2.0) as client:

            def ready() -> bool:
                nonlocal said, asked_s
                stage = _stage(client, self.url, self._replicas)
                if stage and stage != said:
                    self._say(f"{time.monotonic() - began_s:4.0f} s  {stage}")
                    said = stage
                if stage and time.monotonic() > asked_s + STATUS_PERIOD_S:
                    self._check_serve(client)
                    asked_s = time.monotonic()
                return not stage

            return self._until(ready, START_LIMIT_S, "the application")

    def _until(self, condition: Callable[[], bool], limit_s: float, what: str) -> bool:
        deadline_s = time.monotonic() + limit_s
        while not condition():
            if self._stopping:
                return False
            self._check_children()
            if time.monotonic() > deadline_s:
                last = list(self._children)[-1]
                raise LaunchError(f"{what} was not ready within {limit_s:.0f} s.\n{self._last_words(last)}")
            time.sleep(0.25)
        return True

    def _check_children(self) -> None:
        for name, child in self._children.items():
            if child.poll() is not None:
                raise LaunchError(f"`{name}` ended by itself.\n{self._last_words(name)}")

    def _check_serve(self, client: httpx.Client) -> None:
        """LaunchError when Serve has given up starting the application: `serve run` itself goes on waiting."""
        url = f"http://127.0.0.1:{self._dashboard_port}/api/serve/applications/"
        try:
            answer = client.get(url, headers=self._dashboard_headers()).raise_for_status().json()
        except (httpx.HTTPError, ValueError, OSError):
            return  # no dashboard yet, or no token for it; what is wrong with Ray itself shows elsewhere
        for name, application in (answer.get("applications") or {}).items():
            if application["status"] == "DEPLOY_FAILED":
                messages = [one["message"] for one in application["deployments"].values() if one["message"]]
                reasons = "\n".join(reason_of(message) for message in messages or [application["message"]])
                raise LaunchError(f"the application `{name}` cannot start.\n{reasons}\n{self._where('serve')}")

    def _dashboard_headers(self) -> dict[str, str]:
        """What Ray's dashboard wants to see in token mode."""
        if self._environment["RAY_AUTH_MODE"] != "token":
            return {}
        file = Path(self._environment.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray/auth_token")
        token = self._environment.get("RAY_AUTH_TOKEN") or file.read_text().strip()
        return {"Authorization": f"Bearer {token}"}

    def _where(self, name: str) -> str:
        return f"Whole logs: {self._logs / name}.log and /tmp/ray/session_latest/logs/serve"

    def _last_words(self, name: str) -> str:
        lines = (self._logs / f"{name}.log").read_text(errors="replace").splitlines()[-LAST_LINES:]
        return "\n".join([*lines, self._where(name)])

    def _greet(self, seconds: float) -> None:
        api = ApiConfig.model_validate(self._api).resolved()
        keys, is_open = api.api_keys, api.admin_open_on_loopback or api.admin_key is not None
        headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
        key = ' -H "Authorization: Bearer $KEY"' if keys else ""
        models = [card["id"] for card in httpx.get(f"{self.url}/v1/models", headers=headers).json()["data"]]
        model = FIRST_CHOICE if FIRST_CHOICE in models else models[-1]
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        body = json.dumps({"model": model, "messages": messages, "max_tokens": 48, "temperature": 0})
        self._say(
            f"ready after {seconds:.0f} s: {models[0]} and {len(models) - 1} adapters at {self.url}/v1\n\n"
            f"  curl {self.url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'\n"
            f"  curl {self.url}/v1/models{key}\n"
            f"  chameleon queues --url {self.url}{' --api-key $KEY' if keys else ''}\n\n"
            f"{f'live page: {self.url}/chameleon/' if is_open else 'live page: closed, see api.admin_key'}\n"
            f"Ray dashboard: http://127.0.0.1:{self._dashboard_port} (its key: ~/.ray/auth_token)\n"
            f"metrics: http://127.0.0.1:{self._metrics_port}/metrics\n"
            "Ctrl-C stops everything."
        )

    def _watch(self) -> None:
        while not self._stopping:
            self._check_children()
            self._reap_orphans()
            time.sleep(0.25)

    def _reap_orphans(self) -> None:
        """Adopted processes that have ended (those of a replica that died) would stay zombies."""
        ours = {child.pid for child in self._children.values()}
        for process in psutil.Process().children():
            if process.pid not in ours:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)

    def stop(self) -> None:
        """Stop every process that was started."""
        if self._children:
            self._say("stopping")
        everyone = psutil.Process().children(recursive=True)
        for name, child in reversed(self._children.items()):
            if child.poll() is None:
                child.send_signal(signal.SIGINT if name == "serve" else signal.SIGTERM)
                try:
                    child.wait(STOP_LIMIT_S)
                except subprocess.TimeoutExpired:
                    child.kill()
        everyone += [process for process in psutil.Process().children(recursive=True) if process not in everyone]
        for process in everyone:
            _quietly(process.terminate)
        _, alive = psutil.wait_procs(everyone, timeout=5.0)
        for process in alive:
            _quietly(process.kill)
        psutil.wait_procs(alive, timeout=5.0)
        if self._children:
            self._say("stopped")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise LaunchError(f"{path} cannot be read as a Serve configuration: {error}") from None
    if not isinstance(loaded, dict) or "applications" not in loaded:
        raise LaunchError(f"{path} is not a Serve configuration: it has no `applications`")
    return loaded


def reason_of(message: str) -> str:
    """The error at the end of Serve's message, without the traceback before it; all of it where there is none."""
    lines = message.strip().splitlines()
    errors = [number for number, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return "\n".join(lines[errors[-1] :] if errors else lines[-LAST_LINES:])


def _stage(client: httpx.Client, url: str, replicas: int) -> str:
    """What is still missing, in words; empty when all replicas serve."""
    try:
        health = client.get(f"{url}/health")
        here = int(health.json()["replicas"]) if "json" in health.headers.get("content-type", "") else -1
    except (httpx.HTTPError, ValueError, KeyError):
        return "waiting for Ray Serve"
    if here < 0:
        return "waiting for the ingress"
    if here < replicas:
        return f"loading engines ({here} of {replicas} ready)"
    return ""


def _in_use(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1" if host == "0.0.0.0" else host, port)) == 0


def _free_or(port: int) -> int:
    """The usual port, or another one when it is taken."""
    return free_port() if _in_use("127.0.0.1", port) else port


def _adopt_orphans() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _quietly(action: Callable[[], None]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        action()
