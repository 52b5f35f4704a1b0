# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from hf_robust.errors import ConfigError, DataError, NonFiniteError
from hf_robust.tasks.verification import tar_at_far, ten_fold_accuracy, verification_metrics


def pairs(number=1200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    same = torch.rand(number, generator=generator) < 0.1
    first, noise = torch.randn(2, number, 6, generator=generator, dtype=torch.float64)
    return first, torch.where(same[:, None], first, 0) + noise, same


def cosines(first, second):
    return torch.cosine_similarity(first, second).numpy()


# --- true accept rate ---


def test_tar_at_far_by_hand():
    impostor = [0.6, 0.5] + [0.1] * 98
    assert tar_at_far([0.9, 0.55, 0.5, 0.05], impostor, 0.1) == 3 / 4  # 0.1 would accept all impostors
    assert tar_at_far([0.9, 0.6, 0.5, 0.05], [0.6] * 10 + [0.1] * 990, 0.01) == 3 / 4
    assert tar_at_far([0.9, 0.6, 0.5, 0.05], [0.6] * 11 + [0.1] * 989, 0.01) == 1 / 4  # as similar as one too many


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=30), st.lists(st.integers(0, 30), min_size=20, max_size=60))
def test_tar_is_the_best_of_all_thresholds(genuine, impostor):
    genuine, impostor = np.array(genuine) / 7, np.array(impostor) / 7
    thresholds = [*np.unique([*genuine, *impostor]), math.inf]
    allowed = [(genuine >= t).mean() for t in thresholds if (impostor >= t).mean() <= 0.5]
    assert tar_at_far(torch.from_numpy(genuine), impostor, 0.5) == max(allowed)


@pytest.mark.parametrize(("far", "least"), [(1e-2, 1000), (1e-3, 10_000)])
def test_with_too_few_impostors_there_is_no_rate(far, least):
    assert math.isnan(tar_at_far([1.0], np.zeros(least - 1), far))
    assert tar_at_far([1.0], np.zeros(least), far) == 1


def test_a_rate_that_is_met_exactly_is_met():
    """0.01 · 2900 is less than 29 in floating point."""
    impostor = np.array([0.5] * 29 + [0.0] * 2871)
    assert tar_at_far([0.4], impostor, 0.01) == 1


# --- ten folds ---


def by_insightface(distances, same):
    """Written after the protocol's words, a threshold and a fold at a time."""
    edges = np.cumsum([0] + [len(same) // 10 + (fold < len(same) % 10) for fold in range(10)])
    accuracies = []
    for start, stop in zip(edges, edges[1:], strict=False):
        test = np.arange(start, stop)
        train = np.setdiff1d(np.arange(len(same)), test)
        best, chosen = -1.0, None
        for threshold in np.arange(0, 4, 0.01):
            accuracy = np.mean((distances[train] < threshold) == same[train])
            if accuracy > best:
                best, chosen = accuracy, threshold
        accuracies.append(np.mean((distances[test] < chosen) == same[test]))
    return np.mean(accuracies), np.std(accuracies)


@pytest.mark.parametrize("number", [60, 123])
def test_ten_folds_are_those_of_the_protocol(number):
    first, second, same = pairs(number)
    distances = 2 - 2 * cosines(first, second)
    found = ten_fold_accuracy(torch.from_numpy(distances), same)
    assert found == pytest.approx(by_insightface(distances, same.numpy())) and found[1] > 0


def test_a_distance_on_the_threshold_is_not_accepted_and_the_first_best_is_taken():
    # on nine folds 0.51 is the first that accepts 0.5; in the tenth it does not accept 0.51
    assert ten_fold_accuracy([0.5, 3.0] * 9 + [0.51, 3.0], [True, False] * 10) == pytest.approx((0.95, 0.15))


def test_the_order_is_that_of_the_list():
    distances, same = np.array([0.5] * 10 + [0.1] * 10), np.array([True] * 10 + [False] * 10)
    mixed = np.arange(20).reshape(2, 10).T.ravel()
    assert ten_fold_accuracy(distances, same) != ten_fold_accuracy(distances[mixed], same[mixed])


# --- all of a list of pairs ---


def test_metrics_of_a_list_of_pairs():
    first, second, same = pairs()
    found = verification_metrics(first, 3 * second, same)
    scores = cosines(first, second)
    assert found["roc_auc"] == pytest.approx(roc_auc_score(same, scores))
    rates, accepted, _ = roc_curve(same, scores, drop_intermediate=False)
    assert found["tar_at_far_1e-2"] == pytest.approx(accepted[rates <= 0.01].max())
    assert 0 < found["tar_at_far_1e-2"] < 1 and math.isnan(found["tar_at_far_1e-3"])
    mean, deviation = ten_fold_accuracy(2 - 2 * scores, same)
    assert (found["ten_fold_accuracy"], found["ten_fold_accuracy_std"]) == pytest.approx((mean, deviation))


def test_ties_are_half_an_error_of_the_roc():
    ones = torch.ones(10, 2)
    assert verification_metrics(ones, ones, [True, False] * 5)["roc_auc"] == 0.5


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tar_at_far([0.5], [0.1], 0.0), ConfigError, r"far.*got 0.0; allowed \(0, 1\]"),
        (lambda: tar_at_far([], [0.1], 0.5), DataError, "genuine.*at least one pair"),
        (lambda: tar_at_far([0.5], [[0.1]], 0.5), DataError, "one value per pair.*impostor"),
        (lambda: tar_at_far([0.5], [math.nan], 0.5), NonFiniteError, "impostor"),
        (lambda: ten_fold_accuracy([0.5] * 9, [True] * 9), DataError, "too few pairs.*got 9"),
        (lambda: ten_fold_accuracy([0.5] * 10, [True] * 9), DataError, r"same.*\(9,\); allowed \(10,\)"),
        (lambda: ten_fold_accuracy([0.5] * 10, [2] * 10), DataError, "same.*true and false"),
        (lambda: ten_fold_accuracy([math.inf] * 10, [True] * 10), NonFiniteError, "distances"),
        (lambda: verification_metrics(torch.ones(10, 2), torch.ones(9, 2), [True] * 10), DataError, "do not pair"),
        (lambda: verification_metrics(*torch.ones(2, 10, 2), [True] * 10), DataError, "no impostors"),
        (lambda: verification_metrics(*torch.ones(2, 10, 2), [False] * 10), DataError, "no genuine pairs"),
        (lambda: verification_metrics(*torch.full((2, 9, 2), torch.nan), [True] * 9), NonFiniteError, "first_embeds"),
    ],
)
def test_what_cannot_be_verified_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
