# SPDX-License-Identifier: Apache-2.0
"""The texts of a set, embedded once, and how well its images and they find each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from ..encoders.class_embeds import PROMPTS_AT_ONCE
from ..encoders.dual_encoder import base_model, text_embeds
from ..encoders.tokens import Tokenizer
from ..errors import DataError
from .gather import gather_rows, n_ranks, rank
from .measure import Measure
from .retrieval_metrics import RECALL_AT, distinct_texts, retrieval_metrics

DIRECTIONS = ("image_to_text", "text_to_image")
RECALL = "recall@1"  # the mean of both directions
METRICS = (
    RECALL,
    "loss",
    *(f"{direction}_recall@{k}" for direction in DIRECTIONS for k in RECALL_AT),
    *(f"{direction}_median_rank" for direction in DIRECTIONS),
)


@dataclass(frozen=True)
class SetTexts:
    """The different texts of a set.

    Args:
        embeds: `(texts, dim)`, L2-normalised.
        image_of_pair: `(pairs,)`, the row in the set of each pair's image.
        text_of_pair: `(pairs,)`, which of `embeds` its text is.
        images: how many there are.
    """

    embeds: Tensor
    image_of_pair: Sequence[int]
    text_of_pair: Sequence[int]
    images: int


@torch.no_grad()
def embed_texts(model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Embeds texts, some at a time; each rank a part of them, and all ranks get all.

    Args:
        model: a dual encoder, plain or wrapped by PEFT.
        tokenizer: what `text_tokenizer` returned for it.
        texts: strings.

    Returns:
        `(texts, dim)`, L2-normalised, in float32 or better, without gradient.

    Example:
        >>> embed_texts(clip, text_tokenizer(processor, clip), ["two dogs", "a cat"]).shape
        torch.Size([2, 512])
    """
    shared = len(texts) >= n_ranks()  # of fewer a rank would have none
    share = [texts[i] for i in torch.arange(len(texts)).tensor_split(n_ranks())[rank()]] if shared else texts
    embeds = embed_all(model, tokenizer, share)  # (texts of this rank, dim)
    return gather_rows(embeds) if shared else embeds


@torch.no_grad()
def embed_all(model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Embeds texts in this process, some at a time.

    Args:
        model: a dual encoder, plain or wrapped by PEFT.
        tokenizer: what `text_tokenizer` returned for it.
        texts: one or more.

    Returns:
        `(texts, dim)`, L2-normalised, in float32 or better, without gradient.
    """
    parts = []
    for start in range(0, len(texts), PROMPTS_AT_ONCE):
        tokens = tokenizer([*texts[start : start + PROMPTS_AT_ONCE]])
        inputs = {name: tensor.to(base_model(model).device) for name, tensor in tokens.items()}
        parts.append(text_embeds(model, **inputs))  # (part, dim)
    return torch.cat(parts)


def set_texts(model: nn.Module, tokenizer: Tokenizer, texts: Sequence[Sequence[str]]) -> SetTexts:
    """Embeds the different texts of a set, see `embed_texts`.

    Args:
        model: a dual encoder, plain or wrapped by PEFT.
        tokenizer: what `text_tokenizer` returned for it.
        texts: those of every row.

    Example:
        >>> set_texts(clip, tokenizer, [["two dogs", "dogs at play"], ["two dogs"]]).text_of_pair
        [0, 1, 0]
    """
    different, image_of_pair, text_of_pair = distinct_texts(texts)
    return SetTexts(embed_texts(model, tokenizer, different), image_of_pair, text_of_pair, len(texts))


class RetrievalMeasure(Measure):
    """Recalls, median ranks and loss of a set, see `retrieval_metrics`, and the mean `recall@1` of both directions.

    Args:
        texts: of the set.
        scale: exp(logit_scale).

    Example:
        >>> measure = RetrievalMeasure(SetTexts(torch.eye(2), [0, 1], [0, 1], 2), scale=100.0)
        >>> measure(EvalPrediction(np.eye(2), np.array([0, 1])))["recall@1"]
        1.0
    """

    def __init__(self, texts: SetTexts, scale: float) -> None:
        self.texts, self.scale = texts, scale
        self.seen = torch.zeros(texts.images, dtype=torch.bool)
        self.embeds = torch.zeros(texts.images, texts.embeds.shape[1], dtype=texts.embeds.dtype)  # (images, dim)

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Adds images; returns the metrics of all of them.

        Args:
            prediction: embeddings of images, and the rows of the set that they are.
            compute_result: as in `Measure`.

        Raises:
            DataError: an image of the set is missing.
        """
        given = prediction.predictions, prediction.label_ids
        embeds, rows = (batches if isinstance(batches, list) else [batches] for batches in given)
        for values, of in zip(map(torch.as_tensor, embeds), map(torch.as_tensor, rows), strict=True):
            self.embeds[of.cpu()] = values.cpu().to(self.embeds)
            self.seen[of.cpu()] = True
        if not compute_result:
            return {}
        if not self.seen.all():
            got, allowed = int(self.seen.sum()), f"all {len(self.seen)} images of the set"
            raise DataError("retrieval is among a whole set", got=got, allowed=allowed)
        texts = self.texts
        images = self.embeds.to(texts.embeds.device)
        pairs = texts.image_of_pair, texts.text_of_pair
        found = retrieval_metrics(images, texts.embeds, pairs[0], self.scale, text_of_pair=pairs[1])
        both = [found[f"{direction}_{RECALL}"] for direction in DIRECTIONS]
        return {RECALL: sum(both) / len(both), **found}
