# SPDX-License-Identifier: Apache-2.0
"""What images are compared with: heads of class names and embeddings of texts, each encoded once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ProcessorMixin

from ..data.columns import Target
from ..encoders.class_embeds import class_embeddings
from ..encoders.dual_encoder import base_model, image_embeds, logit_scale, text_tokenizer
from ..encoders.preprocessing import warn_of_other_images
from ..encoders.templates import check_templates
from ..tasks.class_names import ZeroShotClassifier
from ..tasks.retrieval import embed_texts
from ..tasks.task import Task

Head = Callable[[Any], Tensor]  # from what `TextSide.embed` gives for a batch to logits `(batch, answers)`


class TextSide:
    """What the text tower gives as it is now, and what a trained head says in its place.

    Args:
        model: a dual encoder, plain or wrapped by PEFT, or a `Task` around one.
        processor: its processor.

    Example:
        >>> side = TextSide(clip, processor)
        >>> side.head(["cat", "dog"], "photo", "label")(side.embed(batch)).shape
        torch.Size([64, 2])
    """

    def __init__(self, model: nn.Module, processor: ProcessorMixin) -> None:
        self.model, self.processor = model, processor
        self.encoder = model.model if isinstance(model, Task) else model
        self._classes: dict[tuple[tuple[str, ...], tuple[str, ...]], Tensor] = {}
        self._texts: dict[tuple[tuple[str, ...], bool], Tensor] = {}

    def embed(self, inputs: Mapping[str, Tensor]) -> Any:
        """Returns what heads take of a batch of images: their embeddings, `(batch, dim)`, L2-normalised.

        Args:
            inputs: the batch.
        """
        return image_embeds(self.encoder, **inputs)

    def head(
        self,
        class_names: Sequence[str],
        templates: Sequence[str] | str,
        target: Target,
        answers: Tensor | None = None,
    ) -> Head:
        """Returns a head: the trained one where it has all these classes, else the one that the class names make.

        Args:
            class_names: one per logit; a trained head may have more, whose logits come after them.
            templates: of the prompts.
            target: what the head is asked for. A trained head answers what it was trained for.
            answers: `(answers, classes of an answer)`: indices of classes of which the largest logit is that of the
                answer; None where every class is one.
        """
        logits = self._logits(class_names, templates, target)
        if answers is None:
            return logits
        columns = answers.to(base_model(self.encoder).device)
        return lambda embeds: logits(embeds)[:, columns].amax(dim=-1)  # (batch, answers)

    def texts(self, texts: Sequence[str], truncate: bool, where: str) -> Tensor:
        """Returns embeddings of texts, `(texts, dim)`, L2-normalised; each rank encodes its share.

        Args:
            texts: of a set, each once.
            truncate: whether those that are too long are cut.
            where: the set's name, for messages.

        Raises:
            DataError: a text is too long.
        """
        key = tuple(texts), truncate
        if key not in self._texts:
            warn_of_other_images(self.encoder, self.processor)
            tokenizer = text_tokenizer(self.processor, self.encoder, truncate)
            tokenizer.check_lengths(texts, where)
            self._texts[key] = embed_texts(self.encoder, tokenizer, texts)
        return self._texts[key]

    def _logits(self, class_names: Sequence[str], templates: Sequence[str] | str, target: Target) -> Head:
        order = self._rows_of_trained_head(class_names, target)
        if order is not None:
            return lambda embeds: self.model(image_embeds=embeds).logits[:, order]
        key = tuple(class_names), tuple(check_templates(templates))
        if key not in self._classes:  # SigLIP's bias is the same for all answers and changes none
            embeds = class_embeddings(self.encoder, self.processor, *key)  # (classes, dim)
            self._classes[key] = logit_scale(self.encoder) * embeds
        weight = self._classes[key]  # (classes, dim)
        return lambda embeds: _products(embeds, weight)

    def _rows_of_trained_head(self, class_names: Sequence[str], target: Target) -> list[int] | None:
        model = self.model
        if not isinstance(model, ZeroShotClassifier) or model.head != "trainable" or model.target != target:
            return None
        return model.class_space.relate(class_names).order


def _products(embeds: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast(embeds.device.type, enabled=False):  # logits differ by less than bfloat16 resolves
        return embeds @ weight.T  # (batch, classes)
