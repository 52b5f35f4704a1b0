# SPDX-License-Identifier: Apache-2.0
"""How well scores tell which of several labels an image has: mean average precision, and F1 at a threshold."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import ArrayLike

from ..errors import ConfigError, DataError, NonFiniteError


def label_metrics(
    scores: ArrayLike | torch.Tensor, targets: ArrayLike | torch.Tensor, threshold: float
) -> dict[str, float]:
    """Returns mean average precision and F1, over classes (macro) and over all labels at once (micro).

    A class without an image that has it has neither average precision nor F1: both macro means leave it out, and how
    many were left out is returned. Average precision is scikit-learn's, in which tied scores count as one rank.

    Args:
        scores: `(images, classes)`, of any scale: logits or probabilities.
        targets: `(images, classes)`, 1 or 0, and -1 or NaN where it is not known; these count nowhere.
        threshold: the least score that says an image has a label, see `best_threshold`. Logits have 0 where
            probabilities have 0.5.

    Returns:
        `mAP_macro`, `mAP_micro`, `f1_macro` and `f1_micro`, fractions, and `classes_without_positives`, a count.

    Raises:
        ConfigError: `threshold` is no finite number.
        DataError: no images, different shapes, other targets than these, or no class that an image has.
        NonFiniteError: a score is NaN or infinite.

    Example:
        >>> found = label_metrics([[2.0, -1.0], [1.0, 3.0], [-1.0, 1.0]], [[1, 0], [0, 1], [0, 1]], threshold=0.0)
        >>> found["mAP_macro"], round(found["mAP_micro"], 4), round(found["f1_micro"], 4)
        (1.0, 0.9167, 0.8571)
    """
    if not math.isfinite(threshold):
        raise ConfigError("threshold is no number", got=threshold, allowed="finite numbers")
    from sklearn.metrics import average_precision_score  # slow to import

    values, true, known = _checked(scores, targets)
    counted = np.flatnonzero(true.any(axis=0))  # (classes with a positive,)
    precisions = [average_precision_score(true[known[:, c], c], values[known[:, c], c]) for c in counted]
    said = (values >= threshold) & known  # (images, classes)
    hits, guesses, positives = (mask.sum(axis=0) for mask in (said & true, said, true))  # (classes,) each
    f1 = 2 * hits[counted] / (guesses + positives)[counted]  # (classes with a positive,)
    return {
        "mAP_macro": float(np.mean(precisions)),
        "mAP_micro": float(average_precision_score(true[known], values[known])),
        "f1_macro": float(f1.mean()),
        "f1_micro": float(2 * hits.sum() / (guesses.sum() + positives.sum())),
        "classes_without_positives": true.shape[1] - len(counted),
    }


def best_threshold(scores: ArrayLike | torch.Tensor, targets: ArrayLike | torch.Tensor) -> float:
    """Returns the threshold that gives the best micro F1 on these images; choose it on validation data.

    Args:
        scores: `(images, classes)`, as in `label_metrics`.
        targets: `(images, classes)`, likewise.

    Returns:
        One of the scores: an image has a label if its score is that high. Of several that are as good, the highest.

    Raises:
        DataError: as in `label_metrics`.
        NonFiniteError: a score is NaN or infinite.

    Example:
        >>> best_threshold([[2.0, -1.0], [1.0, 3.0], [-1.0, 1.5]], [[1, 0], [0, 1], [0, 1]])
        1.5
    """
    values, true, known = _checked(scores, targets)
    thresholds, index = np.unique(values[known], return_inverse=True)  # (thresholds,), ascending, and (known,)
    positives = np.bincount(index[true[known]], minlength=len(thresholds))  # (thresholds,)
    guesses = np.bincount(index)[::-1].cumsum()  # (thresholds,), descending from here
    f1 = 2 * positives[::-1].cumsum() / (guesses + true.sum())
    return float(thresholds[::-1][f1.argmax()])


def _checked(
    scores: ArrayLike | torch.Tensor, targets: ArrayLike | torch.Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    values, given = (torch.as_tensor(rows, dtype=torch.float64).detach().cpu().numpy() for rows in (scores, targets))
    if values.ndim != 2 or values.shape != given.shape or not values.size:
        allowed = "(images, classes) for both, at least one image"
        raise DataError("scores and targets do not fit", got=(values.shape, given.shape), allowed=allowed)
    unknown, true = np.isnan(given) | (given == -1), given == 1  # (images, classes)
    other = given[~(unknown | true | (given == 0))]
    if other.size:
        allowed = "1 and 0, and -1 or NaN where not known"
        raise DataError("target is no label", where="targets", got=float(other[0]), allowed=allowed)
    if not true.any():
        raise DataError("no image has a label", where="targets", allowed="at least one 1")
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise NonFiniteError("score is NaN or infinite", where=f"scores, row {row}")
    return values, true, ~unknown
