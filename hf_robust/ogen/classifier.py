# SPDX-License-Identifier: Apache-2.0
"""A zero-shot classifier that trains with features generated for classes without images."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ProcessorMixin

from ..encoders.class_embeds import encode_prompts, evaluating, prompt_tokens
from ..encoders.dual_encoder import base_model
from ..encoders.pretrained import check_vision_is_pretrained
from ..encoders.templates import check_class_names, name_key
from ..errors import ConfigError, DataError
from ..tasks.class_names import ZeroShotClassifier, ZeroShotClassifierOutput
from .config import OGENConfig
from .distillation import distillation_loss
from .generator import FeatureGenerator
from .neighbours import nearest_base_classes, nearest_new_classes
from .objective import Synthesised, classification_losses, generation_losses, synthesise
from .prototypes import Prototypes


@dataclass
class OGENOutput(ZeroShotClassifierOutput):
    """What `OGENClassifier` returns in training: also the terms of OGEN's loss.

    Args:
        terms: by name, each 0-dim, a mean over the batch, without its weight.
    """

    terms: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class Teacher:
    """What the mean teacher needs to teach for an epoch.

    Args:
        generator: its generator.
        class_embeds: `(known classes, dim)`, by its text tower.
        new_embeds: `(new classes, dim)`, by its text tower.
    """

    generator: nn.Module
    class_embeds: Tensor
    new_embeds: Tensor


class OGENClassifier(ZeroShotClassifier):
    """A `ZeroShotClassifier` that in training, with labels, also returns the terms of OGEN's loss (arXiv 2401.15914).

    Evaluation, and what is saved of the dual encoder, are those of `ZeroShotClassifier`: the generator is for training
    alone. `RobustTrainer(..., ogen=...)` makes one of these and calls `set_prototypes` and `set_teacher`.

    Args:
        model: a dual encoder whose text tower is trained, through any PEFT method, and whose vision tower is not.
        processor: its processor.
        class_names: the known classes, in the order of the labels.
        config: OGEN's settings, with the names of the new classes.
        templates: as in `ZeroShotClassifier`.
        data_names: likewise.

    Raises:
        ConfigError: the vision tower is trained, or what `ZeroShotClassifier` and `FeatureGenerator` raise.
        DataError: there are too few classes, a name occurs twice, or what `ZeroShotClassifier` raises.

    Example:
        >>> model, template = context_prompt(clip, processor)
        >>> config = OGENConfig(new_class_names=["lynx", "otter", "heron"])
        >>> classifier = OGENClassifier(model, processor, ["cat", "dog", "owl", "duck"], config, template)
    """

    new_input_ids: Tensor
    new_attention_mask: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        processor: ProcessorMixin,
        class_names: Sequence[str],
        config: OGENConfig,
        templates: Sequence[str] | str = "single",
        data_names: Sequence[str] | None = None,
    ) -> None:
        _check_classes(class_names, config)
        check_vision_is_pretrained(model, "OGEN generates image features")
        super().__init__(model, processor, class_names, templates, "live", data_names)
        self.ogen, self.new_class_names = config, list(config.new_class_names)
        prompts = prompt_tokens(model, processor, self.new_class_names, self.templates)
        self.register_buffer("new_input_ids", prompts["input_ids"], persistent=False)
        self.register_buffer("new_attention_mask", prompts.get("attention_mask"), persistent=False)
        with torch.no_grad(), evaluating(model):
            dim = self.encode_new_prompts().shape[1]
        generator = FeatureGenerator(dim, config.heads, config.dropout, config.layer_norm, config.seed)
        self.generator = generator.to(base_model(model).device)
        self.noise = torch.Generator().manual_seed(config.seed)  # on the CPU: the same numbers on every device
        self.prototypes: Prototypes | None = None
        self.base_neighbours: Tensor | None = None  # (known classes, neighbours)
        self.teacher: Teacher | None = None

    def encode_new_prompts(self) -> Tensor:
        """Returns the embeddings of the new classes that the text tower gives now, `(new classes, dim)`."""
        return encode_prompts(self.model, self.new_input_ids, self.new_attention_mask, len(self.templates))

    def own_tensors(self) -> dict[str, Tensor]:
        """Returns none: the generator is for training alone."""
        return {}

    def trained_tensors(self) -> dict[str, Tensor]:
        """Returns all tensors that are trained, by name: what the teacher averages."""
        return {name: tensor for name, tensor in self.named_parameters() if tensor.requires_grad}

    def set_prototypes(self, prototypes: Prototypes) -> None:
        """Sets what is known of the images of each class, and which classes are each other's neighbours.

        Args:
            prototypes: what `class_prototypes` returned, on the device of the model.

        Raises:
            DataError: there are too few classes.
        """
        self.base_neighbours = nearest_base_classes(prototypes.mean, self.ogen.neighbours)
        self.prototypes = prototypes

    @torch.no_grad()
    def set_teacher(self, tensors: Mapping[str, Tensor]) -> None:
        """Makes a teacher of other values of the trained tensors; the model has its own again afterwards.

        Args:
            tensors: values by the names of `trained_tensors`.
        """
        trained = self.trained_tensors()
        own = {name: tensor.clone() for name, tensor in trained.items()}
        try:
            _write(tensors, trained)
            with evaluating(self):
                generator = copy.deepcopy(self.generator).requires_grad_(False)
                self.teacher = Teacher(generator, self.encode_prompts(), self.encode_new_prompts())
        finally:
            _write(own, trained)

    def _with_terms(self, output: ZeroShotClassifierOutput, labels: Tensor | None) -> ZeroShotClassifierOutput:
        if not self.training or labels is None:
            return output
        return OGENOutput(**output, terms=self._terms(output, labels))

    def _terms(self, output: Any, labels: Tensor) -> dict[str, Tensor]:
        if self.prototypes is None or self.base_neighbours is None:
            raise ConfigError(
                "OGEN has no prototypes", remedy="Train with RobustTrainer, or call set_prototypes first."
            )
        images, classes, new_classes = output.image_embeds, output.class_embeds, self.encode_new_prompts()
        new_neighbours = nearest_new_classes(classes, new_classes, self.ogen.neighbours)
        noise = self._draw_noise(images)
        how = self.prototypes, self.base_neighbours, new_neighbours, noise
        made = synthesise(self.generator, images, labels, classes, new_classes, *how)

        def base_logits(features: Tensor) -> Tensor:
            return self._logits(features, classes)

        def new_logits(features: Tensor) -> Tensor:
            return self._logits(features, new_classes)

        terms = generation_losses(made, images) | classification_losses(made, labels, base_logits, new_logits)
        if self.teacher is not None:
            terms |= self._distillation(self.teacher, output, labels, made, new_logits(made.new))
        return terms

    def _draw_noise(self, images: Tensor) -> Tensor:
        shape = (images.shape[1],) if self.ogen.noise == "batch" else (len(images), 1, images.shape[1])
        return torch.rand(shape, generator=self.noise).to(images)

    def _distillation(
        self,
        teacher: Teacher,
        output: Any,  # a ZeroShotClassifierOutput, whose fields may all be None by their types
        labels: Tensor,
        made: Synthesised,
        new_logits: Tensor,  # (batch, neighbours, new classes)
    ) -> dict[str, Tensor]:
        images = output.image_embeds
        with torch.no_grad():
            own_text = teacher.class_embeds[labels, None]  # (batch, 1, dim)
            new = teacher.generator(teacher.new_embeds[made.new_labels], own_text, images[:, None])
            known_logits = self._logits(images, teacher.class_embeds)  # (batch, known classes)
            teacher_new_logits = self._logits(new, teacher.new_embeds)  # (batch, neighbours, new classes)
        return {
            "distillation_known": distillation_loss(output.logits, known_logits),
            "distillation_new": distillation_loss(new_logits, teacher_new_logits),
        }


def _write(values: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(values[name])


def _check_classes(class_names: Sequence[str], config: OGENConfig) -> None:
    known = {name_key(name) for name in check_class_names(class_names)}
    repeated = [name for name in config.new_class_names if name_key(name) in known]
    if repeated:
        remedy = "Name only classes that have no training images."
        raise DataError(
            "new classes are among the known ones", where="new_class_names", got=repeated[:3], remedy=remedy
        )
    for what, got, least in (
        ("known", len(class_names), config.neighbours + 1),
        ("new", len(config.new_class_names), config.neighbours),
    ):
        if got < least:
            remedy = "Set OGENConfig(neighbours=...) lower, or give more classes."
            allowed = f"at least {least} with neighbours={config.neighbours}"
            raise DataError(f"too few {what} classes for OGEN", got=got, allowed=allowed, remedy=remedy)
