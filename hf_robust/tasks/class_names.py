# SPDX-License-Identifier: Apache-2.0
"""A classifier whose head is made of class names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ProcessorMixin

from ..data.class_spaces import ClassSpace, class_space
from ..data.collator import ImageCollator
from ..data.labels import check_labels
from ..data.rows import LabelledImages
from ..encoders.class_embeds import class_embeddings, embed_prompts, encode_prompts, evaluating, prompt_tokens
from ..encoders.dual_encoder import (
    at_least_float32,
    base_model,
    family,
    logit_bias,
    logit_scale,
    tower_modules,
)
from ..encoders.dual_encoder import image_embeds as embed_images
from ..encoders.templates import TEMPLATES, check_class_names, check_templates
from ..errors import AdapterFileError, ConfigError, DataError
from .accuracy import AccuracyAndLoss
from .task import Rows, Task, TaskOutput, task_settings
from .task_loss import TaskLoss, class_weights

MOST_SHOWN = 3  # names in a message

__all__ = ["TEMPLATES", "ZeroShotClassifier", "ZeroShotClassifierOutput", "class_embeddings"]


@dataclass
class ZeroShotClassifierOutput(TaskOutput):
    """What `ZeroShotClassifier` returns.

    Args:
        loss: 0-dim, mean cross-entropy over the batch; None without labels.
        logits: `(batch, classes)`.
        image_embeds: `(batch, dim)`, L2-normalised.
        class_embeds: `(classes, dim)`, L2-normalised; under `head="trainable"` the directions of its rows.
        terms: as in `TaskOutput`.
    """

    logits: Tensor | None = None
    image_embeds: Tensor | None = None
    class_embeds: Tensor | None = None
    terms: dict[str, Tensor] | None = None


class ZeroShotClassifier(Task):
    """An image classifier around a dual encoder: images are compared with prompts that hold the class names.

    At the start every `head` gives the zero-shot predictions of `model`, as it is when the classifier is built:
    `exp(logit_scale) * image_embeds @ class_embeddings.T`, for SigLIP plus its `logit_bias`. They differ in what is
    trained:

    - `"frozen"`: the class embeddings are computed once and stay; training does not run the text tower.
    - `"live"`: the prompts are encoded in every forward with gradients, so the text tower learns too. In eval mode and
      without gradients the class embeddings are kept until the text tower gives others.
    - `"trainable"`: a linear layer, `class_head`, that starts as `exp(logit_scale) * class_embeddings` and is trained
      with the vision tower; training does not run the text tower.

    Parameters that the chosen head does not use stop requiring gradients (the text tower under `"frozen"` and
    `"trainable"`, the scale under `"trainable"`), and so does `logit_bias`, which cross-entropy cannot teach.

    Args:
        model: a dual encoder, plain or a `PeftModel` around one.
        processor: its processor.
        class_names: one per class, in the order of the labels.
        templates: prompts with `{}` in place of the class name, one such prompt, or a key of `TEMPLATES`. The class
            embedding is the mean over them.
        head: `"frozen"`, `"live"` or `"trainable"`.
        data_names: what the training data calls the classes, where that is something else (`n01440764`); sets of
            images with these names are recognised.

    Raises:
        ConfigError: the model is no supported dual encoder, a template has no `{}`, or `head` is unknown.
        DataError: no class names, an empty or repeated one, or a prompt that is too long.

    Example:
        >>> clip = CLIPModel.from_pretrained("openai/clip-vit-base-patch32")
        >>> processor = CLIPProcessor.from_pretrained("openai/clip-vit-base-patch32")
        >>> classifier = ZeroShotClassifier(clip, processor, ["cat", "dog"])
        >>> inputs = processor(images=[picture], return_tensors="pt")
        >>> classifier(inputs["pixel_values"], labels=torch.tensor([0])).logits.shape
        torch.Size([1, 2])
    """

    name = "class_names"
    target = "label"
    metrics = ("accuracy", "loss")
    output_type = ZeroShotClassifierOutput
    prompt_input_ids: Tensor
    prompt_attention_mask: Tensor | None
    class_embeds: Tensor  # of "frozen"
    class_head: nn.Linear  # of "trainable"

    def __init__(
        self,
        model: nn.Module,
        processor: ProcessorMixin,
        class_names: Sequence[str],
        templates: Sequence[str] | str = "single",
        head: Literal["frozen", "live", "trainable"] = "live",
        data_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, processor)
        if head not in ("frozen", "live", "trainable"):
            raise ConfigError("unknown head", got=head, allowed="'frozen', 'live', 'trainable'")
        self.head = head
        self.class_names, self.templates = check_class_names(class_names), check_templates(templates)
        self.class_space = ClassSpace(self.class_names, data_names)
        prompts = prompt_tokens(model, processor, self.class_names, self.templates)
        self.register_buffer("prompt_input_ids", prompts["input_ids"], persistent=False)
        self.register_buffer("prompt_attention_mask", prompts.get("attention_mask"), persistent=False)
        self._kept: tuple[list[int], Tensor, Tensor] | None = None  # of "live" in eval mode: tower state, embeddings
        self._other_embeds: Tensor | None = None  # inside `classes`, of classes that have no row in the head
        self._order: list[int] | None = None  # inside `classes`, the rows of classes that have one
        if head != "live":
            self._build_head()
        self._freeze_unused()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        image_embeds: Tensor | None = None,
        reference_embeds: Tensor | None = None,
    ) -> ZeroShotClassifierOutput:
        """Classifies images.

        Args:
            pixel_values: `(batch, channels, height, width)`, for SigLIP 2 `(batch, patches, patch pixels)`.
            labels: `(batch,)`, indices into `class_names`.
            pixel_attention_mask: `(batch, patches)`, SigLIP 2 only.
            spatial_shapes: `(batch, 2)`, SigLIP 2 only.
            image_embeds: `(batch, dim)`, L2-normalised: embeddings in the place of images, see `with_image_embeds`.
            reference_embeds: `(batch, dim)`, θ₀'s, for the terms of the loss.

        Returns:
            Logits and embeddings in float32 or better, and the loss where there are labels.

        Raises:
            ConfigError: there are neither images nor embeddings, or both.
            DataError: a label is no index into `class_names`.
        """
        if pixel_values is not None and image_embeds is None:
            embeds = embed_images(self.model, pixel_values, pixel_attention_mask, spatial_shapes)  # (batch, dim)
        elif pixel_values is None and image_embeds is not None:
            embeds = image_embeds
        else:
            raise ConfigError("the classifier takes images or their embeddings", allowed="one of the two")
        class_embeds = self._class_embeds()  # (classes, dim)
        logits = self._logits(embeds, class_embeds)  # (batch, classes)
        if self._order is not None:
            logits, class_embeds = logits[:, self._order], class_embeds[self._order]
        loss = None if labels is None else F.cross_entropy(logits, _checked(labels, logits.shape[1]))
        output = ZeroShotClassifierOutput(loss=loss, logits=logits, image_embeds=embeds, class_embeds=class_embeds)
        inputs = {
            "pixel_values": pixel_values,
            "labels": labels,
            "pixel_attention_mask": pixel_attention_mask,
            "spatial_shapes": spatial_shapes,
            "image_embeds": image_embeds,
            "reference_embeds": reference_embeds,
        }
        return self.with_terms(output, {n: t for n, t in inputs.items() if t is not None})

    # --- what a trainer asks ---

    @classmethod
    def build(
        cls, model: nn.Module, processor: ProcessorMixin, rows: Rows | None, class_names: Any, args: Any
    ) -> ZeroShotClassifier:
        """Builds the classifier of a training set's classes, with the templates and the head of the arguments."""
        space = class_space(None if rows is None else rows.class_names, class_names, "class_names")
        how = args.templates, args.head, space.data_names
        return cls(model, processor, space.words, *how, **task_settings(args.task))

    def collator(self, images: ImageCollator) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]:
        """Returns the collator of images, which makes labels too."""
        return images

    def check_rows(self, rows: Rows, targets: bool = True) -> None:
        """Refuses a set with a label outside its classes, or of which it is not known what its labels mean."""
        if isinstance(rows, LabelledImages) and rows.shown_labels is not None:
            check_labels(rows.shown_labels, len(rows.class_names or self.class_names), rows.name)
        names = self.class_space.data_names
        if names is not None and isinstance(rows.rows, datasets.IterableDataset) and rows.rows.features is None:
            what = "a stream without features does not say which classes its labels mean"
            remedy = "Use dataset.map(..., features=...), or from_generator likewise."
            raise DataError(what, where=rows.name, remedy=remedy)
        if rows.class_names is None and names is not None and all(map(str.isdecimal, names)):
            if [int(name) for name in names] != list(range(len(names))):
                what = "labels without names, for classes that are numbers in another order"
                remedy = "Give the labels their names: dataset.cast_column('label', ClassLabel(names=...)), or text."
                raise DataError(what, where=rows.name, got=list(names)[:MOST_SHOWN], remedy=remedy)

    def check_training(self, rows: Rows) -> None:
        """Refuses a set of other classes, or of one class alone."""
        names = rows.class_names
        if names is not None and self.class_space.relate(names).kind != "same":
            allowed = ", ".join(map(repr, self.class_space.data_names or self.class_names))
            what = "the training set has other classes than the classifier, or in another order"
            remedy = "Build a new RobustTrainer for it."
            raise DataError(what, where=rows.name, got=names, allowed=allowed, remedy=remedy)
        labels = rows.shown_labels if isinstance(rows, LabelledImages) else None
        found = len(self.class_names) if labels is None else len(np.unique(labels))
        if found < 2:
            what = "there is nothing to tell apart: all images are of one class"
            raise DataError(what, where=rows.name, got=found, allowed="2 classes or more")

    @contextmanager
    def answering(self, rows: Rows) -> Iterator[None]:
        """Inside the context the classifier answers among the classes of a set, see `classes`."""
        with nullcontext() if rows.class_names is None else self.classes(rows.class_names):
            yield

    def take_names(self, rows: Rows) -> None:
        """Takes what a training set calls the classes, where that is something else."""
        space, names = self.class_space, rows.class_names
        if names is not None and space.data_names is None and space.relate(names).kind != "same":
            self.class_space = class_space(names, self.class_names, "class_names")

    def knows(self, rows: Rows) -> bool:
        """Whether the classes of a set are among its own."""
        return rows.class_names is None or self.class_space.relate(rows.class_names).kind != "foreign"

    def measure(self, rows: Rows, whole: bool) -> AccuracyAndLoss:
        """Returns what computes accuracy and cross-entropy."""
        return AccuracyAndLoss(from_logits=whole)

    def training_loss(self, rows: Rows | None, args: Any, function: Callable[..., Tensor] | None) -> TaskLoss:
        """Returns the cross-entropy with class weights and label smoothing, or what the user's function computes."""
        weights = class_weights(args.class_weights, rows, len(self.class_names))
        return TaskLoss(weights, args.label_smoothing_factor, function)

    def settings(self) -> dict[str, Any]:
        """Returns class names, templates, head, and what the data calls the classes where that is something else."""
        found: dict[str, Any] = {name: list(getattr(self, name)) for name in ("class_names", "templates")}
        found["head"] = self.head
        if self.class_space.data_names not in (None, self.class_names):
            found["data_names"] = list(self.class_space.data_names or ())
        return found

    def check_settings(self, saved: Mapping[str, Any], where: str) -> None:
        """Refuses a checkpoint of other classes or another head."""
        names = saved.get("class_names")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or "head" not in saved:
            raise AdapterFileError("file names no head and no classes", where=f"{where}/classifier.json")
        if saved["head"] != self.head:
            raise AdapterFileError("checkpoint has another head", where=where, got=saved["head"])
        if ClassSpace(self.class_names).relate(names).kind != "same":
            raise AdapterFileError("checkpoint is of other classes, or of another order", where=where, got=names)

    # --- its head ---

    @contextmanager
    def classes(self, class_names: Sequence[str]) -> Iterator[None]:
        """Inside the context the classifier answers among the classes of another set of images.

        If all of them are among its own (underscores count as blanks, case does not count), the rows of its head
        answer in the order of the set's labels; its other classes come after them and remain possible answers. Else
        the head is the zero-shot head of the set's names, from the text tower as it is now.

        Args:
            class_names: the set's classes, in the order of its labels.

        Raises:
            DataError: as at construction.

        Example:
            >>> with classifier.classes(["plane", "ship", "train"]):
            ...     classifier(pixel_values).logits.shape
            torch.Size([1, 3])
        """
        before = self.class_names, self._other_embeds, self._order
        relation, other = self.class_space.relate(class_names), None
        if relation.order is None:
            other = class_embeddings(self.model, self.processor, relation.words, self.templates)
        order = None if relation.kind == "same" else relation.order
        self.class_names, self._other_embeds, self._order = relation.words, other, order
        try:
            yield
        finally:
            self.class_names, self._other_embeds, self._order = before

    def train(self, mode: bool = True) -> ZeroShotClassifier:
        """Sets train or eval mode, as any module; class embeddings kept by the live head are computed anew."""
        self._kept = None
        return super().train(mode)

    def encode_prompts(self) -> Tensor:
        """Returns the class embeddings that the text tower gives now, `(classes, dim)`, L2-normalised."""
        return encode_prompts(self.model, self.prompt_input_ids, self.prompt_attention_mask, len(self.templates))

    def zero_shot_head(self) -> tuple[Tensor, Tensor]:
        """Returns weight `(classes, dim)` and bias `(classes,)` of the linear layer that the text tower gives now."""
        embeds, bias = self.encode_prompts(), logit_bias(self.model)  # (classes, dim), 0-dim
        return logit_scale(self.model) * embeds, embeds.new_zeros(len(embeds)) + (0.0 if bias is None else bias)

    def trained_head(self) -> tuple[Tensor, Tensor]:
        """Returns weight `(classes, dim)` and bias `(classes,)` of `head="trainable"`, in float32 or better."""
        return at_least_float32(self.class_head.weight), at_least_float32(self.class_head.bias)

    def _build_head(self) -> None:
        with torch.no_grad(), evaluating(self.model):
            if self.head == "frozen":
                self.register_buffer("class_embeds", self.encode_prompts(), persistent=False)
                return
            weight, bias = self.zero_shot_head()
            self.class_head = nn.Linear(weight.shape[1], len(weight), device="meta")  # no draw from the global RNG
            self.class_head.weight, self.class_head.bias = nn.Parameter(weight), nn.Parameter(bias)

    def _freeze_unused(self) -> None:
        base = base_model(self.model)
        if family(self.model).logit_bias:  # moves no probability: its gradient is rounding noise, which Adam amplifies
            base.logit_bias.requires_grad_(False)
        if self.head == "trainable":
            base.logit_scale.requires_grad_(False)
        if self.head != "live":
            for name in tower_modules(self.model, "text"):
                base.get_submodule(name).requires_grad_(False)

    def _logits(self, embeds: Tensor, class_embeds: Tensor) -> Tensor:
        weight, bias = self._weight_and_bias(class_embeds)  # (classes, dim), (classes,) or 0-dim
        with torch.autocast(embeds.device.type, enabled=False):  # logits differ by less than bfloat16 resolves
            logits = embeds @ weight.T
        return logits if bias is None else logits + bias

    def _weight_and_bias(self, class_embeds: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.head == "trainable" and self._other_embeds is None:
            return self.trained_head()
        return logit_scale(self.model) * class_embeds, logit_bias(self.model)

    def _class_embeds(self) -> Tensor:
        if self._other_embeds is not None:
            return self._other_embeds
        if self.head == "frozen":
            return at_least_float32(self.class_embeds)
        if self.head == "trainable":
            return F.normalize(at_least_float32(self.class_head.weight), dim=-1)
        if self.training or torch.is_grad_enabled():
            return self.encode_prompts()
        return self._kept_live_embeds()

    def _kept_live_embeds(self) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            versions, probe = self._text_state()
            if self._kept is None or self._kept[0] != versions or not self._kept[1].equal(probe):
                self._kept = (versions, probe, self.encode_prompts())
        return self._kept[2]

    def _text_state(self) -> tuple[list[int], Tensor]:
        """Writes to the tower show in its version counters, switches and scales of adapters in the first prompt."""
        towers = [base_model(self.model).get_submodule(name) for name in tower_modules(self.model, "text")]
        versions = [parameter._version for tower in towers for parameter in tower.parameters()]
        return versions, self._embed_prompts(slice(1))

    def _embed_prompts(self, rows: slice) -> Tensor:
        mask = self.prompt_attention_mask
        return embed_prompts(self.model, self.prompt_input_ids[rows], None if mask is None else mask[rows])


def _checked(labels: Tensor, n_classes: int) -> Tensor:
    """Labels of streams and foreign datasets show only here; on a GPU, PyTorch would abort without saying which."""
    wrong = labels[(labels < 0) | (labels >= n_classes)]
    if len(wrong):
        raise DataError("label is no class", where="labels", got=int(wrong[0]), allowed=f"0 to {n_classes - 1}")
    return labels
