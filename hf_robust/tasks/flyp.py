# SPDX-License-Identifier: Apache-2.0
"""Images with named classes, learned as pairs of images and prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ProcessorMixin

from ..encoders.chunks import check_chunk_size, in_chunks
from ..encoders.dual_encoder import logit_scale, text_embeds
from ..errors import ConfigError
from . import heads
from .class_names import ZeroShotClassifier, ZeroShotClassifierOutput
from .contrastive import RepeatedTexts, check_loss_settings, gather_pairs, softmax_loss
from .gather import n_ranks, rank, row_counts
from .task import Rows, Task, chunk_size
from .task_loss import TaskLoss


class FLYP(ZeroShotClassifier):
    """A classifier that is trained as CLIP was: every image with a prompt of its class, against the rest of the batch.

    Finetune Like You Pretrain (Goyal et al., CVPR 2023, https://huggingface.co/papers/2212.00638). In training each
    image gets one of the templates, drawn by seed and step, and the loss is `softmax_loss` over the batch of all ranks
    and micro-batches; only the batch's prompts are encoded, however many classes there are. `logit_scale` is trained
    and has no bound, as in the released code. An evaluation answers by the live zero-shot head of all templates, from
    the text tower as it is.

    Args:
        model: a dual encoder, plain or a `PeftModel` around one.
        processor: its processor.
        class_names: as of `ZeroShotClassifier`.
        templates: likewise.
        data_names: likewise.
        positives: what the prompts of other images of the same class are to an image: `"negative"` as in the released
            code, where k images of one class cost each of them about log k however good the model is; `"positive"` as
            its own, or `"ignore"`, left out.
        label_smoothing: ε of `softmax_loss`. MPM-NCE, the loss of R-Adapter (https://huggingface.co/papers/2408.05749),
            has `positives="positive"`, 0.02 here and a margin of 0.05.
        margin: δ of `softmax_loss`, by which wrong prompts are made harder.
        contrastive_chunk_size: images, and prompts, that are embedded at once in training, see `in_chunks`; None for
            all at once.

    Raises:
        ConfigError: as `ZeroShotClassifier`, or a setting is out of range.
        DataError: as `ZeroShotClassifier`.

    Example:
        >>> flyp = FLYP(clip, processor, ["cat", "dog"], templates="photo")
        >>> flyp.train()(inputs["pixel_values"], labels=torch.tensor([0, 1])).loss
        tensor(0.0312, grad_fn=<DivBackward0>)
        >>> flyp.eval()(inputs["pixel_values"]).logits.shape
        torch.Size([2, 2])
    """

    name = "flyp"
    loss_name = "contrastive"
    whole_batch = True

    def __init__(
        self,
        model: nn.Module,
        processor: ProcessorMixin,
        class_names: Sequence[str],
        templates: Sequence[str] | str = "single",
        head: str = "live",
        data_names: Sequence[str] | None = None,
        positives: RepeatedTexts = "negative",
        contrastive_chunk_size: int | None = None,
        label_smoothing: float = 0.0,
        margin: float = 0.0,
    ) -> None:
        if head != "live":
            raise ConfigError("FLYP trains the text tower", where="head", got=head, allowed="'live'")
        check_loss_settings(positives, label_smoothing, margin)
        check_chunk_size(contrastive_chunk_size, "contrastive_chunk_size")
        super().__init__(model, processor, class_names, templates, "live", data_names)
        self.positives, self.contrastive_chunk_size = positives, contrastive_chunk_size
        self.label_smoothing, self.margin = label_smoothing, margin

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        image_embeds: Tensor | None = None,
        reference_embeds: Tensor | None = None,
    ) -> ZeroShotClassifierOutput:
        """Compares images with their prompts where there are labels and gradients; else classifies them.

        Args:
            pixel_values: as of `ZeroShotClassifier`.
            labels: likewise.
            pixel_attention_mask: likewise.
            spatial_shapes: likewise.
            image_embeds: likewise.
            reference_embeds: likewise.

        Returns:
            Embeddings of images and of their prompts, and the loss, without logits; or what `ZeroShotClassifier`
            returns.

        Raises:
            ConfigError: as `ZeroShotClassifier`.
            DataError: likewise.
        """
        inputs = {
            "pixel_values": pixel_values,
            "labels": labels,
            "pixel_attention_mask": pixel_attention_mask,
            "spatial_shapes": spatial_shapes,
            "image_embeds": image_embeds,
            "reference_embeds": reference_embeds,
        }
        if labels is None or not torch.is_grad_enabled():
            return super().forward(**inputs)
        size = chunk_size(self, self.contrastive_chunk_size)
        embeds = self.embed(inputs, size)  # (batch, dim)
        heads.check_batch_labels(labels, len(self.class_names))
        rows = labels.cpu() * len(self.templates) + self._drawn(labels)  # (batch,), of `prompts`
        of_prompts = self._embed(rows, size)  # (batch, dim)
        own = torch.arange(len(labels), device=labels.device)
        pairs = gather_pairs(embeds, of_prompts, own, labels[:, None], over_ranks=self.training)
        loss = softmax_loss(pairs, logit_scale(self.model), self.positives, self.label_smoothing, self.margin)
        output = ZeroShotClassifierOutput(loss=loss, image_embeds=embeds, class_embeds=of_prompts, prompt_rows=rows)
        return self.with_terms(output, inputs)

    def training_loss(self, rows: Rows | None, args: Any, function: Callable[..., Tensor] | None) -> TaskLoss:
        """Returns the contrastive loss, or what the user's function computes."""
        return Task.training_loss(self, rows, args, function)

    def settings(self) -> dict[str, Any]:
        """Returns the settings by which it is built again."""
        names = ("positives", "contrastive_chunk_size", "label_smoothing", "margin")
        return {**super().settings(), **{name: getattr(self, name) for name in names}}

    def _embed(self, rows: Tensor, size: int | None) -> Tensor:
        mask = self.prompts.attention_mask
        tokens = self.prompts.input_ids[rows], None if mask is None else mask[rows]
        return in_chunks(partial(text_embeds, self.model), tokens, size)  # (batch, dim)

    def _drawn(self, labels: Tensor) -> Tensor:
        """A template for each image, by its place in the batch of all ranks, `(batch,)`, on the CPU."""
        counts, own = (row_counts(labels), rank()) if self.training and n_ranks() > 1 else ([len(labels)], 0)
        generator = self.progress.generator("templates")
        drawn = torch.randint(len(self.templates), (sum(counts),), generator=generator)
        return drawn.split(counts)[own]
