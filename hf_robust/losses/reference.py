# SPDX-License-Identifier: Apache-2.0
"""The embeddings of the pre-trained model θ₀ while another is trained: what the similarity loss compares with."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..data.collator import REFERENCE_EMBEDS
from ..data.embeds_cache import pretrained_image_embeds
from ..encoders.dual_encoder import base_model, tower_modules
from ..encoders.pretrained import pretrained_weights
from ..errors import ConfigError
from ..tasks.class_names import ZeroShotClassifier, ZeroShotClassifierOutput
from .similarity import SimilarityLoss


def pretrained_class_embeds(classifier: ZeroShotClassifier) -> Tensor:
    """Embeds the classes of a classifier with θ₀.

    Args:
        classifier: a classifier whose model is θ₀, or θ₀ with adapters.

    Returns:
        `(classes, dim)`, L2-normalised, in float32 or better, without gradient.

    Example:
        >>> pretrained_class_embeds(ZeroShotClassifier(clip, processor, ["cat", "dog"])).shape
        torch.Size([2, 512])
    """
    with torch.enable_grad(), pretrained_weights(classifier.model):  # all prompts at once, with the bits of training
        return classifier.encode_prompts().detach()


def pretrained_vision(model: nn.Module) -> nn.Module:
    """Returns what embeds images as θ₀ while `model` is trained: itself, or a copy of its vision tower.

    Args:
        model: a `PeftModel`, which can always be θ₀ again, or a model that is θ₀ now and will be trained whole.
    """
    if isinstance(model, PeftModel):
        return model
    text = {id(model.get_submodule(name)): nn.Identity() for name in tower_modules(model, "text")}
    # deepcopy takes what is in `text` for copied. Flags stay: SigLIP's head is rounded otherwise with frozen weights.
    return copy.deepcopy(model, text).eval()


def check_reference(classifier: ZeroShotClassifier, towers: Literal["vision", "text", "both"]) -> None:
    """Refuses what the similarity loss cannot be computed for.

    Args:
        classifier: the classifier to train.
        towers: whose embeddings are held.

    Raises:
        ConfigError: the text tower is not trained, or weights of the base are trained beside an adapter.
    """
    if towers != "vision" and classifier.head != "live":
        remedy = "Set similarity_towers='vision', or head='live'."
        what = f"head={classifier.head!r} does not train the text tower, whose embeddings cannot move"
        raise ConfigError(what, where="similarity_towers", got=towers, allowed="'vision'", remedy=remedy)
    if not isinstance(classifier.model, PeftModel):
        return
    base = base_model(classifier.model)
    with pretrained_weights(classifier.model):
        parts = [(name, base.get_submodule(name)) for name in tower_modules(base, towers)]
        trained = [f"{part}.{name}" for part, m in parts for name, p in m.named_parameters() if p.requires_grad]
    if trained:
        remedy = "Freeze them (bias='none' in the adapter's config), or train without an adapter."
        raise ConfigError("weights of θ₀ are trained beside the adapter", got=trained[:3], remedy=remedy)


@dataclass(frozen=True)
class Reference:
    """θ₀'s embeddings for the batches of one training, and the loss that compares with them.

    Args:
        similarity: the loss.
        vision: what `pretrained_vision` returned; None where the text tower alone is held, or with a cache.
        class_embeds: `(classes, dim)`; None where the vision tower alone is held.
    """

    similarity: SimilarityLoss
    vision: nn.Module | None
    class_embeds: Tensor | None

    @classmethod
    def of(cls, classifier: ZeroShotClassifier, similarity: SimilarityLoss, cached: bool) -> Reference:
        """Takes from a classifier that is θ₀ now what will be needed of it.

        Args:
            classifier: the classifier to train.
            similarity: the loss.
            cached: whether batches bring the embeddings of their images.

        Raises:
            ConfigError: the text tower is not trained, or weights of the base are trained beside an adapter.

        Example:
            >>> Reference.of(classifier, SimilarityLoss(towers="text"), cached=False).class_embeds.shape
            torch.Size([2, 512])
        """
        check_reference(classifier, similarity.towers)
        vision = pretrained_vision(classifier.model) if similarity.towers != "text" and not cached else None
        return cls(similarity, vision, pretrained_class_embeds(classifier) if similarity.towers != "vision" else None)

    def terms(
        self, outputs: ZeroShotClassifierOutput, inputs: Mapping[str, Tensor], progress: float
    ) -> dict[str, Tensor]:
        """Returns the terms of the loss, each with its weight, 0-dim, by name.

        Args:
            outputs: what the classifier returned.
            inputs: what the data collator returned.
            progress: what has been done of the training, a fraction.
        """
        weight, terms = self.similarity.weight_at(progress), {}
        if self.similarity.towers != "text":
            known = inputs[REFERENCE_EMBEDS] if self.vision is None else pretrained_image_embeds(self.vision, inputs)
            terms["similarity_vision"] = weight * self.similarity(outputs.image_embeds, known)
        if self.class_embeds is not None:
            terms["similarity_text"] = weight * self.similarity(outputs.class_embeds, self.class_embeds)
        return terms
