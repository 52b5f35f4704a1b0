# SPDX-License-Identifier: Apache-2.0
"""How hard a task is for a dual encoder before fine-tuning: how well its zero-shot space separates the classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ProcessorMixin

from ..data.class_spaces import class_space
from ..data.collator import ImageCollator, batches_in_order
from ..data.embeds_cache import is_cacheable, pretrained_image_embeds, with_image_embeds
from ..data.labels import check_labels
from ..data.rows import LabelledImages, labelled_images
from ..encoders.class_embeds import class_embeddings
from ..encoders.pretrained import pretrained_weights
from ..errors import ConfigError, DataError, NonFiniteError
from .difficulty_report import ClassDifficulty, Silhouette, TaskDifficulty

SIMILARITIES_AT_ONCE = 4_000_000  # 32 MB in float64
WORKING_MEMORY = 128  # MiB of distances that scikit-learn holds at once
NO_LENGTH = 1e-12  # below it `normalize` does not give length 1


def task_difficulty(
    model: nn.Module,
    dataset: Any,
    class_names: Sequence[str] | None = None,
    *,
    processor: ProcessorMixin,
    templates: Sequence[str] | str = "single",
    silhouette: Silhouette = "centroid",
    sample_size: int = 10_000,
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 0,
    silent: bool = False,
) -> TaskDifficulty:
    """Measures how well the zero-shot space of a dual encoder separates the classes of a dataset, without training.

    "Quantified Task Misalignment to Inform PEFT" (Niss et al. 2024, arXiv 2402.09613) found that the silhouette of the
    zero-shot embeddings tells the difficulty of a task better than ACS, the average cosine similarity; see
    `embedding_difficulty` for both. Images are embedded once and kept on disk where `with_image_embeds` can do it.

    Args:
        model: a dual encoder. Adapters have no say: it is the pre-trained model that is measured.
        dataset: rows with `label` and `image`, or `image_embeds` of this model.
        class_names: one per class, in the order of the labels; None for those of the dataset's `ClassLabel`.
        processor: the model's processor.
        templates: prompts with `{}` in place of the class name, one such prompt, or a key of `TEMPLATES`.
        silhouette: which one, see `embedding_difficulty`; likewise the next two.
        sample_size: images that are compared with one another.
        seed: of the sample.
        batch_size: images embedded at once.
        workers: processes that open images.
        silent: without a progress bar.

    Returns:
        The measures over all images and by class.

    Raises:
        ConfigError: a setting is out of range, a template has no `{}`, or the model is no supported dual encoder.
        DataError: there are no class names or no images, an image or label cannot be used, or what
            `embedding_difficulty` raises.
        NonFiniteError: the model's embeddings are NaN or infinite.

    Example:
        >>> difficulty = task_difficulty(clip, photos, processor=processor, templates="photo")
        >>> print(difficulty)  # the figures, the hardest classes, and how to read them
        >>> plot_difficulty(difficulty).figure.savefig("difficulty.png")
    """
    _check_settings(silhouette, sample_size, seed)
    order = class_names if isinstance(class_names, Sequence) else None
    rows = labelled_images(dataset, "dataset", order=order)
    names = list(class_space(rows.class_names, class_names, "class_names").words)
    if isinstance(rows, LabelledImages) and rows.labels is not None:
        check_labels(rows.labels, len(names), rows.name)
    with pretrained_weights(model):
        class_embeds = class_embeddings(model, processor, names, templates)  # before the images: it fails sooner
    images, labels = _embed_images(model, rows, processor, batch_size, workers, silent)
    return embedding_difficulty(images, labels, class_embeds, names, silhouette, sample_size, seed)


def embedding_difficulty(
    image_embeds: Tensor,
    labels: Tensor,
    class_embeds: Tensor,
    class_names: Sequence[str] | None = None,
    silhouette: Silhouette = "centroid",
    sample_size: int = 10_000,
    seed: int = 0,
) -> TaskDifficulty:
    """Measures the difficulty of a task from zero-shot embeddings.

    ACS is the mean cosine of an image and its own class's text. The margin of an image is that cosine minus the
    highest with another class's text; its zero-shot prediction is right where the margin is above 0, a tie is wrong.

    The silhouette of a point is (b - a) / max(a, b), where a is its distance to its own class, b that to the nearest
    other class, and a distance is 1 - cosine; 0 where both are 0. How the paper builds it is not known to us, so there
    are three readings:

    - `"centroid"`: the points are the images, and the distance to a class is that to its text. It costs what the
      zero-shot predictions cost, and is above 0 exactly where they are right.
    - `"joint"`: the points are images and class texts, and the distance to a class is the mean over its points without
      the point itself (scikit-learn's). Texts are few, and lie apart from images in most dual encoders, so the images
      decide. The text of a class without images has the silhouette 0.
    - `"image_only"`: the same with images alone. An image that is the only one of its class has the silhouette 0.

    The last two compare all points with one another. Of more than `sample_size` images they take a random sample, with
    the same shares of the classes; it depends on the order of the rows, all else does not.

    Args:
        image_embeds: `(images, dim)`; lengths do not matter.
        labels: `(images,)`, class indices.
        class_embeds: `(classes, dim)`; lengths do not matter.
        class_names: one per class; None for the class indices.
        silhouette: `"centroid"`, `"joint"` or `"image_only"`.
        sample_size: images that `"joint"` and `"image_only"` compare with one another, at least 2.
        seed: of the sample, from 0; the global random state has no part in it.

    Returns:
        The measures over all images and by class; those of a class without images are None.

    Raises:
        ConfigError: a setting is out of range.
        DataError: shapes do not fit, there are no images or fewer than two classes, a label is no class, an embedding
            is zero; for `"image_only"` also: only one class has images, or none has two.
        NonFiniteError: an embedding is NaN or infinite.

    Example:
        >>> texts, images = torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> task = embedding_difficulty(images, torch.tensor([0, 0, 1]), texts, ["cat", "dog"])
        >>> task.silhouette, task.acs, task.accuracy  # silhouettes 1, (0.2 - 0.4) / 0.4 and 1
        (0.5, 0.8666666666666667, 0.6666666666666666)
    """
    _check_settings(silhouette, sample_size, seed)
    images, classes = (torch.as_tensor(embeds).detach().cpu() for embeds in (image_embeds, class_embeds))
    truth = torch.as_tensor(labels).detach().cpu()
    _check_embeds(images, truth, classes)
    truth = truth.long()
    names = list(map(str, range(len(classes)))) if class_names is None else list(class_names)
    if len(names) != len(classes):
        raise DataError("class names do not fit", where="class_names", got=len(names), allowed=f"{len(classes)} names")
    acs, other = _similarities(images, truth, classes)  # (images,) each
    margin, drawn = acs - other, np.arange(len(images))
    if silhouette == "centroid":
        spread = 1 - np.minimum(acs, other)  # the larger of the two distances
        points, silhouettes = truth.numpy(), margin / np.where(spread > 0, spread, 1)
    else:
        drawn = _sample(truth.numpy(), sample_size, seed)
        points, silhouettes = _compare_all(images[drawn], truth[drawn], classes, silhouette)
    right = (margin > 0).astype(float)
    return TaskDifficulty(
        kind=silhouette,
        images=len(images),
        sampled=len(drawn),
        silhouette=float(silhouettes.mean()),
        acs=float(acs.mean()),
        accuracy=float(right.mean()),
        margin=float(margin.mean()),
        classes=_classes(names, truth, truth[drawn], (points, silhouettes), (acs, right, margin)),
    )


def _classes(
    names: list[str],
    labels: Tensor,
    drawn: Tensor,
    silhouettes: tuple[np.ndarray, np.ndarray],
    others: tuple[np.ndarray, ...],
) -> tuple[ClassDifficulty, ...]:
    """By class; `silhouettes` are labels and values of the points, `drawn` labels of the images among them."""
    n = len(names)
    counts, counts_drawn = (np.bincount(some, minlength=n).tolist() for some in (labels, drawn))
    means = [_class_means(values, labels.numpy(), n) for values in others]
    by_class = _class_means(silhouettes[1], silhouettes[0], n)  # a text alone has one too
    by_class = [mean if count else None for mean, count in zip(by_class, counts_drawn, strict=True)]
    return tuple(map(ClassDifficulty, names, counts, by_class, *means))


def _embed_images(
    model: nn.Module, dataset: Any, processor: ProcessorMixin, batch_size: int, workers: int, silent: bool
) -> tuple[Tensor, Tensor]:
    """Embeddings `(images, dim)` and labels `(images,)`."""
    collator, title = ImageCollator(processor), None if silent else "Embedding the images"
    if is_cacheable(dataset, collator):
        embedded = with_image_embeds(dataset, model, processor, batch_size, workers, silent)
        dataset, title = labelled_images(embedded, "dataset"), None
    embeds, labels = [], []
    for batch in batches_in_order(dataset, collator, batch_size, workers, next(model.parameters()).device, title):
        if "labels" not in batch:
            raise DataError("row without `label`", where="dataset", remedy="Rename the dataset's columns.")
        embeds.append(pretrained_image_embeds(model, batch).cpu())
        labels.append(batch["labels"].cpu())
    if not embeds:
        raise DataError("dataset is empty", where="dataset", got=0, allowed="at least one image")
    return torch.cat(embeds), torch.cat(labels)


def _similarities(images: Tensor, labels: Tensor, classes: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Cosine with the own class and the highest with another, `(images,)` each, a part of the images at a time."""
    classes = F.normalize(classes.double(), dim=-1)  # (classes, dim)
    at_once = max(1, SIMILARITIES_AT_ONCE // len(classes))
    own, other = [], []
    for some, truth in zip(images.split(at_once), labels.split(at_once), strict=True):
        cosines = (F.normalize(some.double(), dim=-1) @ classes.T).clamp_(-1, 1)  # (part, classes)
        own.append(cosines.gather(1, truth[:, None]).squeeze(1))
        other.append(cosines.scatter_(1, truth[:, None], -2.0).amax(dim=1))
    return torch.cat(own).numpy(), torch.cat(other).numpy()


def _sample(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Indices of at most `size` images, sorted."""
    from sklearn.utils import resample  # slow to import

    rows = np.arange(len(labels))
    drawn = (
        rows
        if len(rows) <= size
        else resample(rows, replace=False, n_samples=size, random_state=seed, stratify=labels)
    )
    return np.sort(drawn)


def _compare_all(
    images: Tensor, labels: Tensor, classes: Tensor, silhouette: Silhouette
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and silhouettes of the points, `(points,)` each."""
    from sklearn import config_context  # slow to import
    from sklearn.metrics import silhouette_samples

    if silhouette == "joint":
        images = torch.cat([images.double(), classes.double()])  # (points, dim)
        labels = torch.cat([labels, torch.arange(len(classes))])  # (points,)
    found = len(labels.unique())
    if not 2 <= found < len(labels):
        what = f"silhouette {silhouette!r} needs two classes with images, and two images in one of them"
        got, remedy = f"{len(labels)} images of {found} classes", "Take more images, or silhouette='centroid'."
        raise DataError(what, where="labels", got=got, remedy=remedy)
    with config_context(working_memory=WORKING_MEMORY):
        return labels.numpy(), silhouette_samples(images.double().numpy(), labels.numpy(), metric="cosine")


def _class_means(values: np.ndarray, labels: np.ndarray, n_classes: int) -> list[float | None]:
    counts, sums = np.bincount(labels, minlength=n_classes), np.bincount(labels, values, n_classes)
    return [total / n if n else None for total, n in zip(sums.tolist(), counts.tolist(), strict=True)]


def _check_settings(silhouette: str, sample_size: int, seed: int) -> None:
    if silhouette not in get_args(Silhouette):
        allowed = ", ".join(map(repr, get_args(Silhouette)))
        raise ConfigError("unknown silhouette", got=silhouette, allowed=allowed)
    for name, value, least in (("sample_size", sample_size, 2), ("seed", seed, 0)):
        if not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} is out of range", got=value, allowed=f"integers from {least}")


def _check_embeds(images: Tensor, labels: Tensor, classes: Tensor) -> None:
    for where, embeds, least in (("image_embeds", images, 1), ("class_embeds", classes, 2)):
        if embeds.ndim != 2 or len(embeds) < least or embeds.shape[1] != classes.shape[-1]:
            got, allowed = str(tuple(embeds.shape)), f"{least} or more of length {classes.shape[-1]}"
            raise DataError("embeddings are too few or do not fit", where=where, got=got, allowed=allowed)
        lengths = torch.linalg.vector_norm(embeds, dim=1, dtype=torch.float64)  # (images or classes,)
        if not lengths.isfinite().all():
            raise NonFiniteError("embedding is NaN or infinite", where=f"{where}, row {_first(~lengths.isfinite())}")
        if (lengths < NO_LENGTH).any():
            raise DataError("embedding has no direction", where=f"{where}, row {_first(lengths < NO_LENGTH)}", got=0)
    if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        got, allowed = f"{tuple(labels.shape)} {labels.dtype}", f"({len(images)},) integers"
        raise DataError("labels do not fit the images", where="labels", got=got, allowed=allowed)
    outside = (labels < 0) | (labels >= len(classes))  # (images,)
    if outside.any():
        row, allowed = _first(outside), f"0 to {len(classes) - 1}"
        raise DataError(f"label of row {row} is no class", where="labels", got=int(labels[row]), allowed=allowed)


def _first(mask: Tensor) -> int:
    return int(mask.nonzero()[0])
