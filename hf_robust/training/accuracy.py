# SPDX-License-Identifier: Apache-2.0
"""What `RobustTrainer` computes of an evaluation set by default."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import EvalPrediction

from ..errors import ConfigError


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


class AccuracyAndLoss:
    """Accuracy and mean cross-entropy over all images, the same for every batch size and number of ranks.

    A `compute_metrics` of `Trainer`, called once with all images, or batch by batch.

    Args:
        from_logits: whether predictions are logits, or what `correct_and_loss` returned.

    Example:
        >>> metrics = AccuracyAndLoss()
        >>> metrics(EvalPrediction(np.array([[2.0, 0.0], [0.0, 2.0]]), np.array([0, 0])))["accuracy"]
        0.5
    """

    def __init__(self, from_logits: bool = True) -> None:
        self.from_logits = from_logits
        self.images, self.sums = 0, torch.zeros(2, dtype=torch.float64)

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Adds images, and returns what has been found of all of them.

        Args:
            prediction: predictions and labels, or lists of them where batches are not concatenated.
            compute_result: False while more images will come; then nothing is returned.
        """
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


def check_metrics(
    compute_metrics: Callable[..., dict[str, float]] | None, preprocess: Callable[..., Tensor] | None
) -> None:
    """Refuses to change the logits that the default metrics need.

    Args:
        compute_metrics: what the user gave.
        preprocess: what the user gave as `preprocess_logits_for_metrics`.

    Raises:
        ConfigError: there is a function for the logits, and none for the metrics.
    """
    if preprocess is not None and compute_metrics is None:
        remedy = "Pass compute_metrics, which gets what it returns."
        what = "accuracy and loss are computed from logits"
        raise ConfigError(what, where="preprocess_logits_for_metrics", remedy=remedy)
