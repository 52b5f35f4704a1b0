# SPDX-License-Identifier: Apache-2.0
"""The similarity loss: how far embeddings have moved from those of the pre-trained model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..encoders.dual_encoder import at_least_float32
from ..errors import ConfigError, DataError


def _cosine(tuned: Tensor, reference: Tensor) -> Tensor:
    # 1 - cos(u, v) = ||u - v||² / 2 of unit vectors, and this form is exactly 0 where they are equal
    return (F.normalize(tuned, dim=-1) - F.normalize(reference, dim=-1)).square().sum(dim=-1) / 2  # (batch,)


def _l2(tuned: Tensor, reference: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tuned - reference, dim=-1)  # (batch,); its gradient at 0 is 0, that of sqrt is NaN


def _mse(tuned: Tensor, reference: Tensor) -> Tensor:
    return (tuned - reference).square().mean(dim=-1)  # (batch,)


def _l1(tuned: Tensor, reference: Tensor) -> Tensor:
    return (tuned - reference).abs().mean(dim=-1)  # (batch,)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cosine": _cosine, "l2": _l2, "mse": _mse, "l1": _l1}
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
}
TOWERS = ("vision", "text", "both")


class SimilarityLoss(nn.Module):
    """The mean distance between the embeddings of the tuned and of the pre-trained model.

    Added to the loss of the task, λ mean_i d(f_θ(x_i), f_θ₀(x_i)), it holds the embeddings of the training data near
    to where the pre-trained model had them. Nothing pulls at θ₀, where the distance is smallest.

    Minimizing Embedding Distortion for Robust Out-of-Distribution Performance (Shaked, Goldman and Shayer, ECCV 2024
    workshop, https://huggingface.co/papers/2409.07582). Which distance d and which weight λ the paper uses is not
    known to us, nor whether λ changes during training; choose yours on validation data.

    Args:
        distance: `"cosine"`, one minus the cosine similarity; `"l2"`, the norm of the difference; `"mse"` and `"l1"`,
            the mean of the squared and of the absolute difference over `dim`.
        weight: λ at the start of training, not negative.
        towers: whose embeddings are held: those of images (`"vision"`), of class prompts (`"text"`) or `"both"`.
        schedule: how λ goes on: `"constant"`, `"linear"` to 0, or `"cosine"` to 0.

    Raises:
        ConfigError: an argument is none of these.

    Example:
        >>> similarity = SimilarityLoss(weight=0.5, schedule="linear")
        >>> distance = similarity(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        >>> similarity.weight_at(0.5) * distance
        tensor(0.2500)
    """

    def __init__(
        self,
        distance: Literal["cosine", "l2", "mse", "l1"] = "cosine",
        weight: float = 1.0,
        towers: Literal["vision", "text", "both"] = "vision",
        schedule: Literal["constant", "linear", "cosine"] = "constant",
    ) -> None:
        super().__init__()
        _check_known("distance", distance, tuple(DISTANCES))
        _check_known("towers", towers, TOWERS)
        _check_known("schedule", schedule, tuple(SCHEDULES))
        _check_number("similarity weight is no finite weight", weight, math.inf, "a finite number from 0")
        self.distance, self.weight, self.towers, self.schedule = distance, float(weight), towers, schedule

    def forward(self, tuned: Tensor, reference: Tensor) -> Tensor:
        """Returns the mean distance, without its weight; exactly 0, with a gradient of 0, where both are equal.

        Args:
            tuned: `(batch, dim)`, embeddings of the model that is trained.
            reference: `(batch, dim)`, those of the pre-trained model for the same inputs; gets no gradient.

        Returns:
            0-dim, in float32 or better.

        Raises:
            DataError: the shapes differ, or are not `(batch, dim)`.
        """
        if tuned.ndim != 2 or tuned.shape != reference.shape or tuned.numel() == 0:
            got = tuple(tuned.shape), tuple(reference.shape)
            raise DataError("embeddings do not pair", got=got, allowed="two of the same shape (batch, dim), not empty")
        distances = DISTANCES[self.distance](at_least_float32(tuned), at_least_float32(reference.detach()))  # (batch,)
        return distances.mean()

    def weight_at(self, progress: float) -> float:
        """Returns λ at a point of training.

        Args:
            progress: what has been done of the training, a fraction.

        Raises:
            ConfigError: it is no number in [0, 1].

        Example:
            >>> SimilarityLoss(weight=2.0, schedule="cosine").weight_at(0.5)
            1.0
        """
        _check_number("progress is no fraction", progress, 1, "a number in [0, 1]")
        return self.weight * SCHEDULES[self.schedule](progress)

    def extra_repr(self) -> str:
        """Shows the settings in the module's `repr`."""
        return f"{self.distance}, weight={self.weight}, towers={self.towers}, schedule={self.schedule}"


def _check_known(argument: str, got: str, allowed: tuple[str, ...]) -> None:
    if got not in allowed:
        raise ConfigError(f"unknown similarity {argument}", got=got, allowed=", ".join(map(repr, allowed)))


def _check_number(what: str, got: float, largest: float, allowed: str) -> None:
    if isinstance(got, bool) or not isinstance(got, int | float) or not 0 <= got <= largest or got == math.inf:
        raise ConfigError(what, got=got, allowed=allowed)
