# SPDX-License-Identifier: Apache-2.0
"""The embeddings of the pre-trained model θ₀ while another is trained: what the similarity loss compares with."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .class_embeds import evaluating
from .collator import IMAGE_EMBEDS, REFERENCE_EMBEDS
from .dual_encoder import base_model, image_embeds, tower_modules
from .errors import ConfigError
from .losses.similarity import SimilarityLoss
from .zero_shot import ZeroShotClassifier, ZeroShotClassifierOutput

ADAPTERS = BaseTunerLayer | AuxiliaryTrainingWrapper
IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")


@contextmanager
def pretrained_weights(model: nn.Module) -> Iterator[None]:
    """Inside the context the model is θ₀ in eval mode: its adapters are off; afterwards all is as it was.

    Args:
        model: a model with adapters, by PEFT or by transformers' `load_adapter`, or one that is θ₀ itself.

    Example:
        >>> with torch.no_grad(), pretrained_weights(model):
        ...     before = image_embeds(model, pixel_values)
    """
    layers: Any = [
        module for module in model.modules() if isinstance(module, ADAPTERS) and not module.disable_adapters
    ]
    # PEFT lets all of an active adapter require gradients afterwards, also in a tower the head froze
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with evaluating(model):
            for layer in layers:
                layer.enable_adapters(False)
            yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, requires_grad in required:
            parameter.requires_grad_(requires_grad)


@torch.no_grad()
def pretrained_image_embeds(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Embeds the images of a batch with θ₀, unless they come embedded.

    Args:
        model: what `pretrained_vision` returned.
        inputs: what the data collator returned, on the model's device.

    Returns:
        `(batch, dim)`, L2-normalised, in float32 or better, without gradient.

    Example:
        >>> pretrained_image_embeds(pretrained_vision(clip), collate(rows)).shape
        torch.Size([2, 512])
    """
    if IMAGE_EMBEDS in inputs:
        return inputs[IMAGE_EMBEDS]
    with pretrained_weights(model):
        return image_embeds(model, **{name: inputs[name] for name in IMAGE_INPUTS if name in inputs})


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


def check_vision_is_pretrained(model: nn.Module, what: str) -> None:
    """Refuses a vision tower that is trained or has adapters.

    Args:
        model: a dual encoder, plain or wrapped by PEFT.
        what: what needs the vision tower as it was, for the message.

    Raises:
        ConfigError: a parameter of it requires gradients, or one of its modules has an adapter.
    """
    base = base_model(model)
    parts = [(name, base.get_submodule(name)) for name in tower_modules(model, "vision")]
    changed = [f"{part}.{name}" for part, m in parts for name, p in m.named_parameters() if p.requires_grad]
    changed += [f"{part}.{name}" for part, m in parts for name, one in m.named_modules() if isinstance(one, ADAPTERS)]
    if changed:
        remedy = (
            "Adapt the text tower alone: context_prompt(...), SAFTConfig(towers='text'), ACLIPConfig(towers='text')."
        )
        raise ConfigError(f"{what}, so the vision tower must stay as it is", got=changed[:3], remedy=remedy)


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
