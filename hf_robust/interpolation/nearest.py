# SPDX-License-Identifier: Apache-2.0
"""How far embeddings are from the nearest of many others: exact, in chunks of bounded memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROWS_AT_ONCE = 16_384  # of the others; 32 MiB in float32 with 512 dimensions


@torch.no_grad()
def kth_squared_distance(queries: Tensor, others: Tensor, k: int, rows_at_once: int = ROWS_AT_ONCE) -> Tensor:
    """Returns the squared Euclidean distance of every query to its k-th nearest of the others.

    Args:
        queries: `(queries, dim)`, in float32 or better.
        others: `(others, dim)`, on any device, in any precision, also mapped from a file; a chunk at a time is read.
        k: from 1 for the nearest to the number of others; 0 where there are none, from which everything is infinitely
            far.
        rows_at_once: of the others.

    Returns:
        `(queries,)`.

    Example:
        >>> kth_squared_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), k=2)
        tensor([2.])
    """
    if k == 0:
        return queries.new_full((len(queries),), math.inf)
    own_squares = queries.square().sum(dim=1, keepdim=True)  # (queries, 1)
    nearest = queries.new_empty(len(queries), 0)
    for start in range(0, len(others), rows_at_once):
        chunk = others[start : start + rows_at_once].to(queries)  # (rows, dim)
        with torch.autocast(queries.device.type, enabled=False):
            squared = own_squares + chunk.square().sum(dim=1) - 2 * queries @ chunk.T  # (queries, rows)
        nearest = torch.cat([nearest, squared], dim=1)
        nearest = nearest.topk(min(k, nearest.shape[1]), dim=1, largest=False).values  # in rising order
    return nearest[:, k - 1].clamp(min=0)
