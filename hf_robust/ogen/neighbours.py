# SPDX-License-Identifier: Apache-2.0
"""Which classes OGEN generates a feature from, and for which."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import DataError


@torch.no_grad()
def nearest_base_classes(mean: Tensor, k: int) -> Tensor:
    """Returns the neighbours of each known class among the others, by the dot product of their image prototypes.

    Args:
        mean: `(classes, dim)`, prototypes, not normalised, as in OGEN's released code.
        k: number of neighbours.

    Returns:
        `(classes, k)`, indices of classes, the nearest first and the lower index first of equals.

    Raises:
        DataError: there are not `k` other classes.

    Example:
        >>> nearest_base_classes(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), k=1).tolist()
        [[1], [0], [1]]
    """
    if len(mean) < k + 1:
        what = "too few known classes to generate features from"
        remedy = "Set OGENConfig(neighbours=...) lower, or train on more classes."
        raise DataError(what, got=len(mean), allowed=f"at least {k + 1} for neighbours={k}", remedy=remedy)
    similarity = (mean @ mean.T).fill_diagonal_(-torch.inf)  # (classes, classes)
    return _largest(similarity, k)


@torch.no_grad()
def nearest_new_classes(base_embeds: Tensor, new_embeds: Tensor, k: int) -> Tensor:
    """Returns the new classes nearest to each known class, by the cosine of their text features.

    Args:
        base_embeds: `(base classes, dim)`.
        new_embeds: `(new classes, dim)`.
        k: number of neighbours.

    Returns:
        `(base classes, k)`, indices of new classes, the nearest first and the lower index first of equals.

    Raises:
        DataError: there are not `k` new classes.

    Example:
        >>> nearest_new_classes(torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), k=1).tolist()
        [[1], [0]]
    """
    if len(new_embeds) < k:
        remedy = "Set OGENConfig(neighbours=...) lower, or name more new classes."
        raise DataError("too few new classes", got=len(new_embeds), allowed=f"at least {k}", remedy=remedy)
    return _largest(F.normalize(base_embeds, dim=-1) @ F.normalize(new_embeds, dim=-1).T, k)


def _largest(similarity: Tensor, k: int) -> Tensor:
    return similarity.sort(dim=1, descending=True, stable=True).indices[:, :k]  # topk breaks ties as it likes
