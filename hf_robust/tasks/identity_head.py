# SPDX-License-Identifier: Apache-2.0
"""The head of identities: a row for each, compared with embeddings under a margin, and where the rows start."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, DataError, NonFiniteError, needs_extra

if TYPE_CHECKING:
    from pytorch_metric_learning.losses import ArcFaceLoss, CosFaceLoss

SMALLEST_NORM = 1e-6  # of the mean of unit vectors; below, their directions cancel
MARGINS = {"cosine": 0.0, "cosface": 0.35, "arcface": 0.5}


def identity_head(
    identities: int, dim: int, loss: str, scale: float, margin: float | None, like: Tensor
) -> ArcFaceLoss | CosFaceLoss:
    """Builds a head whose rows are 0, without a draw from the global generators.

    Args:
        identities: number of rows.
        dim: of the embeddings.
        loss: `"cosine"`, `"cosface"` or `"arcface"`.
        scale: what cosines are multiplied by.
        margin: of a cosine for `"cosface"`, in radians for `"arcface"`; None for the paper's.
        like: a tensor of the encoder, whose device and, from float32 on, dtype it has.

    Returns:
        What gives the mean loss of embeddings `(batch, dim)` with labels `(batch,)`; its `W` is `(dim, identities)`.

    Raises:
        ConfigError: the loss is unknown, scale or margin out of range, or `pytorch-metric-learning` not installed.

    Example:
        >>> identity_head(1000, 512, "cosface", 64.0, None, torch.zeros(())).W.shape
        torch.Size([512, 1000])
    """
    if loss not in MARGINS:
        allowed = ", ".join(map(repr, MARGINS))
        raise ConfigError("unknown loss of identities", where="loss", got=loss, allowed=allowed)
    if not _is_number(scale) or not 0 < scale < math.inf:
        raise ConfigError("scale is out of range", where="scale", got=scale, allowed="(0, ∞)")
    if margin is not None and loss == "cosine":
        remedy = "Leave it out, or set loss='cosface'."
        raise ConfigError("the cosine loss has no margin", where="margin", got=margin, remedy=remedy)
    margin = MARGINS[loss] if margin is None else margin
    if not _is_number(margin) or not 0 <= margin < (math.pi / 2 if loss == "arcface" else 1):
        allowed = "[0, π/2), radians" if loss == "arcface" else "[0, 1)"
        raise ConfigError("margin is out of range", where="margin", got=margin, allowed=allowed)
    with needs_extra("identities"):
        from pytorch_metric_learning.losses import CosFaceLoss

        from .arcface import FiniteArcFace
    kind, own = (FiniteArcFace, math.degrees(margin)) if loss == "arcface" else (CosFaceLoss, margin)
    head = kind(identities, dim, margin=own, scale=scale, weight_init_func=nn.init.zeros_)
    return head.to(like.device, torch.promote_types(like.dtype, torch.float32))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@torch.no_grad()
def mean_directions(batches: Iterable[tuple[Tensor, Tensor]], identities: int, accelerator: Accelerator) -> Tensor:
    """Returns the direction of each identity's mean embedding, over the batches of all ranks.

    Args:
        batches: embeddings `(batch, dim)` and labels `(batch,)`; each image once, on one of the ranks.
        identities: number of identities.
        accelerator: adds up what ranks have found.

    Returns:
        `(identities, dim)`, L2-normalised, in float32; the same bits on all ranks.

    Raises:
        DataError: an identity has no image, or the embeddings of its images cancel to nothing.
        NonFiniteError: an embedding is NaN or infinite.

    Example:
        >>> mean_directions([(torch.eye(2)[[0, 0, 1]], torch.tensor([0, 0, 1]))], 2, Accelerator())
        tensor([[1., 0.],
                [0., 1.]])
    """
    total = None
    for embeds, labels in batches:
        rows = F.pad(
            embeds.cpu().double(), (1, 0), value=1.0
        )  # (batch, 1 + dim), summed on the CPU, where order holds
        if total is None:
            total = rows.new_zeros(identities, rows.shape[1])
        total.index_add_(0, labels.cpu(), rows)
    if total is None:
        raise DataError("no images to start the head from", remedy="Use fewer processes, or more images.")
    if accelerator.num_processes > 1:
        total = accelerator.reduce(total.to(accelerator.device))
    counts, means = total[:, 0], total[:, 1:] / total[:, :1]  # (identities,), (identities, dim)
    if not (counts > 0).all():
        got = (counts == 0).nonzero()[:, 0].tolist()
        raise DataError(f"{len(got)} identities have no image", where="labels", got=got)
    if not means.isfinite().all():
        raise NonFiniteError("image embeddings are not finite", remedy="Look for broken images or weights.")
    if not (means.norm(dim=1) > SMALLEST_NORM).all():
        got = (means.norm(dim=1) <= SMALLEST_NORM).nonzero()[:, 0].tolist()
        raise DataError("the embeddings of an identity's images cancel, its row has no direction", got=got)
    return F.normalize(means, dim=1).float()
