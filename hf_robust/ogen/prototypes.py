# SPDX-License-Identifier: Apache-2.0
"""What OGEN knows of the images of each known class: mean and standard deviation of their features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from ..errors import DataError, NonFiniteError

SMALLEST_NORM = 1e-6  # of the mean of unit vectors; below, their directions cancel


@dataclass(frozen=True)
class Prototypes:
    """The statistics of the classes' image features.

    Args:
        mean: `(classes, dim)`, float32, not normalised.
        std: `(classes, dim)`, float32, of the population: 0 for a class with one image.
        counts: `(classes,)`, images of each class.
    """

    mean: Tensor
    std: Tensor
    counts: Tensor


@torch.no_grad()
def class_prototypes(batches: Iterable[tuple[Tensor, Tensor]], class_names: Sequence[str]) -> Prototypes:
    """Computes the statistics in one pass, with sums in float64, over the batches of all ranks.

    Args:
        batches: image features `(batch, dim)` and labels `(batch,)`; each image once, on one of the ranks.
        class_names: one per class.

    Returns:
        The statistics, the same bits on all ranks.

    Raises:
        DataError: a class has no image, or the features of its images cancel to nothing.
        NonFiniteError: a feature is NaN or infinite.

    Example:
        >>> class_prototypes([(torch.eye(4), torch.tensor([0, 0, 1, 1]))], ["cat", "dog"]).mean
        tensor([[0.5000, 0.5000, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.5000, 0.5000]])
    """
    counts, sums, squares = _sums(batches, len(class_names))
    missing = [name for name, count in zip(class_names, counts.tolist(), strict=True) if count == 0]
    if missing:
        remedy = "Leave the class out, or give it images."
        raise DataError(f"{len(missing)} classes have no image", got=missing[:3], remedy=remedy)
    mean = sums / counts[:, None]  # (classes, dim)
    deviation = (squares / counts[:, None] - mean.square()).clamp_min(0).sqrt()  # (classes, dim)
    if not mean.isfinite().all():
        raise NonFiniteError("image features are not finite", remedy="Look for broken images or weights.")
    empty = [name for name, norm in zip(class_names, mean.norm(dim=1).tolist(), strict=True) if norm < SMALLEST_NORM]
    if empty:
        raise DataError("the image features of a class cancel, its prototype has no direction", got=empty[:3])
    return Prototypes(mean.float(), deviation.float(), counts)


def _sums(batches: Iterable[tuple[Tensor, Tensor]], n_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of images, sums and sums of squares of their features by class, over all ranks."""
    total = None
    for embeds, labels in batches:
        features = embeds.double()  # (batch, dim)
        rows = torch.cat([features.new_ones(len(features), 1), features, features.square()], dim=1)
        if total is None:
            total = rows.new_zeros(n_classes, rows.shape[1])  # (classes, 1 + 2 dim)
        total.index_add_(0, labels, rows)
    if total is None:
        raise DataError("no images to compute prototypes from", remedy="Use fewer processes, or more images.")
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(total)
    dim = total.shape[1] // 2
    return total[:, 0].long(), total[:, 1 : 1 + dim], total[:, 1 + dim :]
