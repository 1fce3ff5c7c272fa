"""In which order ``chameleon`` takes requests of all queues: by arrival, with a bounded boost for small work.

``boosted arrival = arrival - gain of the class * min(age, MAX_AGE_SLOS * SLO)``

Small requests are thus treated as if they had come a little earlier, and the more so the longer they have waited
(accumulating priority; Kleinrock 1964, Stanford, Taylor and Ziedins 2014), up to a bound that does not grow with the
backlog: in overload the order is nearly that of arrival, and nobody is ever overtaken by anybody who came later than
``GAINS[0] * MAX_AGE_SLOS`` SLOs after it. The frontier from which the numbers are chosen is in docs/scheduler.md.

Within a class the order is that of arrival at all times, so the earliest head is the earliest of all who wait. Between
classes a smaller request may come to precede an older, larger one as both age; from then on it always does, because
its lead only grows: both age alike, and the larger gain counts no fewer seconds.
"""

GAINS = (1.0, 0.5, 0.0)
"""Of the classes, smallest first: thirds of recent requests by WRS."""
MAX_AGE_SLOS = 0.05


def boosted_s(arrival_s: float, size_class: int, max_age_s: float, now_s: float) -> float:
    """The time by which a request is ordered at ``now_s``, on the same clock."""
    return arrival_s - GAINS[size_class] * min(max(0.0, now_s - arrival_s), max_age_s)
