# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from scipy.stats import binom

from hf_robust.errors import ConfigError, DataError
from hf_robust.evaluation.statistics import (
    baseline_line,
    bootstrap_difference,
    bootstrap_interval,
    bootstrap_over_runs,
    effective_robustness,
    forgetting,
    ood_average,
    paired_test,
    standard_error,
)

few_examples = settings(max_examples=30)
fractions = st.integers(0, 1000).map(lambda right: right / 1000)
inside = st.integers(1, 999).map(lambda right: right / 1000)
results = st.lists(st.booleans(), min_size=1, max_size=40)
pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)

# --- forgetting and OOD average ---


def test_forgetting_is_the_mean_loss_over_tasks():
    zero_shot = {"cifar10": 0.9, "caltech101": 0.8, "dtd": 0.4}
    tuned = {"dtd": 0.5, "cifar10": 0.6, "caltech101": 0.7}  # -0.1, 0.3 and 0.1, in another order
    assert forgetting(zero_shot, tuned) == pytest.approx(0.1)


@few_examples
@given(st.dictionaries(st.text(max_size=3), st.tuples(fractions, fractions), min_size=1, max_size=6))
def test_forgetting_lies_in_bounds_and_changes_its_sign_with_the_roles(tasks):
    zero_shot = {task: both[0] for task, both in tasks.items()}
    tuned = {task: both[1] for task, both in reversed(tasks.items())}
    losses = [before - after for before, after in tasks.values()]
    found = forgetting(zero_shot, tuned)
    assert min(losses) - 1e-12 <= found <= max(losses) + 1e-12
    assert found == pytest.approx(-forgetting(tuned, zero_shot), abs=1e-12)
    assert forgetting(tuned, tuned) == 0
    assert found == pytest.approx(ood_average(zero_shot) - ood_average(tuned), abs=1e-12)


@pytest.mark.parametrize(
    ("zero_shot", "tuned", "message"),
    [
        ({}, {}, "tasks of zero-shot and tuned model differ.*at least one"),
        ({"a": 0.5}, {"a": 0.5, "b": 0.5}, r"differ: got \(\['a'\], \['a', 'b'\]\)"),
        ({"a": 50.0}, {"a": 0.5}, r"no fraction \(at a\): got 50.0; allowed \[0, 1\]. Divide percent by 100"),
        ({"a": 0.5}, {"a": float("nan")}, "no fraction.*nan"),
    ],
)
def test_tasks_that_cannot_be_compared_are_refused(zero_shot, tuned, message):
    with pytest.raises(DataError, match=message):
        forgetting(zero_shot, tuned)


def test_ood_average_of_published_figures():
    """Zero-shot CLIP ViT-B/16 and its five ImageNet shifts."""
    shifts = {"V2": 0.619, "Sketch": 0.483, "A": 0.501, "R": 0.776, "ObjectNet": 0.542}
    assert round(ood_average(shifts), 3) == 0.584


@pytest.mark.parametrize(("by_set", "message"), [({}, "no out-of-distribution sets"), ({"A": -0.1}, "at A.*-0.1")])
def test_ood_average_needs_fractions(by_set, message):
    with pytest.raises(DataError, match=message):
        ood_average(by_set)


# --- effective robustness ---


def test_the_line_through_one_model_keeps_its_odds_ratio():
    slope, intercept = baseline_line([(0.75, 0.5)])  # odds 3 and 1
    assert slope == 1 and intercept == pytest.approx(-np.log(3))
    expected = 9 / 12  # odds 9 at an ID accuracy of 0.9, of which a third are 3: 0.75
    assert effective_robustness(0.9, 0.8, [(0.75, 0.5)]) == pytest.approx(0.8 - expected)


def test_the_line_through_several_models_is_least_squares_on_logits():
    points = [(expit(x), expit(y)) for x, y in [(-1, 0), (0, 0), (1, 3)]]
    slope, intercept = baseline_line(points)
    assert (slope, intercept) == pytest.approx((1.5, 1.0))
    assert effective_robustness(0.5, 0.9, points) == pytest.approx(0.9 - expit(1))


@few_examples
@given(inside, inside, st.lists(st.tuples(inside, inside), min_size=1, max_size=6), st.randoms())
def test_effective_robustness_is_bounded_and_ignores_the_order_of_baselines(x, y, baseline, random):
    assume(len(baseline) == 1 or max(b[0] for b in baseline) - min(b[0] for b in baseline) > 0.01)
    found = effective_robustness(x, y, baseline)
    assert y - 1 <= found <= y
    shuffled = random.sample(baseline, len(baseline))
    assert effective_robustness(x, y, shuffled) == pytest.approx(found, abs=1e-6)
    slope, intercept = baseline_line(baseline)
    on_the_line = float(expit(slope * logit(x) + intercept))
    assert effective_robustness(x, on_the_line, baseline) == pytest.approx(0, abs=1e-12)
    assert effective_robustness(baseline[0][0], baseline[0][1], baseline[:1]) == pytest.approx(0, abs=1e-12)


def test_accuracies_of_0_and_1_count_as_a_thousandth_from_them():
    assert baseline_line([(1, 0)]) == baseline_line([(0.999, 0.001)])
    assert baseline_line([(0.9995, 0.0)]) == baseline_line([(1, 0)])
    assert effective_robustness(1, 1, [(0.5, 0.5)]) == pytest.approx(1 - 0.999)
    assert effective_robustness(0, 0, [(0.5, 0.5)]) == pytest.approx(-0.001)


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ([], "no models to draw a line through"),
        ([(0.5, 0.4), (0.5, 0.6)], r"no line fits.*\[\(0.5, 0.4\), \(0.5, 0.6\)\].*slope 1"),
        ([(76.2, 0.4)], "no fraction.*76.2"),
        ([(0.5, float("nan"))], "no fraction.*nan"),
    ],
)
def test_baselines_without_a_line_are_refused(baseline, message):
    with pytest.raises(DataError, match=message):
        effective_robustness(0.5, 0.5, baseline)


@pytest.mark.parametrize(("x", "y", "where"), [(1.5, 0.5, "id_accuracy"), (0.5, 1.5, "ood_accuracy")])
def test_the_accuracy_that_is_no_fraction_is_named(x, y, where):
    with pytest.raises(DataError, match=f"at {where}.*got 1.5"):
        effective_robustness(x, y, [(0.5, 0.5)])


# --- bootstrap ---


def test_intervals_of_few_images_by_hand():
    # two images, one correct: means of 0, 0.5 and 1 come with 1/4, 1/2 and 1/4
    assert bootstrap_interval([True, False]) == (0, 1)
    # four images, of which the runs differ in one: no draw of it has (3/4)^4 = 32 %, three or more 5 %, four 0.4 %
    assert bootstrap_difference([1, 1, 0, 0], [1, 0, 0, 0]) == (0, 0.75)
    assert bootstrap_difference([1, 0, 0, 0], [1, 1, 0, 0]) == (-0.75, 0)


@pytest.mark.parametrize(("right", "images"), [(80, 100), (3, 20), (999, 1000), (30_000, 50_000)])
def test_intervals_are_the_quantiles_of_drawing_images(right, images):
    exact = binom.ppf([0.025, 0.975], images, right / images) / images
    deviation = np.sqrt(right * (images - right)) / images**1.5
    tolerance = 0.06 * deviation + 1 / images  # what 20,000 draws leave open: 0.02 deviations, three times; a step
    found = bootstrap_interval([True] * right + [False] * (images - right), resamples=20_000)
    np.testing.assert_allclose(found, exact, atol=tolerance, rtol=0)


def test_intervals_agree_with_drawing_the_images_themselves():
    generator = np.random.default_rng(1)
    first, second = generator.random(200) < 0.7, generator.random(200) < 0.6
    drawn = generator.integers(200, size=(5_000, 200))
    differences = (first[drawn].mean(axis=1) - second[drawn].mean(axis=1), first[drawn].mean(axis=1))
    for found, means in zip(
        (bootstrap_difference(first, second), bootstrap_interval(first)), differences, strict=True
    ):
        np.testing.assert_allclose(found, np.quantile(means, [0.025, 0.975]), atol=0.011)


def test_shared_results_narrow_the_interval_of_a_difference():
    """Both runs get the same images right, but for two: far surer than two accuracies on their own."""
    shared = [True] * 50 + [False] * 48
    low, high = bootstrap_difference([*shared, True, True], [*shared, False, False])
    assert low == 0 and high == 0.05


@few_examples
@given(results, st.randoms(), st.integers(0, 2**32 - 1))
def test_intervals_lie_in_bounds_hold_the_accuracy_and_ignore_the_order(correct, random, seed):
    low, high = bootstrap_interval(correct, resamples=500, seed=seed)
    accuracy = sum(correct) / len(correct)
    assert 0 <= low <= accuracy + 1e-12 and accuracy - 1e-12 <= high <= 1
    if accuracy in (0, 1):
        assert low == high == accuracy
    assert bootstrap_interval(random.sample(correct, len(correct)), resamples=500, seed=seed) == (low, high)
    assert bootstrap_difference(correct, [False] * len(correct), resamples=500, seed=seed) == (low, high)
    assert bootstrap_difference(correct, correct, resamples=500, seed=seed) == (0, 0)


@few_examples
@given(pairs, st.randoms(), st.integers(0, 2**32 - 1))
def test_intervals_of_a_difference_hold_it_and_ignore_the_order(both, random, seed):
    first, second = zip(*both, strict=True)
    low, high = bootstrap_difference(first, second, resamples=500, seed=seed)
    difference = (sum(first) - sum(second)) / len(both)
    assert -1 <= low <= difference + 1e-12 and difference - 1e-12 <= high <= 1
    shuffled = zip(*random.sample(both, len(both)), strict=True)
    assert bootstrap_difference(*shuffled, resamples=500, seed=seed) == (low, high)


def test_seeds_draw_anew_and_leave_the_global_state_alone():
    correct = [True] * 300 + [False] * 500
    state = np.random.get_state()[1].copy()
    found = {bootstrap_interval(correct, resamples=100, seed=seed) for seed in range(5)}
    assert len(found) > 1 and np.array_equal(np.random.get_state()[1], state)
    assert bootstrap_interval(correct, seed=3) == bootstrap_interval(np.array(correct), seed=3)


@pytest.mark.parametrize("resamples", [0, -1, 10.0])
def test_resamples_are_positive_integers(resamples):
    with pytest.raises(ConfigError, match="resamples is out of range.*integers from 1"):
        bootstrap_interval([True], resamples=resamples)


# --- paired test ---


def test_paired_test_by_hand():
    first, second = [1, 1, 1, 1, 0, 0, 1], [0, 0, 0, 1, 0, 1, 0]
    found = paired_test(first, second)  # 4 against 1 of 5 coins: 2 (5 + 1) / 32
    assert (found.only_first, found.only_second) == (4, 1) and found.p_value == pytest.approx(12 / 32)
    assert paired_test(second, first) == (1, 4, found.p_value)
    assert paired_test([True] * 6, [False] * 6).p_value == pytest.approx(2 / 64)
    assert paired_test(first, first) == (0, 0, 1.0)


def test_images_on_which_the_runs_agree_do_not_matter():
    first, second = [1, 1, 1, 0], [0, 0, 0, 1]
    agreed = paired_test([*first, *[1] * 500, *[0] * 500], [*second, *[1] * 500, *[0] * 500])
    assert agreed == paired_test(first, second) == (3, 1, pytest.approx(10 / 16))


@few_examples
@given(pairs, st.randoms())
def test_p_values_are_probabilities_and_ignore_order_and_roles(both, random):
    first, second = zip(*both, strict=True)
    found = paired_test(first, second)
    assert 0 < found.p_value <= 1
    assert paired_test(*zip(*random.sample(both, len(both)), strict=True)) == found
    assert paired_test(second, first).p_value == pytest.approx(found.p_value, rel=1e-12)
    assert found.only_first - found.only_second == sum(first) - sum(second)


# --- what is no result of images ---


@pytest.mark.parametrize("function", [bootstrap_interval, lambda values: paired_test(values, [True, False])])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], r"no list of images.*\(0,\)"),
        ([[True], [False]], r"no list of images.*\(2, 1\)"),
        ([0, 3], r"not whether correct.*3.*predictions == labels"),
        ([0.5, 1.0], "not whether correct.*0.5"),
        ([float("nan"), 1.0], "not whether correct.*nan"),
    ],
)
def test_only_true_and_false_are_counted(function, values, message):
    with pytest.raises(DataError, match=message):
        function(values)


@pytest.mark.parametrize("function", [bootstrap_difference, paired_test])
def test_runs_on_different_images_are_refused(function):
    with pytest.raises(DataError, match=r"different numbers of images: got \(2, 3\).*the same images"):
        function([True, False], [True, False, True])


def test_standard_error_by_hand():
    assert standard_error(0.5, images=100) == 0.05 and standard_error(1.0, images=3) == 0
    assert standard_error(0.2, images=400) == pytest.approx(0.02)


def test_an_interval_over_runs_is_as_wide_as_runs_and_images_differ():
    rng = np.random.default_rng(0)
    images, runs = rng.normal(size=400), rng.normal(size=8)[:, None]
    low, high = bootstrap_over_runs(images + np.zeros((8, 1)))
    assert high - low == pytest.approx(2 * 1.96 * images.std() / 20, rel=0.1)  # runs are alike: as of images alone
    of_runs = bootstrap_over_runs(runs + np.zeros((8, 400)))
    assert of_runs[1] - of_runs[0] == pytest.approx(2 * 1.96 * runs.std() / 8**0.5, rel=0.15)
    assert bootstrap_over_runs(np.full((2, 3), 0.5)) == (0.5, 0.5)
    for wrong in ([0.5, 0.5], [[]], [[np.nan]]):
        with pytest.raises(DataError, match="no numbers by run and image"):
            bootstrap_over_runs(wrong)
