# SPDX-License-Identifier: Apache-2.0
"""Accuracy and cross-entropy of a set of labelled images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import EvalPrediction

from .measure import Measure


def correct_and_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns for every image whether it is classified correctly (0 or 1), and its cross-entropy: `(images, 2)`.

    Args:
        logits: `(images, classes)`.
        labels: `(images,)`.

    Example:
        >>> correct_and_loss(torch.zeros(1, 2), torch.tensor([0]))
        tensor([[1.0000, 0.6931]], dtype=torch.float64)
    """
    exact = logits.to(torch.float32 if logits.device.type == "mps" else torch.float64)  # Apple's GPUs have no float64
    loss = F.cross_entropy(exact, labels, reduction="none")  # (images,)
    return torch.stack([(exact.argmax(dim=1) == labels).to(loss), loss], dim=1)


class AccuracyAndLoss(Measure):
    """Accuracy and mean cross-entropy over all images, the same for every batch size and number of ranks.

    Args:
        from_logits: whether all logits are kept, or of every image two numbers, see `correct_and_loss`.

    Example:
        >>> metrics = AccuracyAndLoss()
        >>> metrics(EvalPrediction(np.array([[2.0, 0.0], [0.0, 2.0]]), np.array([0, 0])))["accuracy"]
        0.5
    """

    def __init__(self, from_logits: bool = True) -> None:
        self.from_logits = from_logits
        self.images, self.sums = 0, torch.zeros(2, dtype=torch.float64)

    def of_batch(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns the logits, or what `correct_and_loss` makes of them."""
        return outputs if self.from_logits else correct_and_loss(outputs, labels)

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Adds images; returns accuracy, a fraction, and loss, in nats."""
        given = prediction.predictions, prediction.label_ids
        predictions, labels = (batches if isinstance(batches, list) else [batches] for batches in given)
        for values, of in zip(map(torch.as_tensor, predictions), map(torch.as_tensor, labels), strict=True):
            found = correct_and_loss(values, of) if self.from_logits else values  # (images, 2)
            self.images += len(found)
            self.sums += found.cpu().double().sum(dim=0)
        if not compute_result:
            return {}
        accuracy, loss = (self.sums / self.images).tolist()
        return {"accuracy": accuracy, "loss": loss}
