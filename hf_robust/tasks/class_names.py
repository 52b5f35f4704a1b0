# SPDX-License-Identifier: Apache-2.0
"""A classifier whose head is made of class names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ProcessorMixin

from ..data.class_spaces import ClassSpace, class_space
from ..data.collator import ImageCollator
from ..data.columns import Target
from ..encoders.class_embeds import class_embeddings, evaluating
from ..encoders.dual_encoder import at_least_float32, logit_bias, logit_scale
from ..encoders.templates import TEMPLATES, check_templates
from . import heads
from .accuracy import AccuracyAndLoss
from .gather import n_ranks
from .measure import Measure
from .prediction import NamedClassesTask, plain_names
from .prompts import Prompts
from .sampled_classes import SampledClasses, check_sampled_loss
from .settings import task_settings
from .task import Rows, TaskOutput
from .task_loss import TaskLoss, class_weights

__all__ = ["TEMPLATES", "ZeroShotClassifier", "ZeroShotClassifierOutput", "class_embeddings"]


@dataclass
class ZeroShotClassifierOutput(TaskOutput):
    """What `ZeroShotClassifier` returns.

    Args:
        loss: 0-dim, mean cross-entropy over the batch; None without labels.
        logits: `(batch, classes)`; where classes were drawn, see `SampledClasses.spread`.
        image_embeds: `(batch, dim)`, L2-normalised.
        class_embeds: `(classes, dim)`, L2-normalised; under `head="trainable"` the directions of its rows. Where
            classes were drawn, of those alone.
        prompt_rows: `(classes,)`, on the CPU: where wordings or classes were drawn, of which of `prompts` each row of
            `class_embeds` is. None for the mean over the wordings of all classes.
        terms: as in `TaskOutput`.
    """

    logits: Tensor | None = None
    image_embeds: Tensor | None = None
    class_embeds: Tensor | None = None
    prompt_rows: Tensor | None = None
    terms: dict[str, Tensor] | None = None


class ZeroShotClassifier(NamedClassesTask):
    """An image classifier around a dual encoder: images are compared with prompts that hold the class names.

    At the start every `head` gives the zero-shot predictions of `model`, as it is when the classifier is built:
    `exp(logit_scale) * image_embeds @ class_embeddings.T`, for SigLIP plus its `logit_bias`. They differ in what is
    trained:

    - `"frozen"`: the class embeddings are computed once and stay; training does not run the text tower.
    - `"live"`: the prompts are encoded in every forward with gradients, so the text tower learns too. In train mode
      each class has one of its wordings, drawn by seed and step; in eval mode all, and without gradients the class
      embeddings are kept until the text tower gives others. Processes that train together encode a part each.
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
        text_chunk_size: live: prompts of a chunk; the backward computes the activations of each anew, so that one
            chunk's are in memory, with the same gradients. None for all at once.
        classes_per_step: live: classes that train mode compares images with: those of the micro-batch (of all
            processes), which should be fewer, and others drawn by seed and step. The loss is corrected for it, see
            `SampledClasses.spread`. None for all.

    Raises:
        ConfigError: the model is no supported dual encoder, a template has no `{}`, `head` is unknown, or a size is
            out of range or for another head than live.
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
    loss_name = "cross_entropy"
    purpose = "classify images"
    target: ClassVar[Target] = "label"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "loss")
    output_type = ZeroShotClassifierOutput
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
        text_chunk_size: int | None = None,
        classes_per_step: int | None = None,
    ) -> None:
        super().__init__(model, processor)
        heads.check_head(head, text_chunk_size=text_chunk_size, classes_per_step=classes_per_step)
        self.head = head
        self.class_names, self.templates = plain_names(class_names), check_templates(templates)
        self.class_space = ClassSpace(self.class_names, data_names)
        texts = self.class_names, self.templates
        self.prompts = Prompts(model, processor, *texts, text_chunk_size, classes_per_step)
        self._in_training = False  # inside `as_in_training`
        self._other_embeds: Tensor | None = None  # inside `classes`, of classes that have no row in the head
        self._order: list[int] | None = None  # inside `classes`, the rows of classes that have one
        if head != "live":
            self._build_head()
        heads.freeze_unused(self.model, head)

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
        inputs = {
            "pixel_values": pixel_values,
            "labels": labels,
            "pixel_attention_mask": pixel_attention_mask,
            "spatial_shapes": spatial_shapes,
            "image_embeds": image_embeds,
            "reference_embeds": reference_embeds,
        }
        embeds = self.embed(inputs)  # (batch, dim)
        if labels is not None:
            heads.check_batch_labels(labels, len(self.class_names))
        sampled, rows = self._draw(labels)
        class_embeds = self._class_embeds(rows)  # (classes, dim)
        logits = self._logits(embeds, class_embeds)  # (batch, drawn classes)
        logits = logits if sampled is None else sampled.spread(logits)  # (batch, classes)
        if self._order is not None:
            logits, class_embeds = logits[:, self._order], class_embeds[self._order]
        loss = None if labels is None else F.cross_entropy(logits, labels)
        output = ZeroShotClassifierOutput(loss, logits, embeds, class_embeds, prompt_rows=rows)
        return self.with_terms(output, inputs)

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
        heads.check_class_rows(rows, self.class_space)

    def check_training(self, rows: Rows) -> None:
        """Refuses a set of other classes, or of one class alone."""
        heads.check_training_rows(rows, self.class_space)

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

    def measure(self, rows: Rows, whole: bool) -> Measure:
        """Returns what computes accuracy and cross-entropy."""
        return AccuracyAndLoss(from_logits=whole)

    def training_loss(self, rows: Rows | None, args: Any, function: Callable[..., Tensor] | None) -> TaskLoss:
        """Returns the cross-entropy with class weights and label smoothing, or what the user's function computes."""
        images = args.train_batch_size * args.world_size
        check_sampled_loss(self.prompts.classes_per_step, images, args.label_smoothing_factor)
        weights = class_weights(args.class_weights, rows, len(self.class_names))
        return TaskLoss(weights, args.label_smoothing_factor, function)

    def settings(self) -> dict[str, Any]:
        """Returns class names, templates, head, and what the data calls the classes where that is something else."""
        found: dict[str, Any] = {name: list(getattr(self, name)) for name in ("class_names", "templates")}
        found["head"] = self.head
        if self.class_space.data_names not in (None, self.class_names):
            found["data_names"] = list(self.class_space.data_names or ())
        if self.prompts.classes_per_step is not None:
            found["classes_per_step"] = self.prompts.classes_per_step
        return found

    def check_settings(self, saved: Mapping[str, Any], where: str) -> None:
        """Refuses a checkpoint of other classes or another head."""
        heads.check_saved_head(saved, self.head, self.class_names, where)

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

    @contextmanager
    def as_in_training(self) -> Iterator[None]:
        """Inside the context eval mode draws as train mode does, in each process by itself: for SAFT's selection."""
        self._in_training = True
        try:
            yield
        finally:
            self._in_training = False

    def encode_prompts(self) -> Tensor:
        """Returns the class embeddings that the text tower gives now, `(classes, dim)`, L2-normalised."""
        return self.prompts.encode(self.model)

    def zero_shot_head(self) -> tuple[Tensor, Tensor]:
        """Returns weight `(classes, dim)` and bias `(classes,)` of the linear layer that the text tower gives now."""
        embeds, bias = self.encode_prompts(), logit_bias(self.model)  # (classes, dim), 0-dim
        return logit_scale(self.model) * embeds, embeds.new_zeros(len(embeds)) + (0.0 if bias is None else bias)

    def trained_head(self) -> tuple[Tensor, Tensor]:
        """Returns weight `(classes, dim)` and bias `(classes,)` of `head="trainable"`, in float32 or better."""
        return at_least_float32(self.class_head.weight), at_least_float32(self.class_head.bias)

    def linear_head(self) -> tuple[Tensor, Tensor | None]:
        """Returns the weight `(classes, dim)`, and the bias if any, that make the logits of image embeddings now."""
        weight, bias = self._weight_and_bias(self._class_embeds())
        rows = slice(None) if self._order is None else self._order
        return weight[rows], bias if bias is None or bias.dim() == 0 else bias[rows]

    def _build_head(self) -> None:
        with torch.no_grad(), evaluating(self.model):
            if self.head == "frozen":
                self.register_buffer("class_embeds", self.encode_prompts(), persistent=False)
                return
            weight, bias = self.zero_shot_head()
            self.class_head = nn.Linear(weight.shape[1], len(weight), device="meta")  # no draw from the global RNG
            self.class_head.weight, self.class_head.bias = nn.Parameter(weight), nn.Parameter(bias)

    def _logits(self, embeds: Tensor, class_embeds: Tensor) -> Tensor:
        weight, bias = self._weight_and_bias(class_embeds)  # (classes, dim), (classes,) or 0-dim
        with torch.autocast(embeds.device.type, enabled=False):  # logits differ by less than bfloat16 resolves
            logits = embeds @ weight.T
        return logits if bias is None else logits + bias

    def _weight_and_bias(self, class_embeds: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.head == "trainable" and self._other_embeds is None:
            return self.trained_head()
        return logit_scale(self.model) * class_embeds, logit_bias(self.model)

    def _draw(self, labels: Tensor | None) -> tuple[SampledClasses | None, Tensor | None]:
        """The classes of this step, and the prompt of each; None for all."""
        elsewhere = self._order is not None or self._other_embeds is not None  # inside `classes`
        learns = self._in_training or (self.training and torch.is_grad_enabled())
        if self.head != "live" or elsewhere or not learns:
            return None, None
        return self.prompts.draw(self.progress, labels, self._is_shared())

    def _is_shared(self) -> bool:
        """To a training step all processes come together; to evaluations and selections each as it likes."""
        return self.training and torch.is_grad_enabled() and n_ranks() > 1

    def _class_embeds(self, rows: Tensor | None = None) -> Tensor:
        if self._other_embeds is not None:
            return self._other_embeds
        if self.head == "frozen":
            return at_least_float32(self.class_embeds)
        if self.head == "trainable":
            return F.normalize(at_least_float32(self.class_head.weight), dim=-1)
        if self.training or self._in_training or torch.is_grad_enabled():
            return self.prompts.encode(self.model, rows, self._is_shared())
        return self.prompts.kept(self.model)
