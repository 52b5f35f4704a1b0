# SPDX-License-Identifier: Apache-2.0
"""Embeddings that are compared by their directions: checked and brought to length 1."""

from __future__ import annotations

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..encoders.dual_encoder import at_least_float32
from ..errors import DataError, NonFiniteError

NO_LENGTH = 1e-12  # below it squares are lost in float32, and with them the direction


def unit_embeds(embeds: ArrayLike | Tensor, where: str) -> Tensor:
    """Returns embeddings L2-normalised, without gradient, in float32 or better.

    Args:
        embeds: `(rows, dim)`, floating-point.
        where: what they are called, for messages.

    Returns:
        `(rows, dim)`, on their device.

    Raises:
        DataError: there are none, they are no matrix of floating-point numbers, or one has length 0.
        NonFiniteError: one is NaN or infinite.

    Example:
        >>> unit_embeds([[3.0, 4.0]], "image_embeds")
        tensor([[0.6000, 0.8000]])
    """
    rows = torch.as_tensor(embeds).detach()
    if rows.ndim != 2 or not rows.numel() or not rows.is_floating_point():
        got, allowed = f"{tuple(rows.shape)} {rows.dtype}", "(rows, dim) of floating-point numbers, at least one row"
        raise DataError("not embeddings", where=where, got=got, allowed=allowed)
    rows = at_least_float32(rows)
    lengths = torch.linalg.vector_norm(rows, dim=1)  # (rows,)
    if not lengths.isfinite().all():
        raise NonFiniteError("embedding is NaN or infinite", where=f"{where}, row {_first(~lengths.isfinite())}")
    if (lengths < NO_LENGTH).any():
        raise DataError("embedding has no direction", where=f"{where}, row {_first(lengths < NO_LENGTH)}", got=0)
    return rows / lengths[:, None]


def _first(mask: Tensor) -> int:
    return int(mask.nonzero()[0])
