# SPDX-License-Identifier: Apache-2.0
"""SigLIP 2's positions for images of any shape, as one formula that can be exported."""

from __future__ import annotations

import torch
from torch import Tensor


def resized_positions(positions: Tensor, spatial_shapes: Tensor, max_length: int) -> Tensor:
    """Resizes a grid of positions to the shape of every image, as `Siglip2VisionEmbeddings` does.

    transformers asks `F.interpolate` image by image, which fixes shapes and batch size in a graph. Its bilinear filter
    with antialiasing is a triangle, wider where the grid shrinks, with weights that are normalised at the borders.

    Args:
        positions: `(height, width, dim)`.
        spatial_shapes: `(batch, 2)`, height and width of every image in patches.
        max_length: patches, those of padding included, which get the position of the first one.

    Returns:
        `(batch, max_length, dim)`.

    Example:
        >>> resized_positions(torch.rand(16, 16, 768), torch.tensor([[10, 20], [16, 16]]), 256).shape
        torch.Size([2, 256, 768])
    """
    height, width = spatial_shapes[:, :1], spatial_shapes[:, 1:]  # (batch, 1) each
    place = torch.arange(max_length, device=spatial_shapes.device)
    place = torch.where(place < height * width, place, 0)  # (batch, max_length)
    vertical = _weights(place // width, height, positions.shape[0])  # (batch, max_length, rows of the grid)
    horizontal = _weights(place % width, width, positions.shape[1])
    weights = (vertical.unsqueeze(-1) * horizontal.unsqueeze(-2)).flatten(-2)  # (batch, max_length, grid)
    return weights.to(positions.dtype) @ positions.flatten(0, 1)


def _weights(place: Tensor, size: Tensor, grid: int) -> Tensor:
    scale = grid / size  # (batch, 1), steps of the grid for one of the image
    centre = (place + 0.5) * scale  # (batch, max_length)
    distance = (torch.arange(grid, device=place.device) + 0.5 - centre.unsqueeze(-1)).abs()
    triangle = (1 - distance / scale.clamp(min=1).unsqueeze(-1)).clamp(min=0)
    return triangle / triangle.sum(dim=-1, keepdim=True)
