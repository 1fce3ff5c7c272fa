"""The bundled Redis server: a real redis-server on loopback, for laptops and tests."""

from pathlib import Path
from types import TracebackType


class BundledRedisError(RuntimeError):
    """The bundled server could not be started; the message has its last words."""


def free_port() -> int:
    """A TCP port on loopback that nobody listens on right now."""
    raise NotImplementedError


class BundledRedis:
    """One redis-server on 127.0.0.1 without persistence. It dies with this process, however that ends."""

    def __init__(self, port: int | None = None, directory: Path | None = None) -> None:
        """port: None takes a free one. directory: for its log; default: a temporary one, removed by ``stop``."""
        raise NotImplementedError

    @property
    def url(self) -> str:
        """redis://127.0.0.1:port/0"""
        raise NotImplementedError

    @property
    def pid(self) -> int | None:
        """Process id while started."""
        raise NotImplementedError

    def start(self) -> "BundledRedis":
        """Start (again, empty, after a ``stop`` or a crash) and return when it answers. BundledRedisError."""
        raise NotImplementedError

    def is_alive(self) -> bool:
        """Whether the server process runs."""
        raise NotImplementedError

    def stop(self) -> None:
        """End the server; its process is gone when this returns. Safe to call twice."""
        raise NotImplementedError

    def __enter__(self) -> "BundledRedis":
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
