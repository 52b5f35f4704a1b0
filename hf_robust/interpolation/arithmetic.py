# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of WiSE-FT, for one tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import ConfigError, NonFiniteError

FISHER_FLOOR = 1e-8  # as in the official code


def check_alpha(alpha: float) -> float:
    """Returns α as a float.

    Args:
        alpha: the share of the way from the zero-shot to the fine-tuned weights, a fraction.

    Raises:
        ConfigError: it is no number in [0, 1].

    Example:
        >>> check_alpha(1)
        1.0
    """
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or math.isnan(alpha) or not 0 <= alpha <= 1:
        remedy = "Weights beyond the two models are not interpolated but extrapolated."
        raise ConfigError("alpha is no share of the way", got=alpha, allowed="a number in [0, 1]", remedy=remedy)
    return float(alpha)


def interpolate_tensor(
    zero_shot: Tensor, fine_tuned: Tensor, alpha: float, fishers: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Interpolates two tensors of the same shape and dtype: (1 - α) θ₀ + α θ₁, in float64 and rounded once.

    Equal entries stay as they are bit for bit, at α = 0 and α = 1 so does all of θ₀ and θ₁, and exchanging the tensors
    together with α and 1 - α changes nothing (where 1 - α is exact, as it is for α ≥ 1/2). Integers and booleans are
    those of the fine-tuned model, for α = 0 of the zero-shot one.

    WiSE-FT (Wortsman et al., CVPR 2022, https://huggingface.co/papers/2109.01903). The Fisher-weighted mean is that of
    the paper's official code: ((1 - α) F₀ θ₀ + α F₁ θ₁) / ((1 - α) F₀ + α F₁), with F at least 1e-8.

    Args:
        zero_shot: θ₀, any shape.
        fine_tuned: θ₁, of the same shape and dtype.
        alpha: the share of the way, a fraction in [0, 1].
        fishers: the diagonal Fisher information F₀ and F₁, each of the same shape.

    Returns:
        A tensor of its own, of the shape and dtype of both.

    Example:
        >>> interpolate_tensor(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]), 0.25)
        tensor([0.2500, 1.0000])
    """
    if alpha in (0, 1) or not zero_shot.is_floating_point():
        return (zero_shot if alpha == 0 else fine_tuned).detach().clone()
    tensors = zero_shot, fine_tuned, *(fishers or ())
    first, second, *weights = (tensor.detach().to(torch.float64, copy=True) for tensor in tensors)
    return interpolate_(first, second, alpha, *weights).to(zero_shot.dtype)


def interpolate_(zero_shot: Tensor, fine_tuned: Tensor, alpha: float, *fishers: Tensor) -> Tensor:
    """Does the work of `interpolate_tensor` in place: fresh memory costs ten times what the arithmetic does.

    Args:
        zero_shot: θ₀, any shape, float64; overwritten.
        fine_tuned: θ₁, of the same shape, float64; overwritten.
        alpha: the share of the way, a fraction strictly between 0 and 1.
        *fishers: none, or F₀ and F₁, each of the same shape, float64; overwritten.

    Returns:
        One of the tensors given, which holds the result.

    Example:
        >>> interpolate_(torch.zeros(2).double(), torch.ones(2).double(), 0.25)
        tensor([0.2500, 0.2500], dtype=torch.float64)
    """
    if fishers:
        first_weight, second_weight = (fisher.clamp_(min=FISHER_FLOOR) for fisher in fishers)
        second_weight.mul_(alpha)
        share = second_weight.div_(first_weight.mul_(1 - alpha).add_(second_weight))
        return zero_shot.sub_(share.mul_(torch.sub(zero_shot, fine_tuned, out=fine_tuned)))
    near, far, step = (zero_shot, fine_tuned, alpha) if alpha <= 0.5 else (fine_tuned, zero_shot, 1 - alpha)
    return near.sub_(torch.sub(near, far, out=far), alpha=step)  # keeps −0 where both are


def mean_tensor(tensors: Iterable[Tensor]) -> Tensor:
    """Averages tensors of the same shape and floating-point dtype, in float64 and rounded once.

    Equal entries stay as they are bit for bit, and of two tensors it is what `interpolate_tensor` gives at α = 1/2.

    Args:
        tensors: one or more, any shape; of a generator's, two are in memory at a time.

    Returns:
        A tensor of its own, of their shape and dtype, where the first one is.

    Example:
        >>> mean_tensor([torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])])
        tensor([0.5000, 1.0000])
    """
    tensors = iter(tensors)
    first = next(tensors)
    others = (tensor.detach().to(first.device, torch.float64, copy=True) for tensor in tensors)
    return mean_(first.detach().to(torch.float64, copy=True), others).to(first.dtype)


def mean_(mean: Tensor, others: Iterable[Tensor]) -> Tensor:
    """Does the work of `mean_tensor` in place: (n θ̄ + θ) / (n + 1), one tensor after the other.

    Args:
        mean: the first tensor, any shape, float64; overwritten.
        others: the others, of the same shape, float64; overwritten.

    Returns:
        The first tensor, which holds the result.

    Example:
        >>> mean_(torch.zeros(2).double(), [torch.ones(2).double()])
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    for count, tensor in enumerate(others, start=2):
        mean = interpolate_(mean, tensor, 1 / count)
    return mean


def is_finite(tensor: Tensor) -> bool:
    """Says whether a floating-point tensor has neither NaN nor infinity, in one pass and without memory of its size.

    Args:
        tensor: any floating-point tensor.

    Example:
        >>> is_finite(torch.tensor([1.0, float("nan")]))
        False
    """
    return tensor.numel() == 0 or all(math.isfinite(extreme) for extreme in tensor.detach().aminmax())


def check_finite(tensor: Tensor, name: str) -> None:
    """Refuses a tensor with NaN or infinity.

    Args:
        tensor: any tensor.
        name: for the message.

    Raises:
        NonFiniteError: it has one.
    """
    if tensor.is_floating_point() and not is_finite(tensor):
        bad = int((~tensor.isfinite()).sum())
        raise NonFiniteError("tensor has NaN or infinity", where=name, got=f"{bad} of {tensor.numel()} values")
