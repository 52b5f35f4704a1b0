# SPDX-License-Identifier: Apache-2.0
"""Tensors of all ranks together, with gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def n_ranks() -> int:
    """Returns the number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Returns which of them this one is; 0 without a process group."""
    return dist.get_rank() if n_ranks() > 1 else 0


def gather_rows(tensor: Tensor, counts: list[int] | None = None) -> Tensor:
    """Returns the rows of all ranks, in their order, on every rank; on one process the tensor itself.

    The gradient of a rank's rows is the sum of what all ranks' losses have for them. Under DDP, which then takes the
    mean over ranks, a mean over ranks of losses gets the gradient that one process has for it. Every rank must take
    part, in the forward and in the backward.

    Args:
        tensor: `(rows, …)`, floating-point or not; ranks may have different numbers of rows.
        counts: what `row_counts` returned, where it has been asked.

    Returns:
        `(rows of all ranks, …)`.

    Example:
        >>> gather_rows(image_embeds).shape  # 8 rows on each of two ranks
        torch.Size([16, 512])
    """
    if n_ranks() == 1:
        return tensor
    return _Gather.apply(tensor, row_counts(tensor) if counts is None else counts)


def row_counts(tensor: Tensor) -> list[int]:
    """Returns how many rows each rank has.

    Args:
        tensor: `(rows, …)`.

    Example:
        >>> row_counts(image_embeds)
        [8, 8]
    """
    if n_ranks() == 1:
        return [len(tensor)]
    own = torch.tensor([len(tensor)], device=tensor.device)
    counts = [torch.empty_like(own) for _ in range(n_ranks())]
    dist.all_gather(counts, own)
    return torch.cat(counts).tolist()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])  # a collective needs one shape on all ranks
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total.split(ctx.counts)[dist.get_rank()], None
