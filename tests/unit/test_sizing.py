from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chameleon_ray.policy.adapter import Adapter
from chameleon_ray.policy.load_window import LoadWindow
from chameleon_ray.policy.sizing import (
    QueuedRequest,
    QueueLoad,
    Scales,
    SizingOptions,
    adapter_tokens,
    cluster,
    queue_of,
    request_size,
    token_quotas,
)

OPTIONS = SizingOptions(kv_token_bytes=1000)
SCALES = Scales(max_input_tokens=200, max_output_tokens=100, max_adapter_bytes=16_000, base_adapter_bytes=2_000)


def request(num_prompt=100, num_predicted=50, adapter_bytes=8_000, request_id="r"):
    adapter = Adapter("d" * 64, 8, adapter_bytes) if adapter_bytes else None
    return QueuedRequest(request_id, num_prompt, num_predicted, adapter)


def test_wrs_is_the_papers_product():
    # (0.4 * 100/200 + 0.6 * 50/100) * 8000/16000
    assert request_size(request(), SCALES, OPTIONS) == pytest.approx(0.25)
    assert request_size(request(200, 100, 16_000), SCALES, OPTIONS) == pytest.approx(1.0)


def test_degree_one_size_is_the_sum_of_three_terms():
    options = SizingOptions(kv_token_bytes=1000, request_size="sum", adapter_weight=0.2)
    assert request_size(request(), SCALES, options) == pytest.approx(0.2 + 0.3 + 0.2 * 0.5)


def test_base_request_is_sized_by_its_lengths_and_never_above_an_adapters_request():
    short, long = request(10, 5, 0), request(200, 100, 0)
    assert 0 < request_size(short, SCALES, OPTIONS) < request_size(long, SCALES, OPTIONS) == pytest.approx(0.125)
    assert request_size(long, SCALES, OPTIONS) <= request_size(request(200, 100, 2_000), SCALES, OPTIONS)


def test_tokens_count_the_adapter_rounded_up():
    assert adapter_tokens(Adapter("a", 8, 8_001), OPTIONS) == 9
    assert adapter_tokens(Adapter("a", 8, 8_000), OPTIONS) == 8


@pytest.mark.parametrize("bad", [{"kv_token_bytes": 0}, {"kv_token_bytes": 1, "input_weight": -0.1}])
def test_unusable_options_are_refused(bad):
    with pytest.raises(ValueError):
        SizingOptions(**bad)


def test_two_clear_groups_make_two_queues_with_the_cutoff_midway():
    found = cluster([1.0, 2.0, 3.0, 11.0, 12.0, 13.0])
    assert found.centroids == pytest.approx((2.0, 12.0))
    assert found.cutoffs == pytest.approx((7.0,))
    assert [queue_of(size, found.cutoffs) for size in (0.0, 7.0, 7.1, 99.0)] == [0, 0, 1, 1]


def test_elbow_stops_where_the_literal_rule_goes_on():
    sizes = [1.0, 1.1, 1.2, 9.0, 9.1, 9.2]
    assert len(cluster(sizes).centroids) == 2
    assert len(cluster(sizes, rule="min_wcss").centroids) == 4


def test_uniform_sizes_make_three_queues_by_the_elbow_rule():
    # Uniform: WCSS(K) = WCSS(1)/K**2, so one more queue removes 3/4, 5/9, 7/16 of what is left.
    found = cluster(np.linspace(0, 1, 1200))
    assert found.wcss_shares == pytest.approx((1, 1 / 4, 1 / 9, 1 / 16), rel=0.05)
    assert len(found.centroids) == 3


@pytest.mark.parametrize("sizes", [[], [0.3], [0.3] * 50, [0.0, 0.0]])
def test_few_or_equal_sizes_make_one_queue(sizes):
    assert cluster(sizes).cutoffs == ()


def test_huge_sizes_stay_finite():
    found = cluster([0.0, 1e300, 1.7e308, 1.7e308], rule="min_wcss")
    assert all(np.isfinite(found.cutoffs)) and list(found.cutoffs) == sorted(found.cutoffs)


def test_one_huge_request_does_not_merge_all_others_into_one_queue():
    sizes = [0.1] * 100 + [0.2] * 100
    assert cluster([*sizes, 1e4]).cutoffs == pytest.approx((0.15, 5000.1))


@pytest.mark.parametrize("sizes", [[float("nan"), 1.0], [float("inf")], [-1.0, 2.0]])
def test_sizes_that_are_no_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="finite"):
        cluster(sizes)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6, allow_nan=False), min_size=2, max_size=9), st.integers(1, 4))
def test_clustering_is_optimal(sizes, max_queues):
    found = cluster(sizes, max_queues, rule="min_wcss")
    points = sorted(sizes)
    if points[0] == points[-1]:
        return
    scaled = (np.array(points) - points[0]) / (points[-1] - points[0])

    def wcss(breaks):
        parts = [scaled[a:b] for a, b in zip((0, *breaks), (*breaks, len(points)), strict=True)]
        return sum(float(((part - part.mean()) ** 2).sum()) for part in parts)

    for k, share in enumerate(found.wcss_shares, start=1):
        best = min(wcss(breaks) for breaks in combinations(range(1, len(points)), k - 1))
        assert share * wcss(()) == pytest.approx(best, abs=1e-9)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e300, allow_nan=False), max_size=400), st.sampled_from(["elbow", "min_wcss"]))
def test_clustering_is_deterministic_ordered_and_bounded(sizes, rule):
    found = cluster(sizes, rule=rule)
    assert found == cluster(list(reversed(sizes)), rule=rule)
    assert len(found.cutoffs) <= 3
    assert list(found.centroids) == sorted(found.centroids) and list(found.cutoffs) == sorted(found.cutoffs)
    assert len(found.cutoffs) == max(0, len(found.centroids) - 1)


def test_quotas_follow_the_formula_and_share_the_rest_in_proportion():
    # 100 * 1 * (1/5 + 3) = 320; 1000 * 4 * (1/5 + 0.2) = 1600; sum 1920.
    quotas = token_quotas(9600, [QueueLoad(100, 1.0, 3.0), QueueLoad(1000, 4.0, 0.2)], slo_s=5.0)
    assert quotas.minima == pytest.approx((320, 1600))
    assert quotas.tokens == (1600, 8000)
    assert quotas.scale == 1.0


def test_infeasible_minima_give_up_the_slo_first_and_are_reported():
    # What arrives: 100*1*3 = 300 and 1000*4*0.2 = 800. What the SLO adds: 20 and 800; 410 are left for it: half.
    loads = [QueueLoad(100, 1.0, 3.0), QueueLoad(1000, 4.0, 0.2)]
    quotas = token_quotas(1510, loads, slo_s=5.0)
    assert quotas.tokens == (310, 1200)
    assert quotas.scale == pytest.approx(1510 / 1920)
    # Not even what arrives fits: 300 to 800.
    assert token_quotas(1099, loads, slo_s=5.0).tokens == (300, 799)
    assert token_quotas(550, loads, slo_s=5.0).tokens == (150, 400)


def test_infeasible_minima_fall_back_to_what_is_in_flight_on_average():
    # Minima 320 and 1600. In flight on average: 50*1*3 = 150 and 900*4*0.2 = 720.
    loads = [QueueLoad(100, 1.0, 3.0, 50.0), QueueLoad(1000, 4.0, 0.2, 900.0)]
    assert token_quotas(9600, loads, slo_s=5.0).tokens == (1600, 8000), "the paper's shares where they fit"
    # 525 are left of the 1050 that the minima add.
    assert token_quotas(1395, loads, slo_s=5.0).tokens == (235, 1160)
    flood = [QueueLoad(100, 1.0, 1e6, 50.0), QueueLoad(1000, 4.0, 1e6, 900.0)]
    assert token_quotas(8700, flood, slo_s=5.0).tokens == (119, 8581), "50 to 3600"


def test_no_quota_is_below_the_queues_largest_request():
    # By minima alone 8 and 952 of 960; the small queue's largest request has 100 tokens.
    quotas = token_quotas(960, [QueueLoad(100, 0.1, 0.0), QueueLoad(800, 1.5, 0.0)], slo_s=1.0)
    assert quotas.tokens == (100, 860)


@settings(deadline=None)
@given(
    st.integers(1, 10**6),
    st.lists(st.builds(QueueLoad, st.integers(0, 10**5), st.floats(0, 100), st.floats(0, 1e4)), min_size=1, max_size=4),
)
def test_quotas_always_add_up_to_the_total(total, loads):
    quotas = token_quotas(total, loads, slo_s=5.0)
    assert sum(quotas.tokens) == total and min(quotas.tokens) >= 0
    largest = [load.max_request_tokens for load in loads]
    if sum(largest) <= total:
        assert all(quota >= tokens for quota, tokens in zip(quotas.tokens, largest, strict=True))


@pytest.mark.parametrize(
    ("total", "loads", "slo"), [(0, [QueueLoad(1, 1, 1)], 1), (1, [], 1), (1, [QueueLoad(1, 1, 1)], 0)]
)
def test_quotas_of_nothing_are_refused(total, loads, slo):
    with pytest.raises(ValueError):
        token_quotas(total, loads, slo)


def test_window_measures_scales_durations_and_rates():
    window = LoadWindow(OPTIONS)
    for second in range(10):
        window.arrived(request(10, 10, 1_000), float(second))
    window.arrived(request(200, 100, 16_000), 10.0)
    window.ended(request(10, 10, 1_000), duration_s=2.0, num_output_tokens=10)
    scales = window.scales()
    assert scales == Scales(200, 100, 16_000, 1_000)
    small, large = window.loads((0.5,), scales, now_s=20.0)
    assert small == QueueLoad(21, 2.0, 0.5, 21.0)
    assert large == QueueLoad(316, 2.0, 0.05, 316.0)  # none has ended: the overall mean
    assert window.seconds_per_token == pytest.approx(0.2)
    assert window.slo_s() == pytest.approx(10.0)


def test_pauses_do_not_lower_the_rate_but_slow_traffic_does():
    traffic = [0.1 * number for number in range(100)]
    window, slow = LoadWindow(OPTIONS), LoadWindow(OPTIONS)
    for start_s in (0.0, 100.0, 200.0):  # 10 s of traffic, 90 s without
        for second in traffic:
            window.arrived(request(), start_s + second)
    for number in range(100):
        slow.arrived(request(), 3.0 * number)
    for each in (window, slow):
        each.ended(request(), duration_s=0.2, num_output_tokens=10)  # an SLO of 1 s
    (load,) = window.loads((), window.scales(), now_s=210.0)
    assert load.arrivals_per_s == pytest.approx(10.0, rel=0.15)  # a pause counts as 2 s: 20 of its usual gaps
    (load,) = slow.loads((), slow.scales(), now_s=300.0)
    assert load.arrivals_per_s == pytest.approx(1 / 3)


def test_window_forgets_old_requests():
    window = LoadWindow(OPTIONS, num_requests=4)
    window.arrived(request(200, 100, 16_000), 0.0)
    for second in range(1, 5):
        window.arrived(request(20, 10, 4_000), float(second))
    assert window.scales() == Scales(20, 10, 4_000, 4_000)
    assert window.sizes(window.scales()).tolist() == pytest.approx([1.0] * 4)


def test_configured_maxima_win_over_the_window():
    options = SizingOptions(1000, max_input_tokens=400, max_output_tokens=300, max_adapter_bytes=32_000)
    window = LoadWindow(options)
    window.arrived(request(), 0.0)
    assert window.scales() == Scales(400, 300, 32_000, 8_000)
