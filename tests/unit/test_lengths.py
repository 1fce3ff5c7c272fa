from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chameleon_ray.predictor.lengths import (
    AccuracySnapshot,
    HistoryPredictor,
    LengthFeatures,
    PredictionAccuracy,
    length_bucket,
)
from chameleon_ray.sim.oracle import OraclePredictor


def features(adapter="a", num_prompt=100, max_tokens=None, truth=None):
    return LengthFeatures(adapter, num_prompt, max_tokens, truth)


def taught(*lessons, **options):
    predictor = HistoryPredictor(max_model_len=2048, **options)
    for shape, lengths in lessons:
        for length in lengths:
            predictor.observe(shape, length)
    return predictor


def test_nothing_served_yet_answers_the_default():
    assert taught(default_tokens=99).predict(features()) == 99


def test_adapter_and_prompt_class_win_then_adapter_then_prompt_class_then_all():
    lessons = [
        (features("a", 100), [10] * 5),  # 100 and 120 share the class of 64..127
        (features("a", 1000), [500] * 5),
        (features("b", 1000), [700] * 20),
    ]
    predictor = taught(*lessons)
    assert predictor.predict(features("a", 120)) == 10
    assert predictor.predict(features("a", 1000)) == 500
    assert predictor.predict(features("b", 3)) == 700  # adapter b, other prompt class
    assert predictor.predict(features("new", 100)) == 10  # unknown adapter, known prompt class
    assert predictor.predict(features("new", 5)) == 700  # neither: the median of all
    assert predictor.predict(features(None, 100)) == 10  # the base model is just another adapter


def test_a_group_of_few_requests_is_not_trusted():
    predictor = taught((features("a", 100), [10] * 20), (features("b", 100), [400] * 3))
    assert predictor.predict(features("b", 100)) == 10
    predictor.observe(features("b", 100), 400)
    assert predictor.predict(features("b", 100)) == 400


def test_it_follows_drift():
    predictor = taught((features(), [10] * 100), (features(), [300] * 32))
    assert predictor.predict(features()) == 300


def test_predictions_respect_the_clients_and_the_models_limit():
    predictor = taught((features(), [1000] * 5))
    assert predictor.predict(features(max_tokens=64)) == 64
    assert predictor.predict(features(num_prompt=2000)) == 48
    assert predictor.predict(features(num_prompt=5000, max_tokens=0)) == 1


def test_memory_is_bounded_and_drops_the_group_longest_unseen():
    predictor = taught((features("old"), [10] * 5), max_groups=8)
    for adapter in range(1000):
        for _ in range(4):
            predictor.observe(features(f"a{adapter}"), 300)
    assert predictor.num_groups == 8
    assert predictor.predict(features("a999")) == 300
    assert predictor.predict(features("old")) == 300  # forgotten: answered by the wider groups


def test_groups_in_use_are_kept():
    predictor = taught((features("hot"), [10] * 5), max_groups=8)
    for adapter in range(100):
        for _ in range(3):
            predictor.observe(features(f"a{adapter}"), 300)
        predictor.observe(features("hot"), 10)
    assert predictor.predict(features("hot")) == 10


def test_accuracy_without_ends_is_unknown_and_its_window_slides():
    accuracy = PredictionAccuracy(num_requests=2)
    assert accuracy.snapshot() == AccuracySnapshot(0, None, None, None)
    for actual in (1000, 10, 12):
        accuracy.record(10, actual)
    assert accuracy.snapshot() == AccuracySnapshot(2, 1.0, 1.0, -1.0)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), max_size=40), st.integers(1, 10))
def test_the_snapshot_is_that_of_the_latest_ends(outcomes, window):
    accuracy = PredictionAccuracy(window)
    for predicted, actual in outcomes:
        accuracy.record(predicted, actual)
    latest = outcomes[-window:]
    snapshot = accuracy.snapshot()
    assert snapshot.num_requests == len(latest)
    if not latest:
        assert snapshot == AccuracySnapshot(0, None, None, None)
        return
    right = [length_bucket(predicted) == length_bucket(actual) for predicted, actual in latest]
    errors = [predicted - actual for predicted, actual in latest]
    assert snapshot.right_bucket_share == pytest.approx(sum(right) / len(latest))
    assert snapshot.mean_absolute_error_tokens == pytest.approx(sum(map(abs, errors)) / len(latest))
    assert snapshot.mean_error_tokens == pytest.approx(sum(errors) / len(latest))


def test_length_buckets_include_their_upper_bound():
    assert [length_bucket(tokens) for tokens in (1, 16, 17, 4096, 4097)] == [0, 0, 1, 4, 5]


@pytest.mark.parametrize("accuracy", [0.0, 0.6, 0.8, 1.0])
def test_oracle_is_right_as_often_as_told(accuracy):
    oracle, rng, judge = OraclePredictor(accuracy, Random(1), max_model_len=4096), Random(2), PredictionAccuracy(4000)
    for _ in range(4000):
        truth = rng.randint(1, 2000)
        judge.record(oracle.predict(features(truth=truth)), truth)
    assert judge.snapshot().right_bucket_share == pytest.approx(accuracy, abs=0.03)


def test_oracle_repeats_with_its_seed_and_wants_the_truth():
    def run(seed):
        oracle = OraclePredictor(0.5, Random(seed), max_model_len=4096)
        return [oracle.predict(features(truth=200)) for _ in range(50)]

    assert run(3) == run(3) != run(4)
    with pytest.raises(ValueError, match="true_output_tokens"):
        OraclePredictor(0.5, Random(1), 4096).predict(features())
    with pytest.raises(ValueError, match="accuracy"):
        OraclePredictor(1.5, Random(1), 4096)


@pytest.mark.parametrize("bad", [{"default_tokens": 0}, {"max_groups": 3}, {"num_recent": 1}])
def test_unusable_options_are_refused(bad):
    with pytest.raises(ValueError):
        HistoryPredictor(max_model_len=10, **bad)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4000), st.integers(1, 4000)), max_size=60),
    st.integers(1, 4000),
    st.one_of(st.none(), st.integers(1, 4000)),
)
def test_predictions_are_always_possible_lengths(history, num_prompt, max_tokens):
    predictor = HistoryPredictor(max_model_len=4096, max_groups=10)
    for adapter, prompt, output in history:
        predictor.observe(features(adapter, prompt), output)
    asked = features("a", num_prompt, max_tokens, truth=300)
    for answer in (predictor.predict(asked), OraclePredictor(0.5, Random(0), 4096).predict(asked)):
        assert 1 <= answer <= min(4096 - num_prompt, max_tokens or 4096)
    assert predictor.predict(asked) == predictor.predict(asked)
