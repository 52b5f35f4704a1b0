# SPDX-License-Identifier: Apache-2.0
"""Losses of several labels against plain loops in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_robust.data.rows import LabelledImages, LabelledStream
from hf_robust.errors import ConfigError
from hf_robust.tasks.binary_losses import (
    LOSSES,
    LabelLoss,
    asymmetric_loss,
    binary_cross_entropy,
    check_positive_weights,
    positive_weights,
)

YES_NO_UNKNOWN = [[1, 0, math.nan, 0], [0, math.nan, 1, 1], [math.nan] * 4]
WEIGHTS = [1.0, 2.5, 0.0, 3.0]


def drawn(n_images, n_classes, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(n_images, n_classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(-1, 2, logits.shape, generator=generator).double().where(logits < 9, torch.nan)


def plain_loss(name, logit, label, weight):
    """Loss and slope of one pair of image and class."""
    p = 1 / (1 + math.exp(-logit))
    if name == "bce":
        return (-weight * math.log(p), weight * (p - 1)) if label else (-math.log(1 - p), p)
    if label:
        return -weight * (1 - p) * math.log(max(p, 1e-8)), -weight * (1 - p) * (1 - p)
    q = max(p - 0.05, 0)
    return -(q**4) * math.log(1 - q), q**4 * p * (1 - p) / (1 - q)


@pytest.mark.parametrize("name", LOSSES)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_losses_and_slopes_are_those_of_a_plain_loop(name, n_images, n_classes, seed):
    logits, labels = drawn(n_images, n_classes, seed)
    labels[labels < 0] = math.nan
    expected, slopes = torch.zeros(n_images, dtype=torch.float64), torch.zeros_like(logits)
    for image in range(n_images):
        for c in range(n_classes):
            if not math.isnan(labels[image, c]):
                pair = float(logits[image, c]), bool(labels[image, c]), WEIGHTS[c]
                loss, slopes[image, c] = plain_loss(name, *pair)
                expected[image] += loss
    logits.requires_grad_(True)
    losses = LOSSES[name](logits, labels, torch.tensor(WEIGHTS[:n_classes]))
    losses.sum().backward()
    torch.testing.assert_close(losses, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(logits.grad, slopes, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_sixteen_bits_are_computed_in_float32_and_large_logits_stay_finite(name):
    logits = torch.tensor([[1e4, -1e4, 300.0, -300.0]], dtype=torch.bfloat16, requires_grad=True)
    labels = torch.tensor([[0.0, 1.0, 1.0, 0.0]], dtype=torch.bfloat16)
    losses = LOSSES[name](logits, labels, None)
    losses.sum().backward()
    assert losses.dtype == torch.float32 and losses.isfinite().all() and logits.grad.isfinite().all()
    assert logits.grad[0, 2:].abs().max() == 0  # they are right


def test_easy_negatives_teach_the_asymmetric_loss_nothing():
    logits = torch.tensor([[-3.0, -2.9]], requires_grad=True)  # probabilities of 0.047 and 0.052
    asymmetric_loss(logits, torch.zeros(1, 2)).sum().backward()
    assert logits.grad[0, 0] == 0 < logits.grad[0, 1]


def test_the_sum_over_classes_is_that_many_times_pytorchs_mean():
    logits, labels = drawn(6, 4, 0)
    labels = (labels > 0).double()
    mean = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    torch.testing.assert_close(binary_cross_entropy(logits, labels).mean(), 4 * mean)


# --- positive weights ---


def rows_of(labels):
    return LabelledImages(None, "train", None, np.arange(len(labels)), np.array(labels, np.int8), None)


def test_balanced_weights_let_both_labels_of_a_class_weigh_the_same():
    labels = [[1, 0, 0, 1], [0, -1, 0, 1], [0, 1, 0, -1], [0, 0, 0, 1]]
    assert positive_weights("balanced", rows_of(labels), 4).tolist() == [3.0, 2.0, 1.0, 0.0]
    assert positive_weights("balanced", rows_of(labels).select([0, 1]), 4).tolist() == [1.0, 1.0, 1.0, 0.0]
    assert positive_weights([1, 2, 3, 4], rows_of(labels), 4).tolist() == [1.0, 2.0, 3.0, 4.0]
    assert positive_weights(None, rows_of(labels), 4) is None


def test_labels_of_a_stream_cannot_be_counted():
    with pytest.raises(ConfigError, match="cannot be counted"):
        positive_weights("balanced", LabelledStream([], "train", None, None), 2)


@pytest.mark.parametrize("given", ["heavy", [1.0], [1.0, -1.0], [1.0, math.inf], [True, 1.0], ["1", "2"]])
def test_other_positive_weights_are_refused(given):
    with pytest.raises(ConfigError, match="no positive weights"):
        check_positive_weights(given, 2)


def test_the_loss_of_training_has_the_weights_and_that_of_the_task_has_not():
    logits, labels = drawn(3, 4, 1)[0], torch.tensor(YES_NO_UNKNOWN)
    outputs = SimpleNamespace(logits=logits, loss=binary_cross_entropy(logits, labels).mean())
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    assert LabelLoss("bce")(outputs, labels, 3, 3) is outputs.loss
    torch.testing.assert_close(
        LabelLoss("asymmetric", weights)(outputs, labels, 3, 3), asymmetric_loss(logits, labels, weights).mean()
    )
    own = LabelLoss("bce", function=lambda outputs, labels, num_items_in_batch: outputs.loss / num_items_in_batch)
    torch.testing.assert_close(own(outputs, labels, 6, 3), outputs.loss / 3)
    with pytest.raises(ConfigError, match="positive_weights"):
        LabelLoss("bce", weights, own)
