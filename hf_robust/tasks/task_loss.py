# SPDX-License-Identifier: Apache-2.0
"""The loss that training minimises: the task's own, or what the user asks for in its place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.rows import LabelledStream, labelled_images
from ..errors import ConfigError

BALANCED = "balanced"


def check_plain(class_weights: Any, label_smoothing: float, task: str) -> None:
    """Refuses settings of the cross-entropy for a task without one.

    Args:
        class_weights: the setting.
        label_smoothing: likewise.
        task: its name.

    Raises:
        ConfigError: there are any.
    """
    if class_weights is not None or label_smoothing > 0:
        what = "class_weights and label_smoothing_factor are settings of the cross-entropy of class names"
        raise ConfigError(what, where=f"task={task!r}", got=(class_weights, label_smoothing))


def check_loss_settings(class_weights: str | Sequence[Any] | None, label_smoothing: float) -> None:
    """Refuses class weights and a label smoothing that are none.

    Args:
        class_weights: None, `"balanced"` or a number from 0 for every class.
        label_smoothing: a fraction.

    Raises:
        ConfigError: one is something else.
    """
    if not 0 <= label_smoothing < 1:
        what, allowed = "label smoothing is out of range", "[0, 1)"
        raise ConfigError(what, where="label_smoothing_factor", got=label_smoothing, allowed=allowed)
    if class_weights is None or class_weights == BALANCED:
        return
    numbers = [] if isinstance(class_weights, str) else class_weights
    if not numbers or any(isinstance(n, bool | str) or not 0 <= n < math.inf for n in numbers):
        allowed = "'balanced', or a list of one finite number from 0 for every class"
        raise ConfigError("these are no class weights", where="class_weights", got=class_weights, allowed=allowed)


def class_weights(given: str | Sequence[float] | None, dataset: Any, n_classes: int) -> Tensor | None:
    """Returns the weight of every class, such that the mean weight of the training images is 1.

    `"balanced"` gives a class n / (classes * images of the class), as scikit-learn does; numbers w are multiplied by
    n / Σ_i w[label of image i]. A class without training images, which no image is weighted by, has weight 0 under
    `"balanced"` and is not counted among the classes.

    Args:
        given: None, `"balanced"` or a number for every class.
        dataset: the training set.
        n_classes: number of classes.

    Returns:
        `(classes,)`, float64; None for no weights.

    Raises:
        ConfigError: there are more or fewer numbers than classes, all images have weight 0, or the labels of the
            dataset cannot be counted.

    Example:
        >>> class_weights("balanced", photos, 2)  # three of the first class, one of the second
        tensor([0.6667, 2.0000], dtype=torch.float64)
    """
    if given is None or dataset is None:
        return None
    counts = np.bincount(_labels(dataset), minlength=n_classes)  # (classes,)
    if given == BALANCED:
        weights = np.divide(1.0, counts, out=np.zeros(n_classes), where=counts > 0)
    else:
        weights = np.asarray(given, dtype=np.float64)
    if len(weights) != n_classes:
        what, allowed = "class weights do not fit the classes", f"{n_classes} numbers, in the order of the class names"
        raise ConfigError(what, where="class_weights", got=len(weights), allowed=allowed)
    total = (counts * weights).sum()
    if total == 0:
        raise ConfigError("every training image has weight 0", where="class_weights", got=given)
    return torch.from_numpy(weights * (counts.sum() / total))


def _labels(dataset: Any) -> np.ndarray:
    rows = labelled_images(dataset, "train_dataset")
    if isinstance(rows, LabelledStream):
        what, got = "labels of a dataset without length cannot be counted", type(rows.rows).__name__
        remedy = "Use a dataset with numbered rows, or a compute_loss_func with weights of your own."
        raise ConfigError(what, where="class_weights", got=got, remedy=remedy)
    known = rows.shown_labels
    return np.array([rows[row]["label"] for row in range(len(rows))]) if known is None else known


class TaskLoss:
    """The loss of the classification in training: the classifier's own, or what the user asks for in its place.

    With weights w and label smoothing it is the mean over images of `F.cross_entropy(logits, labels, weight=w,
    label_smoothing=...)` without reduction. As the mean weight of the training images is 1, it is as large as without
    weights, and a mean over images, so that accumulated micro-batches and ranks equal one big batch.

    A `compute_loss_func(outputs, labels, num_items_in_batch=...)` is called as by `Trainer`: it returns the sum over
    the images of the micro-batch, divided by `num_items_in_batch`, the images of the whole optimizer step (all
    micro-batches of all ranks).

    Args:
        weights: `(classes,)`, what `class_weights` returned.
        label_smoothing: a fraction.
        function: what the user gave as `compute_loss_func`.

    Raises:
        ConfigError: there is a function, and settings that it would not see.

    Example:
        >>> TaskLoss(label_smoothing=0.1)(classifier(**batch), batch["labels"], images=8, batch=8)
        tensor(0.6543, grad_fn=<MeanBackward0>)
    """

    def __init__(
        self,
        weights: Tensor | None = None,
        label_smoothing: float = 0.0,
        function: Callable[..., Tensor] | None = None,
    ) -> None:
        if function is not None and (weights is not None or label_smoothing > 0):
            remedy = "Weight and smooth inside compute_loss_func, or do without it."
            what = "class_weights and label_smoothing_factor are settings of the loss that it replaces"
            raise ConfigError(what, where="compute_loss_func", remedy=remedy)
        self.weights, self.label_smoothing, self.function = weights, label_smoothing, function

    def __call__(self, outputs: Any, labels: Any, images: int, batch: int) -> Tensor:
        """Returns the loss, a mean over the images of the micro-batch, 0-dim.

        Args:
            outputs: what the task returned.
            labels: what of the batch says what is right; None where the task needs nothing.
            images: images of the optimizer step, on all ranks together.
            batch: images of the micro-batch.

        Raises:
            ConfigError: the user's function does not return a number.
        """
        if self.function is not None:
            share = self.function(outputs, labels, num_items_in_batch=torch.tensor(images, device=outputs.loss.device))
            if not isinstance(share, Tensor) or share.ndim > 0:
                got = tuple(share.shape) if isinstance(share, Tensor) else type(share).__name__
                allowed = "a 0-dim tensor, the sum over the images divided by num_items_in_batch"
                raise ConfigError("no loss was returned", where="compute_loss_func", got=got, allowed=allowed)
            return share * (images / batch)
        if self.weights is None and self.label_smoothing == 0:
            return outputs.loss
        weights = None if self.weights is None else self.weights.to(outputs.logits)
        how: Any = {"weight": weights, "label_smoothing": self.label_smoothing, "reduction": "none"}
        return F.cross_entropy(outputs.logits, labels, **how).mean()
