# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score

from hf_robust.errors import ConfigError, DataError, NonFiniteError
from hf_robust.tasks.label_metrics import best_threshold, label_metrics

SCORES = [[3.0, 0.5, 1.0], [2.0, -1.0, 0.0], [1.0, 1.5, -2.0], [0.0, -0.5, 4.0]]
TARGETS = [[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0]]  # no image has the last label


def test_by_hand():
    found = label_metrics(SCORES, TARGETS, threshold=1.0)
    # ranks of positives: 1 and 3 of the first class, 2 and 3 of the second
    assert found["mAP_macro"] == pytest.approx(((1 + 2 / 3) / 2 + (1 / 2 + 2 / 3) / 2) / 2)
    # sorted: 4.0 no, 3.0 yes, 2.0 no, 1.5 no, then 1.0 twice, one of which is right, .5 yes, 0 twice, -.5 yes
    assert found["mAP_micro"] == pytest.approx((1 / 2 + 2 / 6 + 3 / 7 + 4 / 10) / 4)
    # said: 3 of the first class, 2 of them right; 1 of the second, wrong; 2 of the last, both wrong
    assert found["f1_macro"] == pytest.approx((4 / 5 + 0) / 2)
    assert found["f1_micro"] == pytest.approx(2 * 2 / (6 + 4))
    assert found["classes_without_positives"] == 1


def test_agrees_with_scikit_learn_where_all_is_known():
    generator = np.random.default_rng(0)
    targets = generator.integers(2, size=(60, 5))
    scores = targets + generator.normal(size=(60, 5))
    found = label_metrics(torch.from_numpy(scores).requires_grad_(), targets.astype(bool), threshold=0.4)
    for average in ("macro", "micro"):
        assert found[f"mAP_{average}"] == pytest.approx(average_precision_score(targets, scores, average=average))
        assert found[f"f1_{average}"] == pytest.approx(f1_score(targets, scores >= 0.4, average=average))
    assert found["classes_without_positives"] == 0


@pytest.mark.parametrize("unknown", [-1, np.nan])
def test_what_is_not_known_counts_nowhere(unknown):
    scores, targets = np.array([*SCORES, [9.0, 0.7, -9.0]]), np.array([*TARGETS, [unknown, 1, unknown]])
    better = scores.copy()
    better[4, [0, 2]] = -3.0, 3.0
    assert label_metrics(scores, targets, 1.0) == label_metrics(better, targets, 1.0)
    assert best_threshold(scores, targets) == best_threshold(better, targets)
    assert label_metrics(scores, targets, 1.0) != label_metrics(scores, np.abs(np.nan_to_num(targets)), 1.0)
    whole = label_metrics(np.delete(scores, 4, 0), np.delete(targets, 4, 0), 1.0)
    column = label_metrics(np.delete(scores, 1, 1), np.delete(targets, 1, 1), 1.0)
    assert column == label_metrics(np.delete(scores[:4], 1, 1), np.delete(targets[:4], 1, 1), 1.0) != whole


@st.composite
def labelled(draw):
    shape = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    cells = st.tuples(st.integers(-3, 3), st.sampled_from([0, 1, -1]))
    drawn = draw(st.lists(cells, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    scores, targets = np.array(drawn).T.reshape(2, *shape)
    targets[0, 0] = 1
    return scores / 2, targets


@settings(max_examples=20, deadline=None)
@given(labelled(), st.randoms(use_true_random=False))
def test_the_threshold_is_the_highest_of_the_best_and_order_does_not_matter(drawn, random):
    scores, targets = drawn
    threshold = best_threshold(scores, targets)
    f1 = {t: label_metrics(scores, targets, t)["f1_micro"] for t in np.unique(scores[targets >= 0]).tolist()}
    best = max(f1.values())
    assert threshold == max(t for t, value in f1.items() if value == pytest.approx(best, abs=1e-12))
    images, classes = (random.sample(range(n), n) for n in scores.shape)
    shuffled = scores[images][:, classes], targets[images][:, classes]
    assert best_threshold(*shuffled) == threshold
    assert label_metrics(*shuffled, threshold) == pytest.approx(label_metrics(scores, targets, threshold))


@pytest.mark.parametrize(
    ("scores", "targets", "error", "message"),
    [
        ([[0.1, 0.2]], [[1, 0], [0, 1]], DataError, r"do not fit.*\(\(1, 2\), \(2, 2\)\)"),
        ([0.1, 0.2], [1, 0], DataError, "do not fit"),
        (np.zeros((0, 2)), np.zeros((0, 2)), DataError, "at least one image"),
        ([[0.1, 0.2]], [[2, 0]], DataError, "target is no label.*got 2.0"),
        ([[0.1, 0.2]], [[0, -1]], DataError, "no image has a label"),
        ([[0.1, np.nan]], [[1, 0]], NonFiniteError, "scores, row 0"),
        ([[0.1, np.inf]], [[1, 0]], NonFiniteError, "scores, row 0"),
    ],
)
def test_what_has_no_precision_is_refused(scores, targets, error, message):
    with pytest.raises(error, match=message):
        label_metrics(scores, targets, 0.5)
    with pytest.raises(error, match=message):
        best_threshold(scores, targets)


def test_a_threshold_is_a_number():
    with pytest.raises(ConfigError, match="threshold is no number.*nan"):
        label_metrics(SCORES, TARGETS, float("nan"))
