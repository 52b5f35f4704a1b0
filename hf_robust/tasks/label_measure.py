# SPDX-License-Identifier: Apache-2.0
"""Mean average precision, F1 and loss of a set of images with several labels."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import EvalPrediction

from .binary_losses import LOSSES
from .label_metrics import label_metrics
from .measure import Measure


class LabelMeasure(Measure):
    """Mean average precision, F1 at a threshold, and mean loss over all images, which it keeps the logits of.

    Args:
        loss: a key of `LOSSES`.
        threshold: the least logit that says that an image has a class.

    Example:
        >>> logits, labels = np.array([[2.0, -1.0], [1.0, 3.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])
        >>> LabelMeasure("bce", threshold=0.0)(EvalPrediction(logits, labels))["mAP_macro"]
        1.0
    """

    def __init__(self, loss: str, threshold: float) -> None:
        self.loss, self.threshold = LOSSES[loss], threshold
        self.logits: list[Tensor] = []
        self.labels: list[Tensor] = []

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Adds images; returns what `label_metrics` does, fractions, and loss, in nats."""
        for given, kept in ((prediction.predictions, self.logits), (prediction.label_ids, self.labels)):
            batches = given if isinstance(given, list) else [given]
            kept += [torch.as_tensor(batch).detach().cpu().double() for batch in batches]
        if not compute_result:
            return {}
        logits, labels = torch.cat(self.logits), torch.cat(self.labels)  # (images, classes) each
        loss = self.loss(logits, labels, None).mean().item()
        return {**label_metrics(logits, labels, self.threshold), "loss": loss}
