# SPDX-License-Identifier: Apache-2.0
"""The temperature at which a classifier is as confident, on average, as it is accurate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import bisect
from torch import Tensor

from ..errors import DataError, NonFiniteError

LOWEST, HIGHEST, TOLERANCE = 0.1, 10.0, 1e-3  # the released code's bracket and gap


@dataclass(frozen=True)
class Temperature:
    """What logits are divided by before their softmax.

    Args:
        value: the divisor, within 0.1 and 10.
        gap: mean confidence minus accuracy that is left; above 0.001 only where `value` is an end of the bracket.
    """

    value: float
    gap: float

    @property
    def is_root(self) -> bool:
        """Whether confidence and accuracy are the same there, to 0.001."""
        return abs(self.gap) <= TOLERANCE


def fit_temperature(logits: Tensor, labels: Tensor) -> Temperature:
    """Finds T with mean max softmax(logits / T) = accuracy, by bisection in [0.1, 10].

    Confidence falls with T, so there is one root at most; where the bracket has none, T is the end nearer to it. The
    released code of VRF recurses until the gap is 1e-3, without end where the accuracy is 0 or 1; here the root is
    found to 1e-6.

    Args:
        logits: `(images, classes)`.
        labels: `(images,)`, the right classes.

    Raises:
        DataError: there are no images.
        NonFiniteError: a logit is NaN or infinite.

    Example:
        >>> fit_temperature(torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [0.0, 4.0]]), torch.tensor([0, 0, 0, 0]))
        Temperature(value=3.640957..., gap=...)
    """
    if len(logits) == 0:
        raise DataError("a temperature needs labelled images", where="validation", got=0, allowed="at least one image")
    if not logits.isfinite().all():
        raise NonFiniteError("logits are NaN or infinite", where="validation")
    accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
    below_best = logits - logits.amax(dim=1, keepdim=True)  # (images, classes)

    def gap(temperature: float) -> float:
        confidences = 1 / (below_best / temperature).exp().sum(dim=1, dtype=torch.float64)  # (images,), max softmax
        return confidences.mean().item() - accuracy

    if gap(LOWEST) <= 0:
        value = LOWEST
    elif gap(HIGHEST) >= 0:
        value = HIGHEST
    else:
        value = float(bisect(gap, LOWEST, HIGHEST, xtol=1e-6))
    return Temperature(value, gap(value))
