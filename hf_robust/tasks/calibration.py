# SPDX-License-Identifier: Apache-2.0
"""From cosine similarities to probabilities: the scale and the bias of a sigmoid, by logistic regression."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from accelerate import Accelerator
from scipy.optimize import brentq
from scipy.special import expit
from torch import Tensor

from ..errors import DataError

BINS = 1 << 16  # of cosines: half a bin is at most 0.0016 of a logit
SMALLEST, LARGEST = 1.0, 100.0  # scales; below, next to no gradient would reach the encoder; CLIP's own cap
FAR = 50.0  # beyond a logit of this size a probability is 0 or 1


def fit_sigmoid(batches: Iterable[tuple[Tensor, Tensor]], accelerator: Accelerator) -> tuple[float, float]:
    """Fits the scale s and the bias β of probabilities sigmoid(s cos + β), so that their mean is the base rate.

    s is the slope of the logistic regression of the labels on the cosines, over all pairs of image and class whose
    label is known, as Platt scaling has it: with (N₊ + 1) / (N₊ + 2) and 1 / (N₋ + 2) in the place of 1 and 0, without
    which it would be infinite where the two are apart. It is kept within 1 and 100. β is then such that the mean of
    the probabilities is the share of positive labels, to the last digits of float64.

    Only numbers of pairs in bins of cosines are kept and summed over all ranks, so that memory is bounded and the
    result the same however images are spread over batches and ranks.

    Platt scaling (Platt 1999, "Probabilistic outputs for support vector machines").

    Args:
        batches: cosines and labels, `(batch, classes)` each, of this rank's share of the images; labels are 1, 0, or
            NaN where not known.
        accelerator: adds up what the ranks have counted.

    Returns:
        s and β.

    Raises:
        DataError: all known labels are the same, or there are none.

    Example:
        >>> cosines, labels = torch.tensor([[0.31, 0.22], [0.24, 0.27]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        >>> fit_sigmoid([(cosines, labels)], Accelerator())
        (24.568189781215953, -7.6510426862066625)
    """
    counts = torch.zeros(2, BINS, dtype=torch.int64, device=accelerator.device)
    for cosines, labels in batches:
        bins = ((cosines + 1) * (BINS / 2)).long().clamp(0, BINS - 1)  # (batch, classes)
        for row, value in zip(counts, (0, 1), strict=True):
            row += torch.bincount(bins[labels == value], minlength=BINS)
    return _fitted(accelerator.reduce(counts, "sum").cpu().numpy())


def _fitted(counts: np.ndarray) -> tuple[float, float]:
    filled = counts.any(axis=0)
    centres = (np.flatnonzero(filled) + 0.5) * (2 / BINS) - 1  # (filled bins,)
    negatives, positives = counts[:, filled].astype(np.float64)  # (filled bins,) each
    known, rate = negatives + positives, positives.sum() / counts.sum() if counts.any() else 0.0
    if not 0 < rate < 1:
        got = f"{int(positives.sum())} positive labels, {int(negatives.sum())} negative ones"
        raise DataError("labels are all the same, so there is no base rate to fit", got=got, allowed="some of both")
    scale = min(max(_slope(centres, negatives, positives), SMALLEST), LARGEST)

    def excess(bias: float) -> float:
        return float(known @ expit(scale * centres + bias) / known.sum() - rate)

    bias = brentq(excess, -scale - FAR, scale + FAR, xtol=1e-12)
    return scale, float(bias)


def _slope(centres: np.ndarray, negatives: np.ndarray, positives: np.ndarray) -> float:
    from sklearn.linear_model import LogisticRegression  # slow to import

    hit, false = (positives.sum() + 1) / (positives.sum() + 2), 1 / (negatives.sum() + 2)  # the two targets
    weight = hit * positives + false * negatives  # (filled bins,)
    weights = np.concatenate([weight, positives + negatives - weight])
    answers = np.repeat([1, 0], len(centres))
    regression = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-8)
    regression.fit(np.tile(centres, 2)[:, None], answers, weights)
    return float(regression.coef_[0, 0])
