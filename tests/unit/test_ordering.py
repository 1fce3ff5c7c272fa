from math import log

import pytest

from chameleon_ray.policy.ordering import GAIN, MAX_LOG, BoostedOrder


def order_after(sizes, waits_s):
    order = BoostedOrder()
    for num_tokens in sizes:
        order.arrived(num_tokens)
    for waited_s in waits_s:
        order.admitted(waited_s)
    return order


def test_without_waiting_the_order_is_that_of_arrival():
    order = order_after([10, 1000], [])
    assert order.boosted_s(5.0, 1) == order.boosted_s(5.0, 10**6) == 5.0


def test_small_work_counts_as_earlier_and_large_work_as_later():
    order = order_after([100], [10.0] * 1000)
    assert order.typical_tokens == pytest.approx(100)
    assert order.mean_wait_s == pytest.approx(10.0)
    assert order.boosted_s(50.0, 100) == pytest.approx(50.0)
    assert order.boosted_s(50.0, 50) == pytest.approx(50.0 - GAIN * 10 * log(2))
    assert order.boosted_s(50.0, 200) == pytest.approx(50.0 + GAIN * 10 * log(2))


def test_the_boost_is_bounded():
    order = order_after([100], [10.0] * 1000)
    assert order.boosted_s(0.0, 0) == pytest.approx(-GAIN * 10 * MAX_LOG)
    assert order.boosted_s(0.0, 10**9) == pytest.approx(GAIN * 10 * MAX_LOG)


def test_typical_sizes_follow_traffic():
    order = order_after([100] + [1000] * 1000, [])
    assert order.typical_tokens == pytest.approx(1000, rel=0.01)
