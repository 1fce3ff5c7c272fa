"""The order of chameleon: bounded boosts, by arrival within a class, and no change of mind between two requests."""

from itertools import combinations, product

import pytest

from chameleon_ray.policy.ordering import GAINS, boosted_s

MAX_AGE_S = 3.0
CLASSES = range(len(GAINS))


def test_boosts_grow_with_age_up_to_a_bound_and_are_largest_for_small_requests():
    boosts = [[arrived - boosted_s(arrived, size, MAX_AGE_S, 10.0) for size in CLASSES] for arrived in (10.0, 9.0, 1.0)]
    assert boosts[0] == [0.0, 0.0, 0.0]
    assert boosts[1] == pytest.approx([1.0 * gain for gain in GAINS])
    assert boosts[2] == pytest.approx([MAX_AGE_S * gain for gain in GAINS])
    assert sorted(GAINS, reverse=True) == list(GAINS) and GAINS[-1] == 0.0


@pytest.mark.parametrize("size", CLASSES)
def test_within_a_class_the_order_is_that_of_arrival(size):
    for now_s in (5.0, 6.0, 8.0, 30.0):
        times = [boosted_s(arrived / 8, size, MAX_AGE_S, now_s) for arrived in range(41)]
        assert times == sorted(times) and len(set(times)) == len(times)


def test_who_once_goes_before_an_older_request_always_does():
    requests = list(product((0.0, 0.5, 1.25, 2.5, 4.0), CLASSES))
    for one, other in combinations(requests, 2):
        older, younger = sorted((one, other))
        ahead = [
            boosted_s(*younger, MAX_AGE_S, now_s) < boosted_s(*older, MAX_AGE_S, now_s)
            for now_s in (younger[0] + step / 8 for step in range(80))
        ]
        assert ahead == sorted(ahead)
        assert younger[1] < older[1] or not any(ahead)


def test_nobody_is_overtaken_by_who_comes_later_than_the_bound():
    for late_s, size, now_s in product((MAX_AGE_S * GAINS[0] + 0.01, 100.0), CLASSES, (110.0, 1000.0)):
        assert boosted_s(0.0, CLASSES[-1], MAX_AGE_S, now_s) < boosted_s(late_s, size, MAX_AGE_S, now_s)
