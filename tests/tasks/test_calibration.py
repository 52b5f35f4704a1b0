# SPDX-License-Identifier: Apache-2.0
"""Scale and bias of a sigmoid against a plain logistic regression of all pairs."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from scipy.optimize import minimize
from torch.nn import functional as F

from hf_robust.errors import DataError
from hf_robust.tasks import calibration


def fit_sigmoid(batches, ranks=None):
    return calibration.fit_sigmoid(batches, ranks or Accelerator(cpu=True))


def cosines_and_labels(gap=0.05, n_images=60, n_classes=5):
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(n_images, n_classes, generator=generator) < 0.2).double()
    labels[torch.rand(n_images, n_classes, generator=generator) < 0.1] = torch.nan
    noise = 0.03 * torch.randn(n_images, n_classes, generator=generator, dtype=torch.float64)
    return (0.2 + gap * labels.nan_to_num(0) + noise).clamp(-1, 1), labels


def mean_probability(cosines, labels, scale, bias):
    return torch.sigmoid(scale * cosines + bias)[~labels.isnan()].mean()


def base_rate(labels):
    return labels[~labels.isnan()].mean()


def plain_platt(cosines, labels):
    known = ~labels.isnan()
    x, y = cosines[known], labels[known]
    targets = torch.where(y == 1, (y.sum() + 1) / (y.sum() + 2), 1 / ((1 - y).sum() + 2))

    def loss(values):
        return float(F.binary_cross_entropy_with_logits(10 * values[0] * (x - x.mean()) + values[1], targets))

    return 10 * minimize(loss, [1.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14}).x[0]


def test_the_scale_is_platts_and_the_mean_probability_the_base_rate():
    cosines, labels = cosines_and_labels()
    scale, bias = fit_sigmoid([(cosines, labels)])
    assert scale == pytest.approx(plain_platt(cosines, labels), rel=2e-3)  # bins of cosines
    assert float(mean_probability(cosines, labels, scale, bias)) == pytest.approx(float(base_rate(labels)), abs=1e-4)


def test_it_is_the_same_however_images_are_spread_over_batches():
    cosines, labels = cosines_and_labels()
    batches = zip(cosines.split(7), labels.split(7), strict=True)
    assert fit_sigmoid(batches) == fit_sigmoid([(cosines, labels)])


class Ranks:
    """One after the other; the last gets the sum."""

    device = torch.device("cpu")

    def __init__(self):
        self.counts = []

    def reduce(self, counts, reduction):
        assert reduction == "sum"
        self.counts.append(counts)
        return sum(self.counts)


def test_it_is_the_same_however_images_are_spread_over_ranks():
    cosines, labels = cosines_and_labels()
    ranks = Ranks()
    first, last = (fit_sigmoid([(cosines[part], labels[part])], ranks) for part in (slice(0, 20), slice(20, None)))
    assert last == fit_sigmoid([(cosines, labels)]) != first


def test_what_is_not_known_counts_nowhere():
    cosines, labels = cosines_and_labels()
    others = torch.where(labels.isnan(), -0.9, cosines)
    assert fit_sigmoid([(others, labels)]) == fit_sigmoid([(cosines, labels)])


@pytest.mark.parametrize(("gap", "expected"), [(-0.05, 1.0), (0.0, None), (0.3, 30.0), (0.79, None)])
def test_cosines_that_tell_nothing_or_everything_give_a_scale_in_bounds(gap, expected):
    cosines, labels = cosines_and_labels(gap)
    scale, bias = fit_sigmoid([(cosines, labels)])
    assert 1 <= scale <= 100 and (expected is None or scale == pytest.approx(expected, rel=0.5))
    assert float(mean_probability(cosines, labels, scale, bias)) == pytest.approx(float(base_rate(labels)), abs=1e-4)


@pytest.mark.parametrize("labels", [torch.zeros(3, 2), torch.ones(3, 2), torch.full((3, 2), torch.nan)])
def test_labels_that_are_all_the_same_have_no_base_rate(labels):
    with pytest.raises(DataError, match="no base rate"):
        fit_sigmoid([(torch.rand(3, 2), labels)])
