# SPDX-License-Identifier: Apache-2.0
"""Accuracy and calibration of a classifier, from its answers to every image."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike

from ..errors import ConfigError, DataError
from .statistics import as_correct


def accuracies(predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
    """Returns the accuracy over all images, its mean over classes, and that of the worst class.

    A class is one that occurs in `references`: those without images do not count. Macro accuracy is what
    scikit-learn calls `balanced_accuracy_score`.

    Args:
        predictions: `(images,)`, the predicted class indices.
        references: `(images,)`, the true class indices.

    Returns:
        `accuracy`, `macro_accuracy` and `worst_class_accuracy`, fractions.

    Raises:
        DataError: no images, different numbers of them, or values that are no integers.

    Example:
        >>> accuracies([0, 0, 0, 1], [0, 0, 1, 1])
        {'accuracy': 0.75, 'macro_accuracy': 0.75, 'worst_class_accuracy': 0.5}
    """
    predicted, true = np.asarray(predictions), np.asarray(references)
    if predicted.ndim != 1 or predicted.shape != true.shape or not predicted.size:
        allowed = "one index per image in both, at least one image"
        got = (predicted.shape, true.shape)
        raise DataError("predictions and references do not fit", got=got, allowed=allowed)
    for where, values in (("predictions", predicted), ("references", true)):
        if values.dtype.kind not in "iub":
            remedy = "Of logits, take argmax."
            raise DataError("not class indices", where=where, got=values.dtype.name, allowed="integers", remedy=remedy)
    correct = predicted == true  # (images,)
    _, class_of_image = np.unique(true, return_inverse=True)  # (images,)
    per_class = np.bincount(class_of_image, weights=correct) / np.bincount(class_of_image)  # (classes with images,)
    return {
        "accuracy": float(correct.mean()),
        "macro_accuracy": float(per_class.mean()),
        "worst_class_accuracy": float(per_class.min()),
    }


def expected_calibration_error(confidences: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Returns the expected calibration error: how far confidence and accuracy are apart (Guo et al. 2017).

    Images are put into bins of equal width by their confidence; a confidence on an edge is in the bin above it, and 1
    in the last one. The error is the mean over images of |accuracy - mean confidence| of their bin (arXiv 1706.04599).

    Args:
        confidences: `(images,)`, the probability of the predicted class, fractions.
        correct: `(images,)`, whether it was the true class.
        bins: their number, from 1.

    Returns:
        The error, a fraction; 0 is best.

    Raises:
        ConfigError: `bins` is no integer from 1.
        DataError: no images, different numbers of them, confidences outside [0, 1], or other values than true and
            false.

    Example:
        >>> round(expected_calibration_error([0.9, 0.9, 0.6, 0.6], [True, True, True, False]), 4)
        0.1
    """
    if not isinstance(bins, int) or bins < 1:
        raise ConfigError("bins is out of range", got=bins, allowed="integers from 1")
    values, right = np.asarray(confidences, dtype=np.float64), as_correct(correct, "correct")
    if values.shape != right.shape:
        got = (values.shape, right.shape)
        raise DataError("confidences and correct do not fit", got=got, allowed="one value per image in both")
    wrong = values[~((values >= 0) & (values <= 1))]  # NaN too
    if wrong.size:
        raise DataError("confidence is no fraction", where="confidences", got=float(wrong[0]), allowed="[0, 1]")
    from torchmetrics.functional.classification import binary_calibration_error  # slow to import

    # torchmetrics has an extra bin for confidences of exactly 1, which logits far apart do give
    below_one = torch.from_numpy(np.minimum(values, np.nextafter(1, 0)))
    return binary_calibration_error(below_one, torch.from_numpy(right).long(), n_bins=bins).item()
