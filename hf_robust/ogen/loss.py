# SPDX-License-Identifier: Apache-2.0
"""OGEN as a term of the loss: generator, generated features and the mean teacher over the epochs of a training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from ..data.embeds_cache import pretrained_image_embeds
from ..encoders.class_embeds import encode_prompts, evaluating, prompt_tokens
from ..encoders.dual_encoder import logit_bias, logit_scale
from ..encoders.pretrained import check_vision_is_pretrained
from ..encoders.templates import name_key
from ..errors import ConfigError, DataError
from ..losses.reference import BatchReference
from ..losses.term import Term, check_names
from ..tasks.class_names import ZeroShotClassifier
from ..tasks.task import Batch, Progress, Task
from ..tuners.radapter import averages
from .config import OGENConfig
from .distillation import LocalMeanTeacher, distillation_loss
from .generator import FeatureGenerator
from .neighbours import nearest_base_classes, nearest_new_classes
from .objective import Synthesised, classification_losses, generation_losses, synthesise
from .prototypes import Prototypes, class_prototypes


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


class OGENLoss(Term):
    """The terms of OGEN's loss (Zang et al., ICLR 2024, arXiv 2401.15914), for `RobustTrainer(..., losses=[...])`.

    It is for a `ZeroShotClassifier` with `head="live"`, whose text tower is trained, through any PEFT method, and
    whose vision tower is not. The cross-entropy of the images then has the weight that OGEN gives it, none in the
    warm-up. Generator, teacher and noise are for training alone: the model is saved as without OGEN, and checkpoints
    hold them for an exact resume.

    Args:
        config: OGEN's settings, with the names of the new classes.

    Example:
        >>> model, template = context_prompt(clip, processor)
        >>> ogen = OGENLoss(OGENConfig(new_class_names=["lynx", "otter", "heron"]))
        >>> args = RobustTrainingArguments("runs/ogen", templates=template)
        >>> trainer = RobustTrainer(model, args, losses=[ogen], ...)
    """

    name = "ogen"
    frozen_vision = True
    whole_weights = True  # it averages those of epochs
    generator: FeatureGenerator
    new_input_ids: Tensor
    new_attention_mask: Tensor | None

    def __init__(self, config: OGENConfig) -> None:
        super().__init__()
        self.config = config
        self.noise = torch.Generator().manual_seed(config.seed)  # on the CPU: the same numbers on every device
        self.prototypes: Prototypes | None = None
        self.base_neighbours: Tensor | None = None  # (known classes, neighbours)
        self.teacher: Teacher | None = None
        self.epochs_kept = 0
        self.history = self._empty_history()

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> OGENLoss:
        """Makes the loss of the settings of an `OGENConfig`.

        Args:
            settings: values by name.

        Raises:
            ConfigError: a name is none of a setting, `new_class_names` is missing, or a value is none it takes.
        """
        check_names(settings, cls.arguments(), cls.name)
        return cls(OGENConfig(**settings))

    @classmethod
    def arguments(cls) -> dict[str, Parameter]:
        """Returns the settings of an `OGENConfig`."""
        return dict(signature(OGENConfig).parameters)

    def settings(self) -> dict[str, Any]:
        """Returns the settings of its config, by name."""
        return {**asdict(self.config), "new_class_names": list(self.config.new_class_names)}

    def told(self) -> dict[str, Any]:
        """Returns the names of the new classes, which other methods do not get."""
        return {"new_class_names": list(self.config.new_class_names)}

    def attach(self, task: Task) -> None:
        """Makes a generator for the width of the task's embeddings, and tokens of the new classes.

        Args:
            task: the classifier.

        Raises:
            ConfigError: it is no `ZeroShotClassifier` with a live head, or its vision tower is trained.
            DataError: there are too few classes, or a name is among the known ones.
        """
        if not isinstance(task, ZeroShotClassifier) or task.name != "class_names":
            what = "OGEN compares images with all classes"
            raise ConfigError(what, where="losses, ogen", got=task.name, allowed="'class_names'")
        if task.head != "live":
            raise ConfigError("OGEN trains the text tower", where="head", got=task.head, allowed="'live'")
        if task.prompts.classes_per_step is not None:
            what, got = "OGEN compares images with all classes", task.prompts.classes_per_step
            raise ConfigError(what, where="classes_per_step", got=got, allowed="None")
        _check_classes(task.class_names, self.config)
        check_vision_is_pretrained(task.model, "OGEN generates image features")
        prompts = prompt_tokens(task.model, task.processor, list(self.config.new_class_names), task.templates)
        self.register_buffer("new_input_ids", prompts["input_ids"], persistent=False)
        self.register_buffer("new_attention_mask", prompts.get("attention_mask"), persistent=False)
        with torch.no_grad(), evaluating(task.model):
            dim = self.encode_new_prompts(task).shape[1]
        how = self.config.heads, self.config.dropout, self.config.layer_norm, self.config.seed
        self.generator = FeatureGenerator(dim, *how)

    def start(self, task: Task, batches: Callable[[], Iterator[Batch]]) -> None:
        """Computes what is known of the images of each class; the epochs of an earlier training are forgotten.

        Args:
            task: the classifier.
            batches: returns the training set.

        Raises:
            DataError: a class has no image.
        """
        classifier: Any = task  # as `attach` made sure
        self.history, self.epochs_kept, self.teacher = self._empty_history(), 0, None
        features = ((pretrained_image_embeds(task.model, batch), batch["labels"]) for batch in batches())
        self.prototypes = class_prototypes(features, classifier.class_names)
        self.base_neighbours = nearest_base_classes(self.prototypes.mean, self.config.neighbours)

    def start_epoch(self, task: Task, progress: Progress) -> None:
        """Keeps the tensors of the epoch before, and makes a teacher of those of the last epochs.

        Args:
            task: the classifier.
            progress: where the training is.
        """
        if progress.epoch > self.epochs_kept:  # not when an epoch is resumed in its middle
            self.history.keep(_trained_tensors(task))
            self.epochs_kept = progress.epoch
        weights = self.config.weights(progress.epoch, progress.epochs)
        if weights["distillation_known"] > 0 and len(self.history) > 0:
            self.set_teacher(task, self.history.average(progress.epoch, progress.epochs))

    @torch.no_grad()
    def set_teacher(self, task: Any, tensors: Mapping[str, Tensor]) -> None:
        """Makes a teacher of other values of the trained tensors; the model has its own again afterwards.

        Args:
            task: the classifier.
            tensors: values by the names of the task's parameters.
        """
        trained = _trained_tensors(task)
        own = {name: tensor.clone() for name, tensor in trained.items()}
        try:
            _write(tensors, trained)
            with evaluating(task):
                generator = copy.deepcopy(self.generator).requires_grad_(False)
                self.teacher = Teacher(generator, task.encode_prompts(), self.encode_new_prompts(task))
        finally:
            _write(own, trained)

    def encode_new_prompts(self, task: ZeroShotClassifier) -> Tensor:
        """Returns the embeddings of the new classes that the text tower gives now, `(new classes, dim)`.

        Args:
            task: the classifier.
        """
        return encode_prompts(task.model, self.new_input_ids, self.new_attention_mask, len(task.templates))

    # --- in every step ---

    def task_weight(self, progress: Progress) -> float:
        """Returns the weight of the cross-entropy of the images.

        Args:
            progress: where the training is.
        """
        return self.config.weights(progress.epoch, progress.epochs)["cross_entropy"]

    def weighted(self, name: str, outputs: Any, reference: BatchReference, progress: Progress) -> dict[str, Tensor]:
        """Returns the parts of the loss, each with its own weight.

        Args:
            name: of the term.
            outputs: what the classifier returned.
            reference: the batch.
            progress: where the training is.
        """
        weights = self.config.weights(progress.epoch, progress.epochs)
        return {f"{name}_{part}": weights[part] * value for part, value in self(outputs, reference).items()}

    def forward(self, outputs: Any, reference: BatchReference) -> dict[str, Tensor]:
        """Returns the parts of the loss by name, each a mean over the batch, 0-dim, without weights.

        Args:
            outputs: what the classifier returned.
            reference: the batch.

        Raises:
            ConfigError: the training has not been started.
        """
        if self.prototypes is None or self.base_neighbours is None:
            remedy = "Train with RobustTrainer, or call start first."
            raise ConfigError("OGEN has no prototypes", where="losses, ogen", remedy=remedy)
        task: Any = reference.task
        images, classes, labels = outputs.image_embeds, outputs.class_embeds, reference.inputs["labels"]
        new_classes = self.encode_new_prompts(task)
        new_neighbours = nearest_new_classes(classes, new_classes, self.config.neighbours)
        how = self.prototypes, self.base_neighbours, new_neighbours, self._draw_noise(images)
        made = synthesise(self.generator, images, labels, classes, new_classes, *how)

        def base_logits(features: Tensor) -> Tensor:
            return _logits(task, features, classes)

        def new_logits(features: Tensor) -> Tensor:
            return _logits(task, features, new_classes)

        parts = generation_losses(made, images) | classification_losses(made, labels, base_logits, new_logits)
        if self.teacher is not None:
            parts |= self._distillation(self.teacher, outputs, reference, made, new_logits(made.new))
        return parts

    def _draw_noise(self, images: Tensor) -> Tensor:
        shape = (images.shape[1],) if self.config.noise == "batch" else (len(images), 1, images.shape[1])
        return torch.rand(shape, generator=self.noise).to(images)

    def _distillation(
        self,
        teacher: Teacher,
        outputs: Any,
        reference: BatchReference,
        made: Synthesised,
        new_logits: Tensor,  # (batch, neighbours, new classes)
    ) -> dict[str, Tensor]:
        images, labels = outputs.image_embeds, reference.inputs["labels"]
        with torch.no_grad():
            own_text = teacher.class_embeds[labels, None]  # (batch, 1, dim)
            new = teacher.generator(teacher.new_embeds[made.new_labels], own_text, images[:, None])
            known_logits = _logits(reference.task, images, teacher.class_embeds)  # (batch, known classes)
            teacher_new_logits = _logits(reference.task, new, teacher.new_embeds)  # (batch, neighbours, new classes)
        return {
            "distillation_known": distillation_loss(outputs.logits, known_logits),
            "distillation_new": distillation_loss(new_logits, teacher_new_logits),
        }

    # --- checkpoints ---

    def get_extra_state(self) -> dict[str, Tensor]:
        """Returns the kept epochs and the state of the noise, for an exact resume."""
        kept = {f"history.{name}": tensor for name, tensor in self.history.state_dict().items()}
        return {**kept, "noise": self.noise.get_state(), "epochs_kept": torch.tensor(self.epochs_kept)}

    def set_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `get_extra_state` returned.

        Args:
            state: tensors by name.
        """
        device, prefix = self.new_input_ids.device, "history."
        kept = {n.removeprefix(prefix): t.to(device) for n, t in state.items() if n.startswith(prefix)}
        self.history.load_state_dict(kept)
        self.noise.set_state(state["noise"].cpu())
        self.epochs_kept = int(state["epochs_kept"])

    def _empty_history(self) -> LocalMeanTeacher:
        config = self.config
        return LocalMeanTeacher(config.largest_window, config.smallest_window, config.average, config.decay)


def _trained_tensors(task: Task) -> dict[str, Tensor]:
    """All tensors that are trained, or stand for them in evaluation, by name: what the teacher averages."""
    return {name: tensor for name, tensor in task.named_parameters() if tensor.requires_grad} | averages(task)


def _write(values: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(values[name])


def _logits(task: Task, features: Tensor, class_embeds: Tensor) -> Tensor:
    weight, bias = logit_scale(task.model) * class_embeds, logit_bias(task.model)  # (classes, dim), 0-dim
    with torch.autocast(features.device.type, enabled=False):  # logits differ by less than bfloat16 resolves
        logits = features @ weight.T
    return logits if bias is None else logits + bias


def _check_classes(class_names: Sequence[str], config: OGENConfig) -> None:
    known = {name_key(name) for name in class_names}
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
