# SPDX-License-Identifier: Apache-2.0
"""The similarity loss: how far embeddings have moved from those of the pre-trained model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..encoders.dual_encoder import at_least_float32
from ..errors import ConfigError, DataError
from ..tasks.class_names import ZeroShotClassifier
from ..tasks.task import Task
from .learning import learns
from .reference import BatchReference
from .term import Term, check_known


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
TOWERS = ("vision", "text", "both")


class SimilarityLoss(Term):
    """The mean distance between the embeddings of the tuned and of the pre-trained model.

    Added to the loss of the task, λ mean_i d(f_θ(x_i), f_θ₀(x_i)), it holds the embeddings of the training data near
    to where the pre-trained model had them. Nothing pulls at θ₀, where the distance is smallest.

    Minimizing Embedding Distortion for Robust Out-of-Distribution Performance (Shaked, Goldman and Shayer, ECCV 2024
    workshop, https://huggingface.co/papers/2409.07582). Which distance d and which weight λ the paper uses is not
    known to us, nor whether λ changes during training; choose yours on validation data.

    Args:
        weight: λ at the start of training, a finite number from 0.
        distance: `"cosine"`, one minus the cosine similarity; `"l2"`, the norm of the difference; `"mse"` and `"l1"`,
            the mean of the squared and of the absolute difference over `dim`. `"l2"` and `"l1"` pull with full
            strength however small a difference is, so with cached embeddings they follow rounding in the first step.
        towers: whose embeddings are held: those of images (`"vision"`), of texts (`"text"`) or `"both"`. The texts are
            the class prompts, or, in a task with texts in its rows, those of the batch.
        schedule: how λ goes on: `"constant"`, `"linear"` to 0, or `"cosine"` to 0.

    Raises:
        ConfigError: an argument is none of these.

    Example:
        >>> trainer = RobustTrainer(model, args, losses=[SimilarityLoss(weight=10.0)], ...)
        >>> SimilarityLoss().between(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor(1.)
    """

    name = "similarity"

    def __init__(
        self,
        weight: float = 1.0,
        distance: Literal["cosine", "l2", "mse", "l1"] = "cosine",
        towers: Literal["vision", "text", "both"] = "vision",
        schedule: Literal["constant", "linear", "cosine"] = "constant",
    ) -> None:
        super().__init__(weight, schedule)
        check_known("distance", distance, tuple(DISTANCES))
        check_known("towers", towers, TOWERS)
        self.distance, self.towers = distance, towers

    def attach(self, task: Task) -> None:
        """Refuses a task whose text tower is not trained, if it is to be held.

        Args:
            task: the task.

        Raises:
            ConfigError: its embeddings cannot move.
        """
        if self.towers != "vision" and not _learns_texts(task):
            what = "the text tower is not trained, so its embeddings cannot move"
            remedy = "Take towers='vision'; class names are encoded in training with head='live'."
            raise ConfigError(what, where="losses, similarity, towers", got=self.towers, remedy=remedy)

    def needs_for(self, task: Task) -> tuple[str, ...]:
        """Returns what the towers give: embeddings of images, of classes, or of the texts of a batch.

        Args:
            task: the task.
        """
        vision = ("image_embeds",) if self.towers != "text" else ()
        return vision if self.towers == "vision" else (*vision, _texts(task))

    def forward(self, outputs: Any, reference: BatchReference) -> dict[str, Tensor]:
        """Returns the mean distance of each tower that is held, by its name.

        Args:
            outputs: what the task returned.
            reference: θ₀'s answers for the batch.
        """
        found = {}
        if self.towers != "text":
            found["vision"] = self.between(outputs.image_embeds, reference.image_embeds)
        if self.towers != "vision" and _texts(reference.task) == "class_embeds":
            found["text"] = self.between(outputs.class_embeds, reference.class_embeds)
        elif self.towers != "vision":
            found["text"] = self.between(outputs.text_embeds, reference.text_embeds(reference.inputs))
        return found

    def between(self, tuned: Tensor, reference: Tensor) -> Tensor:
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


def _texts(task: Task) -> Literal["class_embeds", "text_embeds"]:
    return "class_embeds" if isinstance(task, ZeroShotClassifier) else "text_embeds"


def _learns_texts(task: Task) -> bool:
    if isinstance(task, ZeroShotClassifier) and task.head != "live":
        return False
    return learns(task.model, "text")
