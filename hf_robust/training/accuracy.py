# SPDX-License-Identifier: Apache-2.0
"""What `RobustTrainer` computes from an evaluation set's logits by default."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers import EvalPrediction


def accuracy_and_loss(prediction: EvalPrediction) -> dict[str, float]:
    """Returns accuracy and mean cross-entropy over all images, the same for every batch size and number of ranks.

    Args:
        prediction: logits `(images, classes)` and labels `(images,)`.

    Example:
        >>> accuracy_and_loss(EvalPrediction(np.array([[2.0, 0.0], [0.0, 2.0]]), np.array([0, 0])))["accuracy"]
        0.5
    """
    logits, labels = torch.from_numpy(prediction.predictions).double(), torch.from_numpy(prediction.label_ids)
    loss = F.cross_entropy(logits, labels)
    return {"accuracy": (logits.argmax(dim=1) == labels).double().mean().item(), "loss": loss.item()}
