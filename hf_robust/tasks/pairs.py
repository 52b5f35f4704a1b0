# SPDX-License-Identifier: Apache-2.0
"""Images and their texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ProcessorMixin

from ..data.collator import ImageCollator
from ..data.rows import LabelledImages
from ..data.target_collators import TextCollator
from ..encoders.chunks import check_chunk_size, in_chunks
from ..encoders.class_embeds import evaluating
from ..encoders.dual_encoder import base_model, family, logit_bias, logit_scale, text_embeds, text_tokenizer
from ..errors import AdapterFileError, ConfigError, DataError
from .contrastive import RepeatedTexts, check_loss_settings, gather_pairs, sigmoid_loss, softmax_loss
from .retrieval import METRICS, RetrievalMeasure, SetTexts, set_texts
from .settings import check_no_words, task_settings
from .task import Rows, Task, TaskOutput, chunk_size

LARGEST_SCALE = math.log(100)  # of logit_scale, as in CLIP's training
NO_TOKEN = -1


@dataclass
class PairsOutput(TaskOutput):
    """What `ImageTextPairs` returns.

    Args:
        loss: 0-dim, over the batch of all ranks in training, over this one's else; None without texts.
        image_embeds: `(batch, dim)`, L2-normalised.
        text_embeds: `(texts, dim)`, L2-normalised; None without texts.
        terms: as in `TaskOutput`.
    """

    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    terms: dict[str, Tensor] | None = None


class ImageTextPairs(Task):
    """Images and texts that are told apart from the others of the batch.

    The loss is that of the model's pre-training: CLIP's softmax over the batch, or SigLIP's sigmoid of every pair, see
    `softmax_loss` and `sigmoid_loss`; in training over the batch of all ranks, and of all micro-batches of an
    optimizer step. An image with several texts in the batch has all of them as positives.

    `logit_scale` is trained with the model, and its bias under the sigmoid; an adapter leaves both as they are. The
    softmax's scale never gets above 100, as in CLIP's training, and neither gets weight decay.

    An evaluation embeds all texts of a set, and asks for each image's and each text's own among the whole set.

    Args:
        model: a dual encoder, plain or a `PeftModel` around one.
        processor: its processor.
        loss: `"softmax"` or `"sigmoid"`; None for that of the model's family.
        repeated_texts: what texts that say the same are to each other's images: `"ignore"`, `"positive"` or
            `"negative"`, see `softmax_loss`.
        label_smoothing: of the softmax, ε of MPM-NCE.
        margin: of the softmax, δ of MPM-NCE.
        texts: `"one"` of a row's texts, drawn for each epoch, or `"all"`.
        contrastive_chunk_size: images, and texts, that are embedded at once in training; memory is that of one chunk,
            for one forward more. The result is the same. None for all at once.
        truncate: whether texts longer than the text tower are cut; else they are refused.

    Raises:
        ConfigError: the model is no supported dual encoder, or a setting is out of range or not one of the loss.

    Example:
        >>> pairs = ImageTextPairs(clip, processor)
        >>> inputs = processor(images=pictures, text=["two dogs", "a cat"], return_tensors="pt", padding=True)
        >>> pairs(**inputs, image_of_text=torch.tensor([0, 1])).loss
        tensor(0.0312, grad_fn=<DivBackward0>)
    """

    name = "pairs"
    loss_name = "contrastive"
    purpose = "find the texts of an image, and the images of a text"
    target = "text"
    label_names = ("rows",)
    kept_outputs = ("image_embeds",)
    metrics = METRICS
    output_type = PairsOutput
    batch_loss = False
    whole_batch = True

    def __init__(
        self,
        model: nn.Module,
        processor: ProcessorMixin,
        loss: Literal["softmax", "sigmoid"] | None = None,
        repeated_texts: RepeatedTexts = "ignore",
        label_smoothing: float = 0.0,
        margin: float = 0.0,
        texts: Literal["one", "all"] = "one",
        contrastive_chunk_size: int | None = None,
        truncate: bool = False,
    ) -> None:
        super().__init__(model, processor)
        has_bias = family(model).logit_bias
        self.loss = ("sigmoid" if has_bias else "softmax") if loss is None else loss
        self.repeated_texts, self.label_smoothing, self.margin = repeated_texts, label_smoothing, margin
        self.texts, self.contrastive_chunk_size = texts, contrastive_chunk_size
        self.tokenizer, self.truncates = text_tokenizer(processor, model, truncate), truncate
        self._set: SetTexts | None = None  # inside `answering`
        self._check(has_bias)
        if has_bias and self.loss == "softmax":  # moves no probability: its gradient is rounding noise
            base_model(model).logit_bias.requires_grad_(False)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_of_text: Tensor | None = None,
        rows: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        image_embeds: Tensor | None = None,
        reference_embeds: Tensor | None = None,
    ) -> PairsOutput:
        """Embeds images and texts, and compares them.

        Args:
            pixel_values: `(batch, channels, height, width)`, for SigLIP 2 `(batch, patches, patch pixels)`.
            input_ids: `(texts, tokens)`; inside `answering` the texts of the set take their place.
            attention_mask: `(texts, tokens)`, where the tower uses one.
            image_of_text: `(texts,)`, which image of the batch each text is of; None for one text an image, in order.
            rows: `(batch,)`, the images' places in their set, for metrics.
            pixel_attention_mask: `(batch, patches)`, SigLIP 2 only.
            spatial_shapes: `(batch, 2)`, SigLIP 2 only.
            image_embeds: `(batch, dim)`, L2-normalised: embeddings in the place of images, see `with_image_embeds`.
            reference_embeds: `(batch, dim)`, θ₀'s, for the terms of the loss.

        Returns:
            Embeddings in float32 or better, and the loss where there are texts, but not inside `answering`: that of
            the whole set is among its metrics.

        Raises:
            ConfigError: there are neither images nor embeddings, or both.
            DataError: an image has no text.
        """
        if self.training:
            self.after_step()  # where no trainer has called it
        inputs = {
            "pixel_values": pixel_values,
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "pixel_attention_mask": pixel_attention_mask,
            "spatial_shapes": spatial_shapes,
            "image_embeds": image_embeds,
            "reference_embeds": reference_embeds,
        }
        size = chunk_size(self, self.contrastive_chunk_size)
        embeds = self.embed(inputs, size)  # (batch, dim)
        if self._set is not None or input_ids is None:
            return PairsOutput(image_embeds=embeds)
        of_texts = in_chunks(partial(text_embeds, self.model), (input_ids, attention_mask), size)  # (texts, dim)
        owners = torch.arange(len(of_texts), device=embeds.device) if image_of_text is None else image_of_text
        loss = self._loss(embeds, of_texts, owners, self._text_keys(input_ids, attention_mask))
        output = PairsOutput(loss=loss, image_embeds=embeds, text_embeds=of_texts)
        return self.with_terms(output, {**inputs, "image_of_text": owners})

    @torch.no_grad()
    def after_step(self) -> None:
        """Brings the softmax's scale, where it is trained, back to 100 at most.

        The parameter itself is cut, so that the gradient can move it again, and a resumed training goes on as one that
        was not stopped.
        """
        scale = base_model(self.model).logit_scale
        if self.loss == "softmax" and scale.requires_grad:
            scale.clamp_(max=LARGEST_SCALE)

    # --- what a trainer asks ---

    @classmethod
    def build(
        cls, model: nn.Module, processor: ProcessorMixin, rows: Rows | None, class_names: Any, args: Any
    ) -> ImageTextPairs:
        """Builds the task with the settings of the arguments."""
        check_no_words(class_names, args, "pairs of images and texts")
        return cls(model, processor, **task_settings(args.task))

    def collator(self, images: ImageCollator) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]:
        """Returns the collator of images and texts; one of the user's own makes both."""
        return TextCollator(images, self.tokenizer, self.texts) if isinstance(images, ImageCollator) else images

    def check_rows(self, rows: Rows, targets: bool = True) -> None:
        """Refuses a set with a text that the text tower would not read to its end."""
        texts = rows.texts if isinstance(rows, LabelledImages) else None
        if isinstance(rows, LabelledImages) and texts is not None:
            places = np.repeat(rows.numbers, [len(of_row) for of_row in texts])  # (texts,)
            self.tokenizer.check_lengths([text for of_row in texts for text in of_row], rows.name, places)

    def check_evaluation(self, rows: Rows) -> None:
        """Refuses a set whose texts show only when a row is read: retrieval is among all of them."""
        if not isinstance(rows, LabelledImages) or rows.texts is None:
            what, got = "retrieval is among all texts of a set, which are not known", type(rows.rows).__name__
            raise DataError(what, where=rows.name, got=got, allowed="a datasets.Dataset with texts")

    def check_training(self, rows: Rows) -> None:
        """Refuses a set of one image, or in which all texts say the same."""
        texts = rows.texts if isinstance(rows, LabelledImages) else None
        if texts is None:
            return
        if len(texts) < 2:
            what = "there is nothing to tell apart: one image"
            raise DataError(what, where=rows.name, got=len(texts), allowed="2 images or more")
        different = {text for of_row in texts for text in of_row}
        if len(different) < 2:
            what = "there is nothing to tell apart: all texts are the same"
            raise DataError(
                what, where=rows.name, got=next(iter(different), None), allowed="2 different texts or more"
            )

    def without_decay(self) -> list[str]:
        """Returns the names of scale and bias."""
        base = base_model(self.model)
        free = [base.logit_scale] + ([base.logit_bias] if family(self.model).logit_bias else [])
        return [name for name, parameter in self.named_parameters() if any(parameter is one for one in free)]

    @contextmanager
    def answering(self, rows: Rows) -> Iterator[None]:
        """Inside the context images are asked for among all texts of a set, from the text tower as it is now."""
        texts = rows.texts if isinstance(rows, LabelledImages) else None
        before = self._set
        if texts is not None:
            with evaluating(self.model):
                self._set = set_texts(self.model, self.tokenizer, texts)
        else:
            self._set = None
        try:
            yield
        finally:
            self._set = before

    def measure(self, rows: Rows, whole: bool) -> RetrievalMeasure:
        """Returns what computes recalls, median ranks and loss; to be asked for inside `answering`."""
        if self._set is None:
            what, got = "retrieval is among all texts of a set, which are not known", type(rows.rows).__name__
            allowed = "a datasets.Dataset with texts, evaluated in `answering`"
            raise DataError(what, where=rows.name, got=got, allowed=allowed)
        return RetrievalMeasure(self._set, logit_scale(self.model).item())

    def settings(self) -> dict[str, Any]:
        """Returns the settings by which it is built again."""
        names = "loss", "repeated_texts", "label_smoothing", "margin", "texts", "contrastive_chunk_size"
        return {**{name: getattr(self, name) for name in names}, "truncate": self.tokenizer.truncate}

    def check_settings(self, saved: Mapping[str, Any], where: str) -> None:
        """Refuses a checkpoint of another loss."""
        if saved.get("loss") != self.loss:
            what = "checkpoint is of another loss"
            raise AdapterFileError(what, where=where, got=saved.get("loss"), allowed=repr(self.loss))

    # --- its parts ---

    def _check(self, has_bias: bool) -> None:
        check_loss_settings(self.repeated_texts, self.label_smoothing, self.margin)
        check_chunk_size(self.contrastive_chunk_size, "contrastive_chunk_size")
        for where, got, known in (("loss", self.loss, ("softmax", "sigmoid")), ("texts", self.texts, ("one", "all"))):
            if got not in known:
                raise ConfigError("unknown setting", where=where, got=got, allowed=", ".join(map(repr, known)))
        if self.loss == "sigmoid" and not has_bias:
            remedy = "Use loss='softmax', or a SigLIP model."
            raise ConfigError("the model has no bias for a sigmoid of every pair", where="loss", remedy=remedy)
        if self.loss == "sigmoid" and (self.label_smoothing or self.margin):
            where = "label_smoothing, margin"
            raise ConfigError(
                "these are settings of the softmax", where=where, got=(self.label_smoothing, self.margin)
            )

    def _loss(self, images: Tensor, texts: Tensor, image_of_text: Tensor, keys: Tensor) -> Tensor:
        counts = image_of_text.bincount(minlength=len(images))  # (images,)
        if len(counts) > len(images) or len(image_of_text) != len(texts) or not counts.all():
            where, got = "image_of_text", image_of_text.tolist()
            raise DataError("every image needs a text, and every text an image", where=where, got=got)
        pairs = gather_pairs(images, texts, image_of_text, keys, over_ranks=self.training)
        scale, bias = logit_scale(self.model), logit_bias(self.model)
        if self.loss == "sigmoid" and bias is not None:
            return sigmoid_loss(pairs, scale, bias, self.repeated_texts)
        return softmax_loss(pairs, scale, self.repeated_texts, self.label_smoothing, self.margin)

    def _text_keys(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Tokens of texts, as long on every rank, and the same however far they were padded."""
        tokens = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, NO_TOKEN)
        longest = base_model(self.model).config.text_config.max_position_embeddings
        return F.pad(tokens, (0, longest - tokens.shape[1]), value=NO_TOKEN)  # (texts, longest)
