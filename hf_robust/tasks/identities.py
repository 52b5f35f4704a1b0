# SPDX-License-Identifier: Apache-2.0
"""Identities without names: people, products, animals; learned so that others are told apart, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import EvalPrediction, ProcessorMixin

from ..data.collator import ImageCollator
from ..data.draws import Draws
from ..data.embeds_cache import pretrained_image_embeds
from ..data.rows import LabelledImages
from ..data.target_collators import IdentityCollator
from ..encoders.class_embeds import evaluating
from ..encoders.dual_encoder import base_model, family, tower_modules
from ..encoders.dual_encoder import image_embeds as embed_images
from ..errors import AdapterFileError, ConfigError, DataError
from .identity_head import identity_head, mean_directions
from .identity_metrics import identity_metrics
from .identity_sampler import IdentitySampler
from .measure import Measure
from .settings import check_no_words, task_settings
from .task import Batch, Rows, Task, TaskOutput

MOST_SHOWN = 3  # identities in a message
METRICS = ("mAP@R", "recall@1", "roc_auc", "tar_at_far_1e-2", "tar_at_far_1e-3", "loss")


class IdentityMeasure(Measure):
    """Recall@1, mAP@R and verification of a set of any identities, from the embeddings of its images.

    `loss` is 1 - mAP@R: a head knows nothing of identities that it was not trained on, and 1 - mAP@R is the same
    question to all sets, from 0 for the best.

    Example:
        >>> measure = IdentityMeasure()
        >>> measure(EvalPrediction(np.eye(2)[[0, 0, 1, 1]], np.array([7, 7, 9, 9])))["recall@1"]
        1.0
    """

    def __init__(self) -> None:
        self.embeds: list[Tensor] = []
        self.labels: list[Tensor] = []

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Adds images; returns the metrics, see `identity_metrics`, and `loss`."""
        for kept, given in ((self.embeds, prediction.predictions), (self.labels, prediction.label_ids)):
            kept += [torch.as_tensor(batch).cpu() for batch in (given if isinstance(given, list) else [given])]
        if not compute_result:
            return {}
        found = identity_metrics(torch.cat(self.embeds), torch.cat(self.labels))
        return found | {"loss": 1 - found["mAP@R"]}


@dataclass
class IdentitiesOutput(TaskOutput):
    """What `Identities` returns.

    Args:
        loss: 0-dim, the mean loss of the head over the batch; None without labels of its identities.
        image_embeds: `(batch, dim)`, L2-normalised.
        terms: as in `TaskOutput`.
    """

    image_embeds: Tensor | None = None
    terms: dict[str, Tensor] | None = None


class Identities(Task):
    """Embeddings in which an identity's images lie together, around a dual encoder.

    A head has a row for every identity of the training set, which starts as the direction of the mean embedding of
    its images under θ₀, see `prepare`. The loss is a cross-entropy over scaled cosines between embedding and rows:

    - `"cosine"`: as they are.
    - `"cosface"`: less a margin, 0.35, for the right row (Wang et al., 2018, arXiv 1801.09414).
    - `"arcface"`: a margin, 0.5 radians, is added to the angle of the right row (Deng et al., 2019, arXiv 1801.07698).

    Both as `pytorch-metric-learning` has them. The papers scale by 64; CLIP itself by 100. Rows are told by the label
    alone, no text is read: parameters of the text tower, scale and bias of the dual encoder stop requiring gradients.

    Other identities than those trained on are told apart by embeddings alone, and every evaluation is of these. The
    head is for training; it is kept for resuming, and is no part of what WiSE-FT interpolates.

    Args:
        model: a dual encoder, plain or a `PeftModel` around one.
        processor: its processor.
        identities: integers or strings, one for every label, in their order.
        loss: `"cosine"`, `"cosface"` or `"arcface"`.
        scale: what cosines are multiplied by.
        margin: of a cosine for `"cosface"`, in radians for `"arcface"`; None for the paper's.
        images_per_identity: of each identity in a batch, see `IdentitySampler`; None for shuffled images.

    Raises:
        ConfigError: the model is no supported dual encoder, the loss is unknown, or a number out of range.
        DataError: there are fewer than two identities, or one is repeated.

    Example:
        >>> clip = CLIPModel.from_pretrained("openai/clip-vit-base-patch32")
        >>> processor = CLIPProcessor.from_pretrained("openai/clip-vit-base-patch32")
        >>> identities = Identities(clip, processor, [4711, 4712, 9000])
        >>> batches = partial(batches_in_order, photos, ImageCollator(processor), 64, 0, clip.device, None)
        >>> identities.prepare(batches, Accelerator())
        >>> identities(**ImageCollator(processor)(photos[:8])).loss
    """

    name = "identities"
    loss_name = "identities"
    purpose = "tell identities apart by their embeddings"
    pipeline_tag = "image-feature-extraction"
    target = "identity"
    kept_outputs = ("image_embeds",)
    metrics = METRICS
    output_type = IdentitiesOutput
    batch_loss = False
    trains_encoder = True

    def __init__(
        self,
        model: nn.Module,
        processor: ProcessorMixin,
        identities: Sequence[int] | Sequence[str],
        loss: Literal["cosine", "cosface", "arcface"] = "arcface",
        scale: float = 64.0,
        margin: float | None = None,
        images_per_identity: int | None = None,
    ) -> None:
        super().__init__(model, processor)
        self.identities, self.images_per_identity = _checked_identities(identities), images_per_identity
        self.loss, self.scale, self.margin = loss, scale, margin
        self._others = False  # inside `answering`, where labels are those of other identities
        base, dim = base_model(model), _dim(model, processor)
        self.head = identity_head(len(self.identities), dim, loss, scale, margin, base.logit_scale)
        for name in tower_modules(model, "text"):
            base.get_submodule(name).requires_grad_(False)
        base.logit_scale.requires_grad_(False)
        if family(model).logit_bias:
            base.logit_bias.requires_grad_(False)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        image_embeds: Tensor | None = None,
        reference_embeds: Tensor | None = None,
    ) -> IdentitiesOutput:
        """Embeds images.

        Args:
            pixel_values: `(batch, channels, height, width)`, for SigLIP 2 `(batch, patches, patch pixels)`.
            labels: `(batch,)`, indices into `identities`; inside `answering` those of other identities, not looked at.
            pixel_attention_mask: `(batch, patches)`, SigLIP 2 only.
            spatial_shapes: `(batch, 2)`, SigLIP 2 only.
            image_embeds: `(batch, dim)`, L2-normalised: embeddings in the place of images, see `with_image_embeds`.
            reference_embeds: `(batch, dim)`, θ₀'s, for the terms of the loss.

        Returns:
            Embeddings in float32 or better, and the loss where there are labels of its identities.

        Raises:
            ConfigError: there are neither images nor embeddings, or both; or the head has not started.
            DataError: a label is no index into `identities`.
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
        output = IdentitiesOutput(image_embeds=embeds)
        if labels is not None and not self._others:
            output.loss = self._loss(embeds, labels)
        return self.with_terms(output, inputs)

    def _loss(self, embeds: Tensor, labels: Tensor) -> Tensor:
        if not self.head.W[:, 0].any():
            remedy = "Call prepare(...) with the training set; RobustTrainer does."
            raise ConfigError("the head has not started", where="head.W", got="rows of zeros", remedy=remedy)
        wrong = labels[(labels < 0) | (labels >= len(self.identities))]  # on a GPU, PyTorch would abort
        if len(wrong):
            allowed = f"0 to {len(self.identities) - 1}"
            raise DataError("label is no identity", where="labels", got=int(wrong[0]), allowed=allowed)
        with torch.autocast(embeds.device.type, enabled=False):  # cosines differ by less than bfloat16 resolves
            return self.head(embeds, labels)

    # --- what a trainer asks ---

    @classmethod
    def build(
        cls, model: nn.Module, processor: ProcessorMixin, rows: Rows | None, class_names: Any, args: Any
    ) -> Identities:
        """Builds the head of a training set's identities, with the settings of the task."""
        check_no_words(class_names, args, "identities")
        if rows is None:
            raise ConfigError("a head of identities is made of a training set", where="train_dataset")
        return cls(model, processor, _identities_of(rows), **task_settings(args.task))

    def collator(self, images: ImageCollator) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]:
        """Returns what adds identities to a batch of images; a user's own collator stays what it is."""
        return IdentityCollator(images) if isinstance(images, ImageCollator) else images

    def check_evaluation(self, rows: Rows) -> None:
        """Refuses a set in which no image has another one of its identity, or all are of one."""
        counts = np.unique(_labels_of(rows), return_counts=True)[1]  # (identities,)
        if len(counts) < 2 or counts.max() < 2:
            what = "there is nothing to tell apart, or to find again"
            allowed = "2 identities or more, one with 2 images or more"
            raise DataError(what, where=rows.name, got=counts[:MOST_SHOWN].tolist(), allowed=allowed)

    def check_training(self, rows: Rows) -> None:
        """Refuses a set of other identities, or with one that has a single image."""
        if _identities_of(rows) != self.identities:
            what, remedy = "the training set has other identities than the head", "Build a new RobustTrainer for it."
            raise DataError(what, where=rows.name, got=_identities_of(rows)[:MOST_SHOWN], remedy=remedy)
        counts = np.bincount(_labels_of(rows), minlength=len(self.identities))  # (identities,)
        single = np.flatnonzero(counts < 2)
        if len(single):
            names = [self.identities[index] for index in single[:MOST_SHOWN]]
            remedy = "Leave their images out, dataset.filter(...), or add some; there is nothing to hold together."
            what = f"{len(single)} of {len(counts)} identities have fewer than two images"
            raise DataError(what, where=rows.name, got=names, allowed="2 images of every identity", remedy=remedy)

    def prepare(self, batches: Callable[[], Iterator[Batch]], accelerator: Accelerator) -> None:
        """Starts the head from the training set's embeddings under θ₀; one that has started stays as it is.

        Args:
            batches: yields this rank's share of the training set, each image once.
            accelerator: adds up what ranks have found.

        Raises:
            DataError: an identity has no image, or its embeddings cancel.
            NonFiniteError: an embedding is NaN or infinite.
        """
        if self.head.W.any():
            return
        with torch.no_grad():
            found = ((pretrained_image_embeds(self.model, batch), batch["labels"]) for batch in batches())
            self.head.W.copy_(mean_directions(found, len(self.identities), accelerator).T)

    def sampler(self, rows: Rows, batch_size: int, draws: Draws) -> Sampler[int] | None:
        """Returns what puts several images of an identity into a batch; None for shuffled images."""
        if self.images_per_identity is None:
            return None
        return IdentitySampler(_labels_of(rows), self.images_per_identity, batch_size, draws)

    def beside(self) -> list[str]:
        """Returns the names of the head and of the parameters of terms, which are no part of θ."""
        return [*super().beside(), *(f"head.{name}" for name, _ in self.head.named_parameters())]

    @contextmanager
    def answering(self, rows: Rows) -> Iterator[None]:
        """Inside the context there is no loss, as the labels of a set are those of its own identities."""
        before, self._others = self._others, True
        try:
            yield
        finally:
            self._others = before

    def knows(self, rows: Rows) -> bool:
        """Whether all identities of a set have a row in the head."""
        return set(_identities_of(rows)) <= set(self.identities)

    def measure(self, rows: Rows, whole: bool) -> IdentityMeasure:
        """Returns what computes recall@1, mAP@R and verification."""
        return IdentityMeasure()

    def settings(self) -> dict[str, Any]:
        """Returns identities, loss, scale, margin, and images of an identity in a batch."""
        names = ("identities", "loss", "scale", "margin", "images_per_identity")
        return {name: getattr(self, name) for name in names}

    def check_settings(self, saved: Mapping[str, Any], where: str) -> None:
        """Refuses a checkpoint of other identities or another loss."""
        for name in ("identities", "loss", "scale", "margin"):
            if name not in saved or saved[name] != getattr(self, name):
                what = f"checkpoint is of another head of identities: {name} differs"
                raise AdapterFileError(what, where=where, got=saved.get(name))


@torch.no_grad()
def _dim(model: nn.Module, processor: ProcessorMixin) -> int:
    """Of its embeddings; families say it in different places, or nowhere."""
    inputs: Any = processor.image_processor(images=[Image.new("RGB", (32, 32))], return_tensors="pt")
    with evaluating(model):
        return embed_images(model, **inputs.to(base_model(model).device)).shape[1]


def _checked_identities(identities: Sequence[int] | Sequence[str]) -> list[str]:
    found = list(map(str, identities))
    if len(found) < 2:
        what = "there is nothing to tell apart: one identity"
        raise DataError(what, where="identities", got=found, allowed="2 identities or more")
    if len(set(found)) < len(found):
        raise DataError("an identity is repeated", where="identities", got=max(found, key=found.count))
    return found


def _labels_of(rows: Rows) -> np.ndarray:
    """`(rows,)`, indices into `_identities_of`."""
    labels = rows.shown_labels if isinstance(rows, LabelledImages) else None
    if labels is None:
        remedy = "Use a datasets.Dataset, or a torch dataset with .targets."
        raise DataError("identities are known only when a row is read", where=rows.name, remedy=remedy)
    return labels


def _identities_of(rows: Rows) -> list[str]:
    return list(map(str, range(int(_labels_of(rows).max()) + 1))) if rows.class_names is None else rows.class_names
