# SPDX-License-Identifier: Apache-2.0
"""What an evaluation computes of a set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor
from transformers import EvalPrediction


class Measure(ABC):
    """What an evaluation computes of a set: a `compute_metrics` of `Trainer`, made anew for every evaluation.

    Called once with all images, or batch by batch. `of_batch` says what is kept of every batch.
    """

    def of_batch(self, outputs: Any, labels: Any) -> Tensor:
        """Returns what is kept of a batch, `(batch, …)`: `preprocess_logits_for_metrics` of `Trainer`.

        Args:
            outputs: those of the task's outputs that `Task.kept_outputs` names.
            labels: what `Task.label_names` names.
        """
        return outputs

    @abstractmethod
    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Adds images; returns the metrics of all of them, `loss` among them.

        Args:
            prediction: predictions and labels, or lists of them where batches are not concatenated.
            compute_result: False while more images will come; then nothing is returned.
        """
