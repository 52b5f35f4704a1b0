# SPDX-License-Identifier: Apache-2.0
"""How well similarities tell pairs of images of one identity, genuine ones, from pairs of two, impostors."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..errors import ConfigError, DataError, NonFiniteError
from .unit_embeds import unit_embeds

FARS = {"1e-2": 1e-2, "1e-3": 1e-3}  # false accept rates that are reported, as names have them
LEAST_ERRORS = 10  # impostors that must be accepted, or the rate is one of chance
FOLDS = 10
DISTANCES = np.arange(400) / 100  # thresholds of the LFW protocol
STEPS = 1_000_000  # cosines of all pairs are counted rounded to a millionth


def verification_metrics(
    first_embeds: ArrayLike | Tensor, second_embeds: ArrayLike | Tensor, same: ArrayLike | Tensor
) -> dict[str, float]:
    """Returns ROC AUC, TAR at FAR and ten-fold accuracy on a list of pairs, as that of LFW.

    Args:
        first_embeds: `(pairs, dim)`; they are L2-normalised here. For LFW, the sum of the embeddings of an image and
            of its mirror image.
        second_embeds: `(pairs, dim)`, likewise.
        same: `(pairs,)`, whether both images are of one identity. In the list's order, on which the folds hang.

    Returns:
        `roc_auc`, `tar_at_far_1e-2` and `tar_at_far_1e-3` of cosine similarities, see `tar_at_far` for when they are
        NaN, and `ten_fold_accuracy` and `ten_fold_accuracy_std` of squared distances, see there.

    Raises:
        DataError: shapes do not fit, an embedding has length 0, `same` is not true or false, there are fewer than ten
            pairs, or only pairs of one kind.
        NonFiniteError: an embedding is NaN or infinite.

    Example:
        >>> east, mixed = torch.tensor([[1.0, 0.0]] * 10), torch.eye(2)[[0, 1] * 5]
        >>> verification_metrics(east, mixed, [True, False] * 5)["ten_fold_accuracy"]
        1.0
    """
    first, second = unit_embeds(first_embeds, "first_embeds"), unit_embeds(second_embeds, "second_embeds")
    if first.shape != second.shape:
        got = (tuple(first.shape), tuple(second.shape))
        raise DataError("embeddings do not pair", got=got, allowed="two of the same shape (pairs, dim)")
    flags = _flags(same, len(first))
    similarities = (first * second).sum(dim=1).cpu().numpy()  # (pairs,)
    distances = (first - second).square().sum(dim=1).cpu().numpy()  # (pairs,)
    rates = rates_of_counts(*_counts(similarities[flags], similarities[~flags]))
    mean, deviation = ten_fold_accuracy(distances, flags)
    return rates | {"ten_fold_accuracy": mean, "ten_fold_accuracy_std": deviation}


def tar_at_far(genuine: ArrayLike | Tensor, impostor: ArrayLike | Tensor, far: float) -> float:
    """Returns the share of genuine pairs that are accepted where at most a share `far` of the impostors is.

    It is the greatest such share over all thresholds; a pair is accepted if its similarity reaches the threshold, so
    that genuine pairs and impostors that are equally similar are accepted together.

    Args:
        genuine: `(genuine pairs,)`, similarities.
        impostor: `(impostors,)`, similarities.
        far: the false accept rate, in (0, 1].

    Returns:
        The true accept rate, a fraction; NaN with fewer than 10 / `far` impostors, too few to tell.

    Raises:
        ConfigError: `far` is out of range.
        DataError: there are no pairs of a kind, or not a list of them.
        NonFiniteError: a similarity is NaN or infinite.

    Example:
        >>> tar_at_far([0.9, 0.5, 0.1], [0.6] + [0.2] * 99, far=0.1)
        0.6666666666666666
    """
    if not 0 < far <= 1:
        raise ConfigError("false accept rate is out of range", where="far", got=far, allowed="(0, 1]")
    counts = _counts(_scores(genuine, "genuine"), _scores(impostor, "impostor"))
    return _tar(*counts, far)


def ten_fold_accuracy(distances: ArrayLike | Tensor, same: ArrayLike | Tensor) -> tuple[float, float]:
    """Returns the accuracy of telling pairs apart by a threshold chosen on other pairs, and its standard deviation.

    The protocol of LFW as insightface runs it: ten folds in the order of the list, a pair is accepted if its distance
    is strictly below the threshold, of 0, 0.01, …, 3.99 the first is taken that is best on nine folds, and the tenth
    is counted.

    Args:
        distances: `(pairs,)`, squared L2 distances of unit embeddings.
        same: `(pairs,)`, whether both images are of one identity.

    Returns:
        Mean and standard deviation over the folds, fractions.

    Raises:
        DataError: fewer than ten pairs, other shapes, or `same` is not true or false.
        NonFiniteError: a distance is NaN or infinite.

    Example:
        >>> ten_fold_accuracy([0.5, 1.5] * 10, [True, False] * 10)
        (1.0, 0.0)
    """
    from sklearn.model_selection import KFold  # slow to import

    values = _scores(distances, "distances")
    flags = _flags(same, len(values))
    if len(values) < FOLDS:
        raise DataError("too few pairs for ten folds", where="distances", got=len(values), allowed="10 or more")
    folds = [fold for _, fold in KFold(FOLDS).split(values)]
    right = [((values[fold, None] < DISTANCES) == flags[fold, None]).sum(axis=0) for fold in folds]
    of_fold = np.stack(right)  # (folds, thresholds), pairs told right
    chosen = (of_fold.sum(axis=0) - of_fold).argmax(axis=1)  # (folds,), the first best on the others
    accuracy = of_fold[np.arange(FOLDS), chosen] / [len(fold) for fold in folds]  # (folds,)
    return float(accuracy.mean()), float(accuracy.std())


def all_pairs_counts(embeds: Tensor, identities: Tensor, chunk_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns how many genuine pairs and how many impostors have which similarity, of all pairs of images.

    Args:
        embeds: `(images, dim)`, L2-normalised.
        identities: `(images,)`, integers.
        chunk_size: images that are compared with all at once.

    Returns:
        Counts by cosine similarity, rounded to a millionth, from -1 to 1: `(2000001,)` each.
    """
    counts = torch.zeros(2, 2 * STEPS + 1, dtype=torch.int64)
    for start in range(0, len(embeds), chunk_size):
        rows = slice(start, start + chunk_size)
        cosines = embeds[rows] @ embeds[start:].T  # (rows, images from start)
        steps = (cosines * STEPS).round().int().clamp(-STEPS, STEPS) + STEPS
        later = torch.ones_like(cosines, dtype=torch.bool).triu(1)  # each pair once
        same = identities[rows, None] == identities[start:]
        for kind, pairs in enumerate((later & same, later & ~same)):
            counts[kind] += steps[pairs].cpu().bincount(minlength=counts.shape[1])
    genuine, impostor = counts.numpy()
    return genuine, impostor


def rates_of_counts(genuine: np.ndarray, impostor: np.ndarray) -> dict[str, float]:
    """Returns ROC AUC and TAR at FAR of counts by similarity.

    Args:
        genuine: `(similarities,)`, how many genuine pairs have which, ascending.
        impostor: `(similarities,)`, likewise impostors.

    Returns:
        `roc_auc`, `tar_at_far_1e-2` and `tar_at_far_1e-3`, fractions; the latter as `tar_at_far` gives them.

    Raises:
        DataError: there are no pairs of a kind.

    Example:
        >>> rates_of_counts(np.array([0, 1, 1]), np.array([3, 1, 0]))["roc_auc"]
        0.9375
    """
    for kind, counts in (("genuine pairs", genuine), ("impostors", impostor)):
        if not counts.sum():
            raise DataError(f"no {kind}", allowed="pairs of one identity and pairs of two")
    not_below = _at_least(impostor) - impostor / 2  # (similarities,), a tie is half an error
    errors = (genuine / genuine.sum()) @ (not_below / impostor.sum())
    return {"roc_auc": float(1 - errors)} | {
        f"tar_at_far_{name}": _tar(genuine, impostor, far) for name, far in FARS.items()
    }


def _tar(genuine: np.ndarray, impostor: np.ndarray, far: float) -> float:
    if impostor.sum() < LEAST_ERRORS / far:
        return float("nan")
    allowed = _at_least(impostor) / impostor.sum() <= far  # (similarities,), as thresholds
    return float(genuine[allowed].sum() / genuine.sum())


def _at_least(counts: np.ndarray) -> np.ndarray:
    return counts[::-1].cumsum()[::-1]


def _counts(genuine: np.ndarray, impostor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    similarities, index = np.unique(np.concatenate([genuine, impostor]), return_inverse=True)
    of_genuine, of_impostor = index[: len(genuine)], index[len(genuine) :]
    most = len(similarities)
    return np.bincount(of_genuine, minlength=most), np.bincount(of_impostor, minlength=most)


def _scores(values: ArrayLike | Tensor, where: str) -> np.ndarray:
    scores = torch.as_tensor(values, dtype=torch.float64).detach().cpu().numpy()
    if scores.ndim != 1 or not scores.size:
        raise DataError("not one value per pair", where=where, got=scores.shape, allowed="(pairs,), at least one pair")
    if not np.isfinite(scores).all():
        raise NonFiniteError("value is NaN or infinite", where=where)
    return scores


def _flags(same: ArrayLike | Tensor, pairs: int) -> np.ndarray:
    flags = torch.as_tensor(same).cpu().numpy()
    if flags.shape != (pairs,) or not np.isin(flags, (0, 1)).all():
        allowed = f"({pairs},) of true and false"
        raise DataError("not whether pairs are of one identity", where="same", got=flags.shape, allowed=allowed)
    return flags.astype(bool)
