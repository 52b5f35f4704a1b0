# SPDX-License-Identifier: Apache-2.0
"""What images are compared with where two models answer together: a head of each, and what mixes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers import ProcessorMixin

from ..data.columns import Target
from ..encoders.pretrained import pretrained_weights
from ..errors import ConfigError
from ..tasks.ensemble import Ensemble, EnsembleEmbeds
from .suite import CLASSIFICATION, RobustnessSuite
from .text_side import Head, TextSide


class EnsembleSide(TextSide):
    """The heads of an ensemble: each model's text tower makes its own, restricted to a set's answers.

    Args:
        ensemble: two models.
        processor: their processor.
        suite: what they are evaluated on.

    Raises:
        ConfigError: the suite has sets for another task than classification, or a model has changed.
    """

    def __init__(self, ensemble: Ensemble, processor: ProcessorMixin, suite: RobustnessSuite) -> None:
        super().__init__(ensemble.classifier, processor)
        ensemble.check_unchanged()
        self.ensemble, self.of_zero_shot = ensemble, TextSide(ensemble.zero_shot, processor)
        for one in suite.sets:
            if one.task != CLASSIFICATION:
                what = "an ensemble mixes probabilities of classes, and these images have no single class"
                remedy = "Evaluate its models each by itself on this set."
                raise ConfigError(what, where=one.name, got=one.task, allowed=CLASSIFICATION, remedy=remedy)

    def embed(self, inputs: Mapping[str, Tensor]) -> EnsembleEmbeds:
        """Returns what both models give for a batch of images, and the weight of each image.

        Args:
            inputs: the batch.
        """
        return self.ensemble.embed(inputs)

    def head(
        self,
        class_names: Sequence[str],
        templates: Sequence[str] | str,
        target: Target,
        answers: Tensor | None = None,
    ) -> Head:
        """Returns a head that gives logarithms of mixed probabilities in the place of logits.

        Args:
            class_names: as for one model; so are `templates`, `target` and `answers`.
            templates: of the prompts.
            target: what the head is asked for.
            answers: what can be predicted.
        """
        fine_tuned = super().head(class_names, templates, target, answers)
        with pretrained_weights(self.ensemble.zero_shot):
            zero_shot = self.of_zero_shot.head(class_names, templates, target, answers)

        def mixed(embeds: EnsembleEmbeds) -> Tensor:
            return self.ensemble.mix(embeds, fine_tuned(embeds.fine_tuned), zero_shot(embeds.zero_shot))

        return mixed
