# SPDX-License-Identifier: Apache-2.0
"""Several labels an image: a yes or no for every class, whose head is made of class names."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from accelerate import Accelerator
from numpy.typing import ArrayLike
from torch import Tensor, nn
from transformers import ProcessorMixin

from ..data.collator import ImageCollator
from ..data.rows import LabelledImages
from ..data.target_collators import LabelsCollator
from ..encoders.class_embeds import evaluating
from ..encoders.dual_encoder import at_least_float32, base_model, logit_bias, logit_scale
from ..errors import ConfigError, DataError
from .binary_losses import LOSSES, LabelLoss, PositiveWeights, check_positive_weights, positive_weights
from .calibration import fit_sigmoid
from .class_names import ZeroShotClassifier, ZeroShotClassifierOutput
from .label_measure import LabelMeasure
from .label_metrics import best_threshold
from .prediction import best_first
from .task import Batch, Rows
from .task_loss import BALANCED, TaskLoss, check_plain

logger = logging.getLogger(__name__)

MOST_SHOWN = 3  # names in a message


class SeveralLabels(ZeroShotClassifier):
    """A classifier of images that have any number of classes: a sigmoid for every class over the head of class names.

    The probability of a class is `sigmoid(s * image_embeds @ class_embeds.T + β)`, with one scale s and one bias β for
    all classes. They are the task's own and begin as the model's `logit_scale` and `logit_bias` (0 where there is
    none), with which CLIP would say yes to everything. Before a training, `prepare` fits both to θ₀'s cosines on the
    training set, such that the mean probability is the base rate, see `fit_sigmoid`; which of two images is the more
    probable to have a class stays as in θ₀.

    The heads are those of `ZeroShotClassifier`; under `"trainable"` a linear layer starts as the class embeddings and
    is trained in their place, inside the same sigmoid. s and β are trained with every head. WiSE-FT goes back to the
    class embeddings of θ₀; s, β and the threshold are no part of θ, and stay for every α what they are.

    The loss is a sum over the classes and a mean over the images, see `hf_robust.tasks.binary_losses`; labels that are
    not known count nowhere. Sets with some of the classes, or in another order, are answered by the rows of the head,
    and only the set's own classes count.

    Args:
        model: as in `ZeroShotClassifier`.
        processor: likewise.
        class_names: likewise.
        templates: likewise.
        head: likewise.
        data_names: likewise.
        loss: `"bce"`, the binary cross-entropy, or `"asymmetric"`.
        positive_weights: by which positive labels count in training: None for 1, a number from 0 for every class, or
            `"balanced"`, see `hf_robust.tasks.binary_losses.positive_weights`.
        threshold: the least logit that says that an image has a class, for F1; 0 is a probability of 0.5. See
            `choose_threshold`.

    Raises:
        ConfigError: the loss is unknown, positive weights or the threshold are none, or what `ZeroShotClassifier`
            raises.
        DataError: as `ZeroShotClassifier`.

    Example:
        >>> task = SeveralLabels(clip, processor, ["cat", "dog", "sofa"])
        >>> images = processor(images=[picture], return_tensors="pt")["pixel_values"]
        >>> task(images, labels=torch.tensor([[1.0, 0.0, torch.nan]])).logits.shape
        torch.Size([1, 3])
    """

    name = "several_labels"
    loss_name = "labels"
    purpose = "tell all labels of an image"
    target = "labels"
    metrics = ("mAP_macro", "mAP_micro", "f1_macro", "f1_micro", "loss")
    prepared: Tensor  # 1 where s and β have been fitted, else 0

    def __init__(
        self,
        model: nn.Module,
        processor: ProcessorMixin,
        class_names: Sequence[str],
        templates: Sequence[str] | str = "single",
        head: Literal["frozen", "live", "trainable"] = "live",
        data_names: Sequence[str] | None = None,
        loss: Literal["bce", "asymmetric"] = "bce",
        positive_weights: PositiveWeights = None,
        threshold: float = 0.0,
    ) -> None:
        if loss not in LOSSES:
            raise ConfigError("unknown loss", where="loss", got=loss, allowed=", ".join(map(repr, LOSSES)))
        if not math.isfinite(threshold):
            raise ConfigError("threshold is no logit", where="threshold", got=threshold, allowed="finite numbers")
        super().__init__(model, processor, class_names, templates, head, data_names)
        check_positive_weights(positive_weights, len(self.class_names))
        self.loss, self.positive_weights, self.threshold = loss, positive_weights, threshold
        scale, bias = logit_scale(model).detach().log(), logit_bias(model)  # 0-dim
        self.label_scale = nn.Parameter(scale)  # a logarithm, as the model's
        self.label_bias = nn.Parameter(torch.zeros_like(scale) if bias is None else bias.detach().clone())
        self.register_buffer("prepared", torch.zeros_like(scale))
        base_model(model).logit_scale.requires_grad_(False)  # those of the task are in its place

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
            pixel_values: as in `ZeroShotClassifier.forward`.
            labels: `(batch, classes)`, 1, 0, or NaN where not known.
            pixel_attention_mask: as in `ZeroShotClassifier.forward`.
            spatial_shapes: likewise.
            image_embeds: likewise.
            reference_embeds: likewise.

        Returns:
            Logits and embeddings in float32 or better, and the loss where there are labels, without positive weights.

        Raises:
            ConfigError: there are neither images nor embeddings, or both.
            DataError: labels are of another shape than the logits, or one is something else.
        """
        images = {"pixel_values": pixel_values, "pixel_attention_mask": pixel_attention_mask}
        images |= {"spatial_shapes": spatial_shapes, "image_embeds": image_embeds}
        output = super().forward(**images)
        if labels is None:
            return output
        logits: Any = output.logits
        output.loss = LOSSES[self.loss](logits, _checked(labels, logits), None).mean()
        return self.with_terms(output, {**images, "labels": labels, "reference_embeds": reference_embeds})

    # --- what a trainer asks ---

    def collator(self, images: ImageCollator) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]:
        """Returns the collator of images and several labels; a user's own stays what it is."""
        return LabelsCollator(images) if isinstance(images, ImageCollator) else images

    def check_rows(self, rows: Rows, targets: bool = True) -> None:
        """Refuses a set whose rows have labels for more or fewer classes than there are."""
        labels = rows.shown_labels if isinstance(rows, LabelledImages) else None
        classes = len(rows.class_names or self.class_names)
        if labels is not None and labels.shape[1:] != (classes,):
            allowed = f"(rows, {classes})"
            raise DataError("labels do not fit the classes", where=rows.name, got=labels.shape, allowed=allowed)

    def check_evaluation(self, rows: Rows) -> None:
        """Refuses a set in which no image has a label."""
        labels = rows.shown_labels if isinstance(rows, LabelledImages) else None
        if labels is not None and not (labels == 1).any():
            what, remedy = "no image has a label, so there is nothing to find", "Leave the set out."
            raise DataError(what, where=rows.name, got=len(labels), remedy=remedy)

    def check_training(self, rows: Rows) -> None:
        """Refuses a set of other classes, or that tells no class from its absence; names classes that no image has."""
        labels = rows.shown_labels if isinstance(rows, LabelledImages) else None
        if labels is None:
            return super().check_training(rows)
        has, lacks = ((labels == value).any(axis=0) for value in (1, 0))  # (classes,) each
        if not (has & lacks).any():
            allowed = "some images that have it and some that lack it, for one class at least"
            raise DataError("there is nothing to tell apart", where=rows.name, allowed=allowed)
        super().check_training(rows)
        never = [name for name, known in zip(self.class_names, has, strict=True) if not known]
        if never:
            names = ", ".join(map(repr, never[:MOST_SHOWN])) + (", …" if len(never) > MOST_SHOWN else "")
            what = "%s: no image has %d of the classes, which are trained to be absent: %s"
            logger.warning(what, rows.name, len(never), names)

    def prepare(self, batches: Callable[[], Iterator[Batch]], accelerator: Accelerator) -> None:
        """Fits scale and bias to θ₀'s cosines on the training set, once; what has been trained since is left alone."""
        if self.prepared:
            return
        with torch.no_grad(), evaluating(self):
            pairs = map(self._cosines_and_labels, batches())
            scale, bias = fit_sigmoid(pairs, accelerator)
            self.label_scale.fill_(math.log(scale))
            self.label_bias.fill_(bias)
            self.prepared.fill_(1)

    def training_loss(self, rows: Rows | None, args: Any, function: Callable[..., Tensor] | None) -> TaskLoss:
        """Returns the loss with positive weights, or what the user's function computes."""
        check_plain(args.class_weights, args.label_smoothing_factor, self.name)
        weights = positive_weights(self.positive_weights, rows, len(self.class_names))
        return LabelLoss(self.loss, weights, function)

    def measure(self, rows: Rows, whole: bool) -> LabelMeasure:
        """Returns what computes mean average precision, F1 at the threshold, and the loss."""
        return LabelMeasure(self.loss, self.threshold)

    def choose_threshold(self, logits: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> float:
        """Sets the threshold to the one with the best micro F1, and returns it.

        Args:
            logits: `(images, classes)`, of validation data.
            labels: `(images, classes)`, 1, 0, or -1 or NaN where not known.

        Raises:
            DataError: no image has a label, labels are names, or what `best_threshold` raises.

        Example:
            >>> predictions, labels, _ = trainer.predict(validation)
            >>> trainer.model.choose_threshold(predictions, labels)
            -1.25
        """
        self.threshold = best_threshold(logits, labels)
        return self.threshold

    def settings(self) -> dict[str, Any]:
        """Returns what `ZeroShotClassifier` does, the loss, positive weights and the threshold."""
        weights = self.positive_weights
        found = super().settings() | {"loss": self.loss, "threshold": self.threshold}
        if weights is not None:
            found["positive_weights"] = BALANCED if weights == BALANCED else list(weights)
        return found

    def take_settings(self, saved: Mapping[str, Any]) -> None:
        """Takes over the threshold, which is chosen after the training."""
        self.threshold = saved.get("threshold", self.threshold)

    def without_decay(self) -> list[str]:
        """Returns the name of the scale, which has no business at 1."""
        return ["label_scale"]

    def beside(self) -> list[str]:
        """Returns the names of scale and bias: how cosines are read, which θ₀ does not say."""
        return [*super().beside(), "label_scale", "label_bias"]

    # --- its head ---

    @contextmanager
    def classes(self, class_names: Sequence[str]) -> Iterator[None]:
        """Inside the context the task answers for the classes of another set of images, and for no others.

        Args:
            class_names: the set's classes, in the order of its labels.

        Raises:
            DataError: as at construction.
        """
        with super().classes(class_names):
            self.class_names = self.class_names[: len(class_names)]
            self._order = None if self._order is None else self._order[: len(class_names)]
            yield

    def zero_shot_head(self) -> tuple[Tensor, Tensor]:
        """Returns weight `(classes, dim)` and bias `(classes,)` of the linear layer that the text tower gives now."""
        embeds = self.encode_prompts()  # (classes, dim)
        return embeds, embeds.new_zeros(len(embeds))

    def _weight_and_bias(self, class_embeds: Tensor) -> tuple[Tensor, Tensor | None]:
        scale, bias = at_least_float32(self.label_scale).exp(), at_least_float32(self.label_bias)  # 0-dim
        if self.head == "trainable" and self._other_embeds is None:
            weight, biases = self.trained_head()
            return scale * weight, bias + biases
        return scale * class_embeds, bias

    def _answers(self, logits: Tensor, names: Sequence[str], top_k: int | None) -> list[Any]:
        ranked = best_first(logits, logits.sigmoid(), names, top_k or len(names))
        if top_k is not None:
            return ranked
        counts = (logits >= self.threshold).sum(dim=1).tolist()  # (images,)
        return [answers[:count] for answers, count in zip(ranked, counts, strict=True)]

    def _cosines_and_labels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        output = self(**{name: tensor for name, tensor in batch.items() if name != "labels"})
        return output.image_embeds @ output.class_embeds.T, batch["labels"]


def _checked(labels: Tensor, logits: Tensor) -> Tensor:
    """Labels of streams and foreign datasets show only here."""
    if labels.shape != logits.shape:
        got, allowed = tuple(labels.shape), str(tuple(logits.shape))
        raise DataError("labels do not fit the classes", where="labels", got=got, allowed=allowed)
    wrong = labels[~((labels == 0) | (labels == 1) | labels.isnan())]
    if len(wrong):
        raise DataError("label is no yes or no", where="labels", got=wrong[0].item(), allowed="1, 0, or NaN")
    return labels
