"""The highest load that holds the objective, by doubling or halving until it is bracketed and then by bisection."""

import enum
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from math import sqrt

SLOWEST = 1 / 32
"""The search gives up at this share of where it began."""
LATE_RETRIES = 2


class Verdict(enum.Enum):
    """What a measurement at one load has shown."""

    HELD = "held"
    FAILED = "failed"
    CLIENT_LATE = "client late"


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """start_per_s, max_per_s: first and highest load tried. precision: relative width of the bracket in the end."""

    start_per_s: float
    max_per_s: float
    precision: float

    def __post_init__(self) -> None:
        if not 0 < self.start_per_s <= self.max_per_s:
            raise ValueError(
                f"search from {self.start_per_s} to {self.max_per_s} requests/s: give 0 < start <= highest"
            )
        if self.precision <= 0:
            raise ValueError(f"precision is {self.precision}; give a share above 0, such as 0.05")


class RateSearch:
    """One target's search. The answer is a load that was seen to hold, never an interpolated one.

    held_per_s, failed_per_s: highest load seen to hold, lowest seen not to; None while there is none.
    is_client_limited: the bracket's upper end is where the client, not the target, fell behind.
    """

    def __init__(self, options: SearchOptions):
        self._options = options
        self._late = 0
        self.held_per_s: float | None = None
        self.failed_per_s: float | None = None
        self.is_client_limited = False

    def next_rate(self) -> float | None:
        """The load to measure next, requests per second; None when the search is over."""
        held, failed, options = self.held_per_s, self.failed_per_s, self._options
        if held is None and failed is None:
            return options.start_per_s
        if failed is None:
            return min(held * 2, options.max_per_s) if held and held < options.max_per_s else None
        if held is None:
            return failed / 2 if failed / 2 >= options.start_per_s * SLOWEST else None
        return sqrt(held * failed) if failed / held > 1 + options.precision else None

    def report(self, rate_per_s: float, verdict: Verdict) -> None:
        """The verdict at the load that ``next_rate`` gave. A late client proves nothing: measure again, then refuse."""
        if verdict is Verdict.CLIENT_LATE and self._late < LATE_RETRIES:
            self._late += 1
            return
        self._late = 0
        if verdict is Verdict.HELD:
            self.held_per_s = rate_per_s
        else:
            self.failed_per_s, self.is_client_limited = rate_per_s, verdict is Verdict.CLIENT_LATE


async def find_highest(
    searches: dict[str, RateSearch], probe: Callable[[Mapping[str, float]], Awaitable[Mapping[str, Verdict]]]
) -> dict[str, RateSearch]:
    """Carry searches through side by side: ``probe`` measures each at its own load, alternating between them."""
    while rates := {name: rate for name, search in searches.items() if (rate := search.next_rate()) is not None}:
        for name, verdict in (await probe(rates)).items():
            searches[name].report(rates[name], verdict)
    return searches
