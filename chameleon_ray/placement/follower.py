"""A process's copy of catalog and placement, kept current by its own thread."""

import time
from collections.abc import Callable

from chameleon_ray.config import RedisConfig
from chameleon_ray.placement.view import ClusterView


class ClusterFollower:
    """Follows catalog and placement in Redis on a daemon thread that starts at once. All methods are thread-safe."""

    def __init__(self, config: RedisConfig, clock: Callable[[], float] = time.monotonic) -> None:
        """config: ``url`` must be set (ValueError). clock: seconds, for ``received_at_s`` and ages."""
        raise NotImplementedError

    def view(self) -> ClusterView:
        """What is known now: no lock, no copy, the same object until something changes."""
        raise NotImplementedError

    def wait_ready(self, timeout_s: float) -> bool:
        """Block until the first whole snapshot is in (True) or the time is up. Not for an event loop's thread."""
        raise NotImplementedError

    def wait_for(self, predicate: Callable[[ClusterView], bool], timeout_s: float) -> bool:
        """Block until ``predicate(view)`` holds (True) or the time is up; it is asked after every change.

        In asyncio code: ``await asyncio.to_thread(follower.wait_for, ...)``.
        """
        raise NotImplementedError

    def forget(self, replica_id: str) -> None:
        """Take a replica out of the view at once (Serve says it died); it comes back only if it still reports after
        ``heartbeat_ttl_s``."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop following; the thread is gone when this returns. The last view stays readable."""
        raise NotImplementedError


def shared_follower(config: RedisConfig) -> ClusterFollower:
    """This process's follower of (``url``, ``key_prefix``), made at the first call and again after a ``close``.

    Code that Serve pickles by value (the router class) must get its follower here: a module-level object is shared by
    all code in the process, a pickled class's attribute is not.
    """
    raise NotImplementedError
