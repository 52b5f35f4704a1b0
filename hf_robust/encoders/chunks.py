# SPDX-License-Identifier: Apache-2.0
"""A batch embedded in chunks, in the memory of one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError


def in_chunks(function: Callable[..., Tensor], tensors: Sequence[Tensor | None], size: int | None) -> Tensor:
    """Applies a function to a batch, chunk by chunk; the backward computes the activations of each chunk anew.

    Result and gradients are those of the whole batch at once, if the function treats rows independently. Activations
    of one chunk at most are in memory, for one forward more. Scaling Deep Contrastive Learning Batch Size under Memory
    Limited Setup (https://huggingface.co/papers/2101.06983) does by hand what autograd does here, so it holds under
    DDP, too. Dropout draws in the backward what it drew in the forward. Without gradients chunks cost nothing.

    Args:
        function: takes a chunk of every tensor, in their order, and returns `(rows, dim)`.
        tensors: each `(batch, …)`, the first one never None; None is handed on as None.
        size: rows of a chunk; None for all at once, with activations kept.

    Returns:
        `(batch, dim)`.

    Raises:
        ConfigError: `size` is no number of rows.

    Example:
        >>> in_chunks(partial(image_embeds, clip), (pixel_values, None, None), size=2).shape
        torch.Size([8, 512])
    """
    check_chunk_size(size, "size")
    rows = next(tensor for tensor in tensors if tensor is not None).shape[0]  # not len(), as torch.export follows it
    if size is None or rows <= size:
        return function(*tensors)
    parts = [[None if t is None else t[start : start + size] for t in tensors] for start in range(0, rows, size)]
    if not torch.is_grad_enabled():
        return torch.cat([function(*part) for part in parts])
    return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts])


def check_chunk_size(size: int | None, where: str) -> None:
    """Refuses what is no number of rows.

    Args:
        size: the setting; None for no chunks.
        where: its name.

    Raises:
        ConfigError: it is none.
    """
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ConfigError("no number of rows of a chunk", where=where, got=size, allowed="1 or more, or None")
