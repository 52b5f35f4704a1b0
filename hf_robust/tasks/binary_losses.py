# SPDX-License-Identifier: Apache-2.0
"""Losses of several labels: every class of every image is a yes or no, or not known.

All return one number an image, the sum over its classes, of which a training takes the mean: micro-batches and ranks
then add up to one big batch, and an image with one label pulls about as strongly as in the cross-entropy of class
names. The mean over all pairs of image and class is this divided by the number of classes, where all are known; the
sum over batch and classes, as in the released code of the asymmetric loss, is this times the number of images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.rows import LabelledImages, LabelledStream
from ..encoders.dual_encoder import at_least_float32
from ..errors import ConfigError
from .task_loss import BALANCED, TaskLoss

PositiveWeights = Sequence[float] | Literal["balanced"] | None

GAMMA_POSITIVE, GAMMA_NEGATIVE, CLIP, EPSILON = 1, 4, 0.05, 1e-8  # of the asymmetric loss


def binary_cross_entropy(logits: Tensor, labels: Tensor, positive_weights: Tensor | None = None) -> Tensor:
    """Returns the binary cross-entropy of every image, over known classes Σ w y softplus(-z) + (1 - y) softplus(z).

    Args:
        logits: `(batch, classes)`.
        labels: `(batch, classes)`, 1 or 0; NaN where it is not known.
        positive_weights: `(classes,)`, by which positive labels count; None for 1.

    Returns:
        `(batch,)`, in float32 or better.

    Example:
        >>> binary_cross_entropy(torch.zeros(1, 3), torch.tensor([[1.0, 0.0, torch.nan]]))
        tensor([1.3863])
    """
    logits, true, known = _prepared(logits, labels)
    losses = F.binary_cross_entropy_with_logits(logits, true, reduction="none")  # (batch, classes)
    return _summed(losses, true, known, positive_weights)


def asymmetric_loss(logits: Tensor, labels: Tensor, positive_weights: Tensor | None = None) -> Tensor:
    """Returns the asymmetric loss of every image, which easy negatives leave alone.

    Over its known classes -Σ w y (1 - p) log p + (1 - y) q⁴ log(1 - q), where p is the probability and q = max(p -
    0.05, 0). The factors 1 - p and q⁴ have no gradient. No logarithm is below that of 1e-8, so a positive label of
    lower probability teaches nothing.

    Asymmetric loss (Ridnik et al., ICCV 2021, https://huggingface.co/papers/2009.14119), as released, but for the sum
    over images; its `gamma_pos` is 1, `gamma_neg` 4, `clip` 0.05, and `disable_torch_grad_focal_loss` is on.

    Args:
        logits: as in `binary_cross_entropy`.
        labels: likewise.
        positive_weights: likewise.

    Returns:
        `(batch,)`, in float32 or better.

    Example:
        >>> asymmetric_loss(torch.zeros(1, 3), torch.tensor([[1.0, 0.0, torch.nan]]))
        tensor([0.3711])
    """
    logits, true, known = _prepared(logits, labels)
    right = torch.where(true == 1, logits.sigmoid(), (torch.sigmoid(-logits) + CLIP).clamp(max=1))  # (batch, classes)
    focus = torch.where(true == 1, GAMMA_POSITIVE, GAMMA_NEGATIVE)
    losses = -right.clamp(min=EPSILON).log() * (1 - right.detach()) ** focus
    return _summed(losses, true, known, positive_weights)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "bce": binary_cross_entropy,
    "asymmetric": asymmetric_loss,
}


def _prepared(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels without NaN, of which even a masked one would reach the gradient, and which are known."""
    known = ~labels.isnan()
    logits = at_least_float32(logits)
    return logits, torch.where(known, labels.to(logits.dtype), 0.0), known


def _summed(losses: Tensor, true: Tensor, known: Tensor, positive_weights: Tensor | None) -> Tensor:
    if positive_weights is not None:
        losses = losses * torch.where(true == 1, positive_weights.to(losses), 1.0)
    return torch.where(known, losses, 0.0).sum(dim=1)  # (batch,)


def check_positive_weights(given: PositiveWeights, n_classes: int) -> None:
    """Refuses positive weights that are none.

    Args:
        given: None, `"balanced"`, or a number from 0 for every class.
        n_classes: number of classes.

    Raises:
        ConfigError: they are something else.
    """
    if given is None or given == BALANCED:
        return
    numbers = [] if isinstance(given, str) else list(given)
    if len(numbers) != n_classes or any(isinstance(n, bool | str) or not 0 <= n < math.inf for n in numbers):
        allowed = f"'balanced', or a list of {n_classes} finite numbers from 0, in the order of the class names"
        raise ConfigError("these are no positive weights", where="positive_weights", got=given, allowed=allowed)


def positive_weights(
    given: PositiveWeights, rows: LabelledImages | LabelledStream | None, n_classes: int
) -> Tensor | None:
    """Returns by which weight the positive labels of every class count.

    `"balanced"` gives a class its negative by its positive labels in the training set, so that both weigh the same, as
    `pos_weight` of PyTorch is meant; a class without positive labels, which none is weighted by, gets 1.

    Args:
        given: what passes `check_positive_weights`.
        rows: the training set; None where there is none.
        n_classes: number of classes.

    Returns:
        `(classes,)`, float64; None for 1.

    Raises:
        ConfigError: the labels of the set cannot be counted.

    Example:
        >>> positive_weights("balanced", photos, 2)  # the first class on one of four photos, the second on two
        tensor([3., 1.], dtype=torch.float64)
    """
    if given is None or rows is None:
        return None
    if given != BALANCED:
        return torch.tensor(given, dtype=torch.float64)
    labels = rows.shown_labels if isinstance(rows, LabelledImages) else None
    if labels is None:
        remedy = "Use a datasets.Dataset with a column of labels, or give a number for every class."
        what, got = "labels of the training set cannot be counted", type(rows.rows).__name__
        raise ConfigError(what, where="positive_weights", got=got, remedy=remedy)
    positives, negatives = ((labels == value).sum(axis=0) for value in (1, 0))  # (classes,) each
    return torch.from_numpy(np.divide(negatives, positives, out=np.ones(n_classes), where=positives > 0))


class LabelLoss(TaskLoss):
    """The loss of several labels in training: with positive weights, or what the user asks for in its place.

    Args:
        loss: a key of `LOSSES`.
        weights: `(classes,)`, what `positive_weights` returned.
        function: as in `TaskLoss`.

    Raises:
        ConfigError: there is a function, and weights that it would not see.

    Example:
        >>> LabelLoss("bce")(task(**batch), batch["labels"], images=8, batch=8)
        tensor(2.0794, grad_fn=<MeanBackward0>)
    """

    def __init__(
        self, loss: str, weights: Tensor | None = None, function: Callable[..., Tensor] | None = None
    ) -> None:
        if function is not None and weights is not None:
            remedy = "Weight inside compute_loss_func, or do without it."
            what = "positive_weights are a setting of the loss that it replaces"
            raise ConfigError(what, where="compute_loss_func", remedy=remedy)
        super().__init__(function=function)
        self.of_images, self.positive_weights = LOSSES[loss], weights

    def __call__(self, outputs: Any, labels: Any, images: int, batch: int) -> Tensor:
        """Returns the loss, a mean over the images of the micro-batch, 0-dim; see `TaskLoss`."""
        if self.function is not None or self.positive_weights is None:
            return super().__call__(outputs, labels, images, batch)
        return self.of_images(outputs.logits, labels, self.positive_weights).mean()
