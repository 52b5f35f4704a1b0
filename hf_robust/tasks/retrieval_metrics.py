# SPDX-License-Identifier: Apache-2.0
"""How well images find their texts and texts their image: recall, median rank and the contrastive loss of a whole set.

Similarities exist a tile at a time, and each tile serves both directions, the ranks and the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    text_of_pair: ArrayLike | Tensor | None = None,
) -> dict[str, float]:
    """Returns recall@1, 5 and 10 and median ranks of image-text retrieval, both ways, and the loss of the whole set.

    Counted as CLIP_benchmark does: an image has found a text if any of its own is among the k most similar ones, a
    text if its image is. Texts that say the same should be given once, with all of their images, see `distinct_texts`;
    one has found an image if any of these is among the k most similar ones, and to each of them it is right. Images
    without a text are not asked for one, but texts may find them. Ranks are
    pessimistic: a wrong answer as similar as the right one comes before it, and those are as similar that differ by no
    more than rounding (1e-6 in float32), so that results do not hang on `chunk_size`.

    Args:
        image_embeds: `(images, dim)`; they are L2-normalised here.
        text_embeds: `(texts, dim)`, likewise; they are compared in the precision and on the device of the images.
        image_of_text: `(texts,)`, the index of each text's image; or `(pairs,)`, beside `text_of_pair`.
        scale: exp(logit_scale), by which similarities are multiplied for the loss; None for no loss.
        chunk_size: images, and texts, compared at once: its square is how many similarities there are at a time, and
            memory beside the embeddings and a copy of them is up to ten times that: 160 MiB in float32.
        text_of_pair: `(pairs,)`, the index of each pair's text, no pair twice; None for one image a text.

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
    owners, labels = _pairs(image_of_text, text_of_pair, images, texts)  # (pairs,) each
    own = _own_similarities(images, texts, owners, labels, chunk_size)  # (pairs,)
    best_of_images, best_of_texts = _best(own, owners, len(images)), _best(own, labels, len(texts))
    found = _compare(images, texts, owners, labels, best_of_images, best_of_texts, scale, chunk_size)
    asked = best_of_images.cpu() > -math.inf  # (images,)
    metrics = {}
    if scale is not None:
        of_images = found.image_log_sums.cpu() - scale * _mean_own(own, owners, len(images))
        of_texts = found.text_log_sums.cpu() - scale * _mean_own(own, labels, len(texts))
        metrics["loss"] = (of_images[asked].mean() + of_texts.mean()).item() / 2
    metrics |= _of_ranks("image_to_text", found.wrong_before_images.cpu()[asked] + 1)
    return metrics | _of_ranks("text_to_image", found.wrong_before_texts.cpu() + 1)


def distinct_texts(texts: Sequence[Sequence[str]]) -> tuple[list[str], list[int], list[int]]:
    """Returns the texts of a set's images, each once, and which of them are whose.

    Args:
        texts: those of every image.

    Returns:
        The different texts; and `(pairs,)` each, the index of the image and that of the text of every pair.

    Example:
        >>> distinct_texts([["a cat", "a pet"], ["a cat"]])
        (['a cat', 'a pet'], [0, 0, 1], [0, 1, 0])
    """
    places: dict[str, int] = {}
    pairs: dict[tuple[int, int], None] = {}
    for image, of_image in enumerate(texts):
        for text in of_image:
            pairs[image, places.setdefault(text, len(places))] = None
    return list(places), [image for image, _ in pairs], [text for _, text in pairs]


def _best(own: Tensor, of: Tensor, length: int) -> Tensor:
    return own.new_full((length,), -math.inf).scatter_reduce(0, of, own, "amax")  # (length,)


def _mean_own(own: Tensor, of: Tensor, length: int) -> Tensor:
    of = of.cpu()
    return of.bincount(own.cpu().double(), length) / of.bincount(minlength=length)  # (length,)


@dataclass(frozen=True)
class _Found:
    wrong_before_images: Tensor  # (images,), wrong texts as similar as the best right one, or more
    wrong_before_texts: Tensor  # (texts,), likewise wrong images
    image_log_sums: Tensor  # (images,), log-sum-exp of logits over all texts
    text_log_sums: Tensor  # (texts,), over all images


def _compare(
    images: Tensor,
    texts: Tensor,
    owners: Tensor,
    labels: Tensor,
    best_of_images: Tensor,
    best_of_texts: Tensor,
    scale: float | None,
    chunk_size: int,
) -> _Found:
    tolerance = ROUNDING * torch.finfo(images.dtype).eps
    found = _Found(
        torch.zeros_like(best_of_images, dtype=torch.int64),
        torch.zeros_like(best_of_texts, dtype=torch.int64),
        torch.full_like(best_of_images, -math.inf, dtype=torch.float64),
        torch.full_like(best_of_texts, -math.inf, dtype=torch.float64),
    )
    for rows in _chunks(len(images), chunk_size):
        for columns in _chunks(len(texts), chunk_size):
            tile = images[rows] @ texts[columns].T  # (rows, columns)
            if scale is not None:
                logits = scale * tile
                for sums, dim in ((found.image_log_sums[rows], 1), (found.text_log_sums[columns], 0)):
                    torch.logaddexp(sums, logits.logsumexp(dim).double(), out=sums)
            row, column = owners - rows.start, labels - columns.start  # (pairs,)
            here = (row >= 0) & (row < len(tile)) & (column >= 0) & (column < tile.shape[1])
            tile[row[here], column[here]] = -math.inf  # what is right is not before itself
            found.wrong_before_images[rows] += (tile >= best_of_images[rows, None] - tolerance).sum(dim=1)
            found.wrong_before_texts[columns] += (tile >= best_of_texts[columns] - tolerance).sum(dim=0)
    return found


def _own_similarities(images: Tensor, texts: Tensor, owners: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
    chunks = _chunks(len(owners), chunk_size)
    return torch.cat([(images[owners[chunk]] * texts[labels[chunk]]).sum(dim=1) for chunk in chunks])  # (pairs,)


def _chunks(length: int, chunk_size: int) -> list[slice]:
    return [slice(start, start + chunk_size) for start in range(0, length, chunk_size)]


def _of_ranks(direction: str, ranks: Tensor) -> dict[str, float]:
    recalls = {f"{direction}_recall@{k}": (ranks <= k).double().mean().item() for k in RECALL_AT}
    return recalls | {f"{direction}_median_rank": ranks.double().quantile(0.5).item()}


def _pairs(
    image_of_text: ArrayLike | Tensor, text_of_pair: ArrayLike | Tensor | None, images: Tensor, texts: Tensor
) -> tuple[Tensor, Tensor]:
    if images.shape[1] != texts.shape[1]:
        got = (tuple(images.shape), tuple(texts.shape))
        raise DataError("embeddings of images and texts do not fit", got=got, allowed="(images, dim) and (texts, dim)")
    given = torch.arange(len(texts)) if text_of_pair is None else text_of_pair
    labels = _indices(given, None, len(texts), "text_of_pair", texts.device)
    owners = _indices(image_of_text, len(labels), len(images), "image_of_text", texts.device)
    without = len(texts) - len(labels.unique())
    if without:
        raise DataError("texts without an image", where="text_of_pair", got=without, allowed="0")
    return owners, labels


def _indices(given: ArrayLike | Tensor, length: int | None, below: int, where: str, device: torch.device) -> Tensor:
    found = torch.as_tensor(given, device=device)
    fits = found.ndim == 1 and (length is None or len(found) == length)
    if not fits or found.is_floating_point() or found.dtype == torch.bool:
        got, allowed = f"{tuple(found.shape)} {found.dtype}", f"({'pairs' if length is None else length},) integers"
        raise DataError("indices do not fit the texts", where=where, got=got, allowed=allowed)
    outside = found[(found < 0) | (found >= below)]
    if len(outside):
        what = "a text's image is none" if where == "image_of_text" else "a pair's text is none"
        raise DataError(what, where=where, got=int(outside[0]), allowed=f"0 to {below - 1}")
    return found.long()


def _check_settings(scale: float | None, chunk_size: int) -> None:
    if scale is not None and not 0 < scale < math.inf:
        raise ConfigError("scale is out of range", got=scale, allowed="finite numbers above 0")
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ConfigError("chunk_size is out of range", got=chunk_size, allowed="integers from 1")
