# SPDX-License-Identifier: Apache-2.0
"""How well images find their texts and texts their image: recall, median rank and the contrastive loss of a whole set.

Similarities exist a tile at a time, and each tile serves both directions, the ranks and the loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..errors import ConfigError, DataError
from .unit_embeds import unit_embeds

RECALL_AT = (1, 5, 10)
ROUNDING = 8  # units in the last place of 1, by which a similarity may change with the shapes that are multiplied


def retrieval_metrics(
    image_embeds: ArrayLike | Tensor,
    text_embeds: ArrayLike | Tensor,
    image_of_text: ArrayLike | Tensor,
    scale: float | None = None,
    chunk_size: int = 2048,
) -> dict[str, float]:
    """Returns recall@1, 5 and 10 and median ranks of image-text retrieval, both ways, and the loss of the whole set.

    Counted as CLIP_benchmark does: an image has found a text if any of its own is among the k most similar ones, a
    text if its one image is. Images without a text are not asked for one, but texts may find them. Ranks are
    pessimistic: a wrong answer as similar as the right one comes before it, and those are as similar that differ by no
    more than rounding (1e-6 in float32), so that results do not hang on `chunk_size`.

    Args:
        image_embeds: `(images, dim)`; they are L2-normalised here.
        text_embeds: `(texts, dim)`, likewise; they are compared in the precision and on the device of the images.
        image_of_text: `(texts,)`, the index of each text's image.
        scale: exp(logit_scale), by which similarities are multiplied for the loss; None for no loss.
        chunk_size: images, and texts, compared at once: its square is how many similarities there are at a time, and
            memory beside the embeddings and a copy of them is up to ten times that: 160 MiB in float32.

    Returns:
        `loss`, CLIP's symmetric cross-entropy (arXiv 2103.00020) over the set: half the mean over images of the mean
        over their texts of -log p(text | image), and half the mean over texts of -log p(image | text);
        `image_to_text_recall@k` and `text_to_image_recall@k`, fractions; `image_to_text_median_rank` and
        `text_to_image_median_rank`, from 1.

    Raises:
        ConfigError: `scale` or `chunk_size` is out of range.
        DataError: no embeddings, shapes that do not fit, an embedding of length 0, or an index that is no image.
        NonFiniteError: an embedding is NaN or infinite.

    Example:
        >>> found = retrieval_metrics(torch.eye(3), torch.eye(3)[[0, 1, 1, 2]], [0, 0, 1, 2])
        >>> round(found["image_to_text_recall@1"], 4), found["text_to_image_recall@1"]  # texts 1 and 2 are equal
        (0.6667, 0.75)
    """
    _check_settings(scale, chunk_size)
    images = unit_embeds(image_embeds, "image_embeds")
    texts = unit_embeds(text_embeds, "text_embeds").to(images)
    owners = _owners(image_of_text, images, texts)  # (texts,)
    own = _own_similarities(images, texts, owners, chunk_size)  # (texts,)
    best = own.new_full(images.shape[:1], -math.inf).scatter_reduce(0, owners, own, "amax")  # (images,)
    found = _compare(images, texts, owners, best, own, scale, chunk_size)
    owners, own = owners.cpu(), own.cpu().double()
    texts_of_image = owners.bincount(minlength=len(images))  # (images,)
    asked = texts_of_image > 0  # (images,)
    metrics = {}
    if scale is not None:
        mean_own = owners.bincount(own, len(images)) / texts_of_image  # (images,)
        of_images = (found.image_log_sums.cpu() - scale * mean_own)[asked].mean()
        metrics["loss"] = (of_images + (found.text_log_sums.cpu() - scale * own).mean()).item() / 2
    metrics |= _of_ranks("image_to_text", found.wrong_before_images.cpu()[asked] + 1)
    return metrics | _of_ranks("text_to_image", found.wrong_before_texts.cpu() + 1)


@dataclass(frozen=True)
class _Found:
    wrong_before_images: Tensor  # (images,), wrong texts as similar as the best right one, or more
    wrong_before_texts: Tensor  # (texts,), likewise wrong images
    image_log_sums: Tensor  # (images,), log-sum-exp of logits over all texts
    text_log_sums: Tensor  # (texts,), over all images


def _compare(
    images: Tensor, texts: Tensor, owners: Tensor, best: Tensor, own: Tensor, scale: float | None, chunk_size: int
) -> _Found:
    tolerance = ROUNDING * torch.finfo(own.dtype).eps
    found = _Found(
        torch.zeros_like(best, dtype=torch.int64),
        torch.zeros_like(own, dtype=torch.int64),
        torch.full_like(best, -math.inf, dtype=torch.float64),
        torch.full_like(own, -math.inf, dtype=torch.float64),
    )
    for rows in _chunks(len(images), chunk_size):
        for columns in _chunks(len(texts), chunk_size):
            tile = images[rows] @ texts[columns].T  # (rows, columns)
            if scale is not None:
                logits = scale * tile
                for sums, dim in ((found.image_log_sums[rows], 1), (found.text_log_sums[columns], 0)):
                    torch.logaddexp(sums, logits.logsumexp(dim).double(), out=sums)
            row_of_column = owners[columns] - rows.start
            here = ((row_of_column >= 0) & (row_of_column < len(tile))).nonzero().squeeze(1)
            tile[row_of_column[here], here] = -math.inf  # what is right is not before itself
            found.wrong_before_images[rows] += (tile >= best[rows, None] - tolerance).sum(dim=1)
            found.wrong_before_texts[columns] += (tile >= own[columns] - tolerance).sum(dim=0)
    return found


def _own_similarities(images: Tensor, texts: Tensor, owners: Tensor, chunk_size: int) -> Tensor:
    chunks = _chunks(len(texts), chunk_size)
    return torch.cat([(images[owners[chunk]] * texts[chunk]).sum(dim=1) for chunk in chunks])  # (texts,)


def _chunks(length: int, chunk_size: int) -> list[slice]:
    return [slice(start, start + chunk_size) for start in range(0, length, chunk_size)]


def _of_ranks(direction: str, ranks: Tensor) -> dict[str, float]:
    recalls = {f"{direction}_recall@{k}": (ranks <= k).double().mean().item() for k in RECALL_AT}
    return recalls | {f"{direction}_median_rank": ranks.double().quantile(0.5).item()}


def _owners(image_of_text: ArrayLike | Tensor, images: Tensor, texts: Tensor) -> Tensor:
    if images.shape[1] != texts.shape[1]:
        got = (tuple(images.shape), tuple(texts.shape))
        raise DataError("embeddings of images and texts do not fit", got=got, allowed="(images, dim) and (texts, dim)")
    owners = torch.as_tensor(image_of_text, device=texts.device)
    if owners.shape != texts.shape[:1] or owners.is_floating_point() or owners.dtype == torch.bool:
        given = f"{tuple(owners.shape)} {owners.dtype}"
        what, allowed = "indices do not fit the texts", f"({len(texts)},) integers"
        raise DataError(what, where="image_of_text", got=given, allowed=allowed)
    outside = owners[(owners < 0) | (owners >= len(images))]
    if len(outside):
        allowed = f"0 to {len(images) - 1}"
        raise DataError("a text's image is none", where="image_of_text", got=int(outside[0]), allowed=allowed)
    return owners.long()


def _check_settings(scale: float | None, chunk_size: int) -> None:
    if scale is not None and not 0 < scale < math.inf:
        raise ConfigError("scale is out of range", got=scale, allowed="finite numbers above 0")
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ConfigError("chunk_size is out of range", got=chunk_size, allowed="integers from 1")
