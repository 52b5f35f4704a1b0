# SPDX-License-Identifier: Apache-2.0
"""Some classes stand for all: without bias in the partition function, with the known one in its logarithm."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from hf_robust.errors import ConfigError
from hf_robust.tasks.class_names import ZeroShotClassifierOutput
from hf_robust.tasks.sampled_classes import (
    SampledClasses,
    check_classes_per_step,
    check_sampled_loss,
    sample_classes,
)
from hf_robust.tasks.task import Progress
from hf_robust.tasks.task_loss import TaskLoss

LABELS, CLASSES = torch.tensor([4, 1, 4]), 7
LOGITS = torch.randn(3, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def sample(size: int, step: int = 0) -> SampledClasses:
    return sample_classes(LABELS, CLASSES, size, Progress(step=step).generator("classes"))


def corrected(sampled: SampledClasses) -> Tensor:
    return sampled.spread(LOGITS[:, sampled.classes])


def test_the_mean_over_draws_of_the_partition_function_is_that_of_all_classes() -> None:
    draws = [sample(size=4, step=step) for step in range(500)]
    subsets = {tuple(draw.classes.tolist()): draw for draw in draws}
    assert len(subsets) == math.comb(5, 2)  # two of the five that are not in the batch, all of them equally often
    counts = torch.tensor([sum(tuple(d.classes.tolist()) == subset for d in draws) for subset in subsets])
    assert counts.min() > 25 and counts.max() < 80
    estimates = torch.stack([corrected(draw).exp().sum(dim=1) for draw in subsets.values()])  # (subsets, batch)
    whole = LOGITS.exp().sum(dim=1)  # (batch,)
    torch.testing.assert_close(estimates.mean(dim=0), whole, rtol=1e-12, atol=0)
    rest = LOGITS[:, [0, 2, 3, 5, 6]].exp()
    variance = 25 / 2 * (1 - 2 / 5) * rest.var(dim=1)
    torch.testing.assert_close(estimates.var(dim=0, unbiased=False), variance, rtol=1e-12, atol=0)
    bias = estimates.log().mean(dim=0) - whole.log()
    assert (bias < 0).all()
    torch.testing.assert_close(bias, -variance / (2 * whole.square()), rtol=0.5, atol=0)


@given(st.integers(2, 30), st.lists(st.integers(0, 29), min_size=1, max_size=8), st.integers(2, 30), st.integers(0, 9))
def test_what_is_there(n_classes: int, labels: list[int], size: int, step: int) -> None:
    labels = [label % n_classes for label in labels]
    size = min(size, n_classes)
    how = torch.tensor(labels), n_classes, size, Progress(step=step).generator("classes")
    found = sample_classes(*how)
    classes = found.classes.tolist()
    assert {*labels} <= {*classes} and classes == sorted({*classes}) and max(classes) < n_classes
    assert len(classes) == min(max(size, len({*labels}) + 1), n_classes)  # one is drawn at least
    torch.testing.assert_close(found.correction.exp().sum().item(), float(n_classes))  # as if all logits were 0
    assert all(value == 0 for value, one in zip(found.correction, classes, strict=True) if one in labels)


def test_all_classes_change_nothing() -> None:
    assert torch.equal(corrected(sample(size=CLASSES)), LOGITS)


def test_a_draw_is_of_its_step_and_of_all_its_micro_batches() -> None:
    assert torch.equal(sample(4, step=1).classes, sample(4, step=1).classes)
    assert len({tuple(sample(4, step=step).classes.tolist()) for step in range(6)}) > 1
    of_others = sample_classes(torch.tensor([0]), CLASSES, 4, Progress(step=1).generator("classes"))
    assert len({*of_others.classes.tolist()} & {*sample(4, step=1).classes.tolist()}) >= 2


def test_class_weights_hold_and_classes_that_are_not_there_get_no_gradient() -> None:
    sampled, weights = sample(size=4), torch.arange(1.0, CLASSES + 1, dtype=torch.float64)
    logits = LOGITS[:, sampled.classes].requires_grad_()
    output = ZeroShotClassifierOutput(loss=torch.zeros(()), logits=sampled.spread(logits))
    loss = TaskLoss(weights)(output, LABELS, images=3, batch=3)
    places = torch.searchsorted(sampled.classes, LABELS)
    expected = F.cross_entropy(logits + sampled.correction, places, reduction="none") * weights[LABELS]
    torch.testing.assert_close(loss, expected.mean())
    found, wanted = (torch.autograd.grad(one, logits)[0] for one in (loss, expected.mean()))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("size", [0, 1, CLASSES + 1, 2.5, True])
def test_sizes_out_of_range_are_refused(size) -> None:
    with pytest.raises(ConfigError, match=r"cannot be drawn \(at classes_per_step\).*2 to 7"):
        check_classes_per_step(size, CLASSES)


def test_losses_that_some_classes_cannot_stand_for_are_refused() -> None:
    check_sampled_loss(None, images=100, label_smoothing=0.1)
    check_sampled_loss(9, images=8, label_smoothing=0)
    with pytest.raises(ConfigError, match="classes_per_step.*got 8; allowed more than 8"):
        check_sampled_loss(8, images=8, label_smoothing=0)
    with pytest.raises(ConfigError, match="label_smoothing_factor.*got 0.1.*without classes_per_step"):
        check_sampled_loss(9, images=8, label_smoothing=0.1)
