# SPDX-License-Identifier: Apache-2.0
"""How well embeddings tell identities, seen or never seen: by what is nearest, and by all pairs of images."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..errors import ConfigError, DataError, needs_extra
from .unit_embeds import unit_embeds
from .verification import all_pairs_counts, rates_of_counts


def identity_metrics(
    embeds: ArrayLike | Tensor, identities: ArrayLike | Tensor, chunk_size: int = 128
) -> dict[str, float]:
    """Returns recall@1 and mAP@R of each image among all others, and ROC AUC and TAR at FAR of all pairs of images.

    mAP@R is that of "A Metric Learning Reality Check" (arXiv 2003.08505), as `pytorch-metric-learning` computes it in
    float32; the only image of an identity finds nothing, and so is no query, but others may find it. Images are
    compared by cosine similarity. Memory: a bool for every identity and image, and about 15 bytes for `chunk_size`
    times the images.

    Args:
        embeds: `(images, dim)`.
        identities: `(images,)`, integers or strings.
        chunk_size: images that are compared with all at once.

    Returns:
        `recall@1`, `mAP@R`, `roc_auc`, `tar_at_far_1e-2` and `tar_at_far_1e-3`, fractions. The last two are NaN with
        fewer than 1,000 and 10,000 pairs of two identities, and count cosines rounded to a millionth.

    Raises:
        ConfigError: `chunk_size` is out of range, or `pytorch-metric-learning` is not installed.
        DataError: shapes do not fit, an embedding has length 0, identities are neither integers nor strings, there is
            one identity, or none has two images.
        NonFiniteError: an embedding is NaN or infinite.

    Example:
        >>> identity_metrics(torch.eye(2)[[0, 0, 1, 1]], ["ann", "ann", "bob", "bob"])
        {'recall@1': 1.0, 'mAP@R': 1.0, 'roc_auc': 1.0, 'tar_at_far_1e-2': nan, 'tar_at_far_1e-3': nan}
    """
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ConfigError("chunk_size is out of range", got=chunk_size, allowed="integers from 1")
    with needs_extra("identities"):
        from pytorch_metric_learning.distances import CosineSimilarity
        from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
        from pytorch_metric_learning.utils.inference import CustomKNN
    units = unit_embeds(embeds, "embeds")
    indices = _indices(identities, len(units)).to(units.device)  # (images,)
    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"),
        k="max_bin_count",
        device=units.device,
        knn_func=CustomKNN(CosineSimilarity(), batch_size=chunk_size),
    )
    nearest = calculator.get_accuracy(units, indices)
    found = {"recall@1": nearest["precision_at_1"], "mAP@R": nearest["mean_average_precision_at_r"]}
    return found | rates_of_counts(*all_pairs_counts(units, indices, chunk_size))


def _indices(identities: ArrayLike | Tensor, images: int) -> Tensor:
    given = identities.cpu().numpy() if isinstance(identities, Tensor) else np.asarray(identities)
    if given.shape != (images,) or given.dtype.kind not in "iuU":
        got, allowed = f"{given.shape} {given.dtype.name}", f"({images},) integers or strings"
        raise DataError("identities do not fit the images", where="identities", got=got, allowed=allowed)
    # small integers: the library compares identities in float32
    names, indices, counts = np.unique(given, return_inverse=True, return_counts=True)
    if len(names) < 2 or counts.max() < 2:
        got = f"{len(names)} identities with {counts.max()} images at most"
        allowed = "two identities, and two images of one of them"
        raise DataError("nothing to tell apart", where="identities", got=got, allowed=allowed)
    return torch.from_numpy(indices)
