"""A link that concurrent transfers share evenly: host to device, disk, remote source."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from chameleon_ray.sim.loop import Event

Done = Callable[[float], Iterable[Event]]

_DUST_BYTES = 1e-3
"""Rounding of floating-point bytes; far below one byte, far above the error of a run."""


@dataclass(slots=True)
class _Transfer:
    remaining_bytes: float
    done: Done


class Link:
    """Processor sharing: each of n transfers gets ``bytes_per_s / n``, ``overhead_s`` after it was asked for."""

    def __init__(self, bytes_per_s: float, overhead_s: float = 0.0) -> None:
        self.bytes_per_s = bytes_per_s
        self.overhead_s = overhead_s
        self.bytes_asked = 0.0
        self.bytes_moved = 0.0
        self.busy_s = 0.0
        self._transfers: list[_Transfer] = []
        self._updated_s = 0.0
        self._version = 0

    @property
    def num_transfers(self) -> int:
        """Transfers under way."""
        return len(self._transfers)

    def transfer(self, num_bytes: float, done: Done, now_s: float) -> Iterable[Event]:
        """Move so many bytes; ``done`` happens when they have arrived."""
        self.bytes_asked += num_bytes
        transfer = _Transfer(float(num_bytes), done)
        if self.overhead_s == 0:
            return self._begin(transfer, now_s)
        return [(now_s + self.overhead_s, lambda then_s: self._begin(transfer, then_s))]

    def check_idle(self) -> None:
        """AssertionError unless every byte that was asked for has arrived, once nothing is under way."""
        assert not self._transfers, "transfers are under way"
        assert abs(self.bytes_asked - self.bytes_moved) <= _DUST_BYTES + 1e-9 * self.bytes_asked, (
            f"{self.bytes_asked} bytes asked for, {self.bytes_moved} moved"
        )
        assert self.bytes_moved <= self.busy_s * self.bytes_per_s * (1 + 1e-9) + _DUST_BYTES, "faster than the link"

    def _begin(self, transfer: _Transfer, now_s: float) -> Iterable[Event]:
        self._advance(now_s)
        self._transfers.append(transfer)
        return self._next()

    def _advance(self, now_s: float) -> None:
        if self._transfers:
            elapsed_s = now_s - self._updated_s
            share = elapsed_s * self.bytes_per_s / len(self._transfers)
            self.busy_s += elapsed_s
            for transfer in self._transfers:
                transfer.remaining_bytes -= share
            self.bytes_moved += share * len(self._transfers)
        self._updated_s = now_s

    def _next(self) -> Iterable[Event]:
        """The event of the first completion; a change before makes it void."""
        self._version += 1
        if not self._transfers:
            return ()
        version = self._version
        least = max(0.0, min(transfer.remaining_bytes for transfer in self._transfers))
        at_s = self._updated_s + least * len(self._transfers) / self.bytes_per_s
        return [(at_s, lambda now_s: self._complete(now_s, version))]

    def _complete(self, now_s: float, version: int) -> Iterable[Event]:
        if version != self._version:
            return ()
        self._advance(now_s)
        least = min(transfer.remaining_bytes for transfer in self._transfers)
        ended = [t for t in self._transfers if t.remaining_bytes <= max(least, _DUST_BYTES)]
        self._transfers = [t for t in self._transfers if t.remaining_bytes > max(least, _DUST_BYTES)]
        events = list(self._next())
        for transfer in ended:
            events += transfer.done(now_s)
        return events
