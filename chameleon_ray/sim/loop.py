"""The event loop: events are times with something to do, and what they do returns more events."""

import heapq
from collections.abc import Callable, Iterable
from itertools import count

Happening = Callable[[float], "Iterable[Event]"]
Event = tuple[float, Happening]
"""When (seconds) and what. The happening gets that time and returns events that follow, none before it."""


def run(events: Iterable[Event], until_s: float = float("inf")) -> tuple[float, int]:
    """Let events happen in order of time, those of equal time in order of creation, up to ``until_s``.

    Returns the time of the last one and how many there were. AssertionError if time would go back.
    """
    numbers = count()
    pop, push = heapq.heappop, heapq.heappush
    queue = [(time_s, next(numbers), happen) for time_s, happen in events]
    heapq.heapify(queue)
    now_s, num_events = 0.0, 0
    while queue and queue[0][0] <= until_s:
        time_s, _, happen = pop(queue)
        assert time_s >= now_s, f"time goes back from {now_s} to {time_s}"
        now_s, num_events = time_s, num_events + 1
        for next_s, following in happen(now_s):
            push(queue, (next_s, next(numbers), following))
    return now_s, num_events
