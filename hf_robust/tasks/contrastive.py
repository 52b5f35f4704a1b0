# SPDX-License-Identifier: Apache-2.0
"""Contrastive losses of images and their texts, over the batch of all ranks together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from .gather import gather_rows, n_ranks, rank, row_counts

RepeatedTexts = Literal["ignore", "positive", "negative"]


@dataclass(frozen=True)
class PairBatch:
    """Images and texts of all ranks, and which of them are this rank's.

    Args:
        image_embeds: `(images, dim)`, L2-normalised.
        text_embeds: `(texts, dim)`, L2-normalised.
        image_of_text: `(texts,)`, the index of each text's image.
        text_ids: `(texts,)`, integers, equal for texts that say the same.
        own_images: this rank's rows of `image_embeds`.
        own_texts: this rank's rows of `text_embeds`.
        ranks: how many there are.
    """

    image_embeds: Tensor
    text_embeds: Tensor
    image_of_text: Tensor
    text_ids: Tensor
    own_images: slice
    own_texts: slice
    ranks: int = 1


def gather_pairs(
    image_embeds: Tensor, text_embeds: Tensor, image_of_text: Tensor, text_keys: Tensor, over_ranks: bool = True
) -> PairBatch:
    """Brings the pairs of all ranks together, with gradient.

    Args:
        image_embeds: `(images, dim)`, this rank's.
        text_embeds: `(texts, dim)`, likewise.
        image_of_text: `(texts,)`, the index of each text's image among this rank's.
        text_keys: `(texts, tokens)`, integers: texts with equal rows say the same. As many tokens on all ranks.
        over_ranks: whether those of other ranks count; then all ranks must take part.

    Example:
        >>> pairs = gather_pairs(images, texts, torch.arange(8), token_ids)
        >>> softmax_loss(pairs, logit_scale(clip))
        tensor(0.3125, grad_fn=<DivBackward0>)
    """
    ranks, own = (n_ranks(), rank()) if over_ranks else (1, 0)
    of_images, of_texts = [row_counts(e) if ranks > 1 else [len(e)] for e in (image_embeds, text_embeds)]
    first_image, first_text = sum(of_images[:own]), sum(of_texts[:own])
    image_of_text = image_of_text + first_image
    if ranks > 1:
        image_embeds, text_embeds = gather_rows(image_embeds, of_images), gather_rows(text_embeds, of_texts)
        image_of_text, text_keys = gather_rows(image_of_text, of_texts), gather_rows(text_keys, of_texts)
    return PairBatch(
        image_embeds,
        text_embeds,
        image_of_text,
        text_keys.unique(dim=0, return_inverse=True)[1],
        slice(first_image, first_image + of_images[own]),
        slice(first_text, first_text + of_texts[own]),
        ranks,
    )


def softmax_loss(
    pairs: PairBatch,
    scale: Tensor,
    repeated_texts: RepeatedTexts = "ignore",
    label_smoothing: float = 0.0,
    margin: float = 0.0,
) -> Tensor:
    """Returns the symmetric cross-entropy over a batch: CLIP's, with several positives MPM-NCE's.

    For an image with the texts P among m, and logits l_j = scale * (V·T_j + margin * [j not in P]), it is
    -Σ_j y_j log softmax_j(l) with y = (1 - ε) / |P| on P and ε / (m - |P|) elsewhere; for a text among images the
    same. The mean over images and the mean over texts are halved. With one text an image, no margin and ε = 0 that is
    the InfoNCE of Learning Transferable Visual Models From Natural Language Supervision (https://huggingface.co/papers/2103.00020),
    otherwise MPM-NCE of Efficient and Versatile Robust Fine-Tuning of Zero-shot Models
    (https://huggingface.co/papers/2408.05749).

    On several ranks each computes the rows of its own images and texts against all columns, so that the mean over
    ranks is the loss of one process with the whole batch, and so are its gradients under DDP.

    Args:
        pairs: what `gather_pairs` returned.
        scale: 0-dim, exp(logit_scale).
        repeated_texts: what an image's text is to another image whose text says the same: `"ignore"`, out of its sum;
            `"positive"`, its own, too; `"negative"`, a wrong answer, as CLIP and FLYP have it. The default claims
            nothing: that a wrong answer is right, a model can't learn, and that an image fits another's text as well
            as the one that was written for it, nobody has said.
        label_smoothing: ε.
        margin: δ, by which negatives are made harder.

    Returns:
        0-dim, in float32 or better.

    Raises:
        ConfigError: a setting is out of range.

    Example:
        >>> pairs = gather_pairs(torch.eye(2), torch.eye(2), torch.arange(2), torch.eye(2).long())
        >>> softmax_loss(pairs, torch.tensor(1.0))
        tensor(0.3133)
    """
    check_loss_settings(repeated_texts, label_smoothing, margin)
    how = scale, repeated_texts, label_smoothing, margin
    of_images = _softmax_rows(_image_side(pairs), *how)  # (own images,)
    of_texts = _softmax_rows(_text_side(pairs), *how)  # (own texts,)
    image_mean = of_images.sum() / len(pairs.image_embeds)
    return pairs.ranks * (image_mean + of_texts.sum() / len(pairs.text_embeds)) / 2


def sigmoid_loss(pairs: PairBatch, scale: Tensor, bias: Tensor, repeated_texts: RepeatedTexts = "ignore") -> Tensor:
    """Returns SigLIP's loss over a batch: every image with every text is a yes or a no.

    The mean over images of -Σ_j log σ(z_j (scale * V·T_j + bias)), z = 1 for their own texts and -1 for others
    (Sigmoid Loss for Language Image Pre-Training, https://huggingface.co/papers/2303.15343). Of ranks as in
    `softmax_loss`.

    Args:
        pairs: what `gather_pairs` returned.
        scale: 0-dim, exp(logit_scale).
        bias: 0-dim, the logit bias.
        repeated_texts: as in `softmax_loss`.

    Returns:
        0-dim, in float32 or better.

    Raises:
        ConfigError: `repeated_texts` is unknown.

    Example:
        >>> pairs = gather_pairs(torch.eye(2), torch.eye(2), torch.arange(2), torch.eye(2).long())
        >>> sigmoid_loss(pairs, torch.tensor(1.0), torch.tensor(0.0))
        tensor(1.0064)
    """
    check_loss_settings(repeated_texts)
    side = _image_side(pairs)
    positive, ignored = side.relations(repeated_texts)
    logits = scale * side.similarity + bias  # (own images, texts)
    losses = -F.logsigmoid(torch.where(positive, logits, -logits))  # (own images, texts)
    return pairs.ranks * losses.masked_fill(ignored, 0).sum() / len(pairs.image_embeds)


def check_loss_settings(repeated_texts: str, label_smoothing: float = 0.0, margin: float = 0.0) -> None:
    """Refuses settings of the losses that are none.

    Args:
        repeated_texts: as in `softmax_loss`.
        label_smoothing: likewise.
        margin: likewise.

    Raises:
        ConfigError: one is out of range.
    """
    if repeated_texts not in ("ignore", "positive", "negative"):
        allowed = "'ignore', 'positive', 'negative'"
        raise ConfigError("unknown setting", where="repeated_texts", got=repeated_texts, allowed=allowed)
    if not 0 <= label_smoothing < 1:
        what = "label smoothing is out of range"
        raise ConfigError(what, where="label_smoothing", got=label_smoothing, allowed="[0, 1)")
    if not 0 <= margin < math.inf:
        raise ConfigError("margin is out of range", where="margin", got=margin, allowed="finite numbers from 0")


def similarities(rows: Tensor, columns: Tensor) -> Tensor:
    """Returns the inner product of every row with every column, `(rows, columns)`, out of autocast.

    Args:
        rows: `(rows, dim)`, embeddings.
        columns: `(columns, dim)`, likewise.
    """
    with torch.autocast(rows.device.type, enabled=False):  # similarities differ by less than bfloat16 resolves
        return rows @ columns.T


@dataclass(frozen=True)
class _Side:
    """This rank's images (or texts) × all texts (or images).

    Args:
        similarity: `(rows, columns)`.
        own: `(rows, columns)`, which belong together.
        repeated: `(rows, columns)`, which do not, but whose text says the same as one that does.
    """

    similarity: Tensor
    own: Tensor
    repeated: Tensor

    def relations(self, repeated_texts: RepeatedTexts) -> tuple[Tensor, Tensor]:
        """What is positive, and what is ignored."""
        if repeated_texts == "negative":
            return self.own, torch.zeros_like(self.own)
        if repeated_texts == "positive":
            return self.own | self.repeated, torch.zeros_like(self.own)
        return self.own, self.repeated


def _softmax_rows(
    side: _Side, scale: Tensor, repeated_texts: RepeatedTexts, label_smoothing: float, margin: float
) -> Tensor:
    similarity, (positive, ignored) = side.similarity, side.relations(repeated_texts)
    negative = (~(positive | ignored)).to(similarity)  # (rows, columns)
    logits = (scale * (similarity + margin * negative)).masked_fill(ignored, -math.inf)
    log_p = logits.log_softmax(dim=1).masked_fill(ignored, 0)  # (rows, columns); 0 * -inf would be NaN
    negatives = negative.sum(dim=1, keepdim=True)  # (rows, 1); without any, nothing is smoothed
    smoothing = label_smoothing * (negatives > 0).to(similarity)
    of_positive = (1 - smoothing) / positive.sum(dim=1, keepdim=True)
    targets = positive * of_positive + negative * smoothing / negatives.clamp(min=1)  # (rows, columns)
    return -(targets * log_p).sum(dim=1)


def _image_side(pairs: PairBatch) -> _Side:
    images, rows = pairs.image_embeds[pairs.own_images], pairs.own_texts  # a text is where its image is
    first = pairs.own_images.start
    same = pairs.text_ids[rows, None] == pairs.text_ids  # (own texts, texts)
    own, repeated = _pairing(pairs.image_of_text[rows] - first, same, pairs.image_of_text - first, len(images))
    return _Side(similarities(images, pairs.text_embeds), own, repeated)


def _text_side(pairs: PairBatch) -> _Side:
    rows = pairs.own_texts
    same = pairs.text_ids[:, None] == pairs.text_ids[rows]  # (texts, own texts)
    own, repeated = _pairing(pairs.image_of_text, same, pairs.image_of_text[rows], len(pairs.image_embeds))
    return _Side(similarities(pairs.text_embeds[rows], pairs.image_embeds), own.T, repeated.T)


def _pairing(image_of_row: Tensor, same: Tensor, image_of_column: Tensor, n_images: int) -> tuple[Tensor, Tensor]:
    own = torch.arange(n_images, device=same.device)[:, None] == image_of_column  # (images, columns)
    counts = same.new_zeros(n_images, same.shape[1], dtype=torch.float32)  # of texts of the image that say the same
    return own, (counts.index_add_(0, image_of_row, same.float()) > 0) & ~own
