# SPDX-License-Identifier: Apache-2.0
"""What two models that classify images together are: one fine-tuned, one zero-shot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .class_names import ZeroShotClassifier
from .task import Inputs


@dataclass(frozen=True)
class EnsembleEmbeds:
    """What two models give for a batch of images, each encoded once by each.

    Args:
        fine_tuned: `(batch, dim)`, L2-normalised.
        zero_shot: `(batch, dim)`, L2-normalised.
        weight: `(batch,)`, the share of the fine-tuned model's probabilities, a fraction.
    """

    fine_tuned: Tensor
    zero_shot: Tensor
    weight: Tensor


class Ensemble(nn.Module, ABC):
    """A fine-tuned and a zero-shot model that classify images together; `evaluate_suite` takes it as a model.

    Args:
        classifier: the fine-tuned model.
        zero_shot: the dual encoder that is the zero-shot model inside `pretrained_weights`; with adapters that of the
            classifier itself.
    """

    def __init__(self, classifier: ZeroShotClassifier, zero_shot: nn.Module) -> None:
        super().__init__()
        self.classifier, self.zero_shot = classifier, zero_shot

    @abstractmethod
    def embed(self, inputs: Inputs) -> EnsembleEmbeds:
        """Returns what both models give for the images of a batch.

        Args:
            inputs: the batch; None for what it does not have.
        """

    @abstractmethod
    def mix(self, embeds: EnsembleEmbeds, fine_tuned_logits: Tensor, zero_shot_logits: Tensor) -> Tensor:
        """Returns the logarithms of the probabilities that both models give together, `(batch, answers)`.

        Args:
            embeds: of the images.
            fine_tuned_logits: `(batch, answers)`.
            zero_shot_logits: `(batch, answers)`, of the same answers.
        """

    @abstractmethod
    def check_unchanged(self) -> None:
        """Refuses models that are not what the ensemble was made of; looks at some of their numbers.

        Raises:
            ConfigError: one has changed.
        """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Returns what a report says of the ensemble, of what JSON can hold."""
