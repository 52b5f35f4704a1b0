# SPDX-License-Identifier: Apache-2.0
"""What is computed from accuracies: robustness and forgetting; and how sure an accuracy is.

All accuracies, errors and differences are fractions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, logit

from ..errors import ConfigError, DataError

LEAST_SHARE = 1e-3  # nearer to 0 and 1 the logit runs away, and one image more or less decides


def forgetting(zero_shot: Mapping[str, float], tuned: Mapping[str, float]) -> float:
    """Returns the mean over other tasks of zero-shot accuracy minus accuracy after fine-tuning.

    Both models classify every task among its own class names, the tuned one with a head made by its own text tower.

    Args:
        zero_shot: accuracy by task before fine-tuning, fractions.
        tuned: accuracy by task after it.

    Returns:
        Forgetting, a fraction: positive where accuracy was lost, negative where it was gained.

    Raises:
        DataError: no tasks, not the same tasks in both, or an accuracy outside [0, 1].

    Example:
        >>> round(forgetting({"cifar10": 0.9, "caltech101": 0.8}, {"cifar10": 0.6, "caltech101": 0.9}), 4)
        0.1
    """
    if zero_shot.keys() != tuned.keys() or not tuned:
        allowed = "the same tasks for both, at least one"
        got = (sorted(zero_shot), sorted(tuned))
        raise DataError("tasks of zero-shot and tuned model differ", got=got, allowed=allowed)
    return fmean(as_fraction(zero_shot[task], task) - as_fraction(tuned[task], task) for task in tuned)


def ood_average(by_set: Mapping[str, float]) -> float:
    """Returns the mean accuracy over out-of-distribution sets, each of equal weight however many images it has.

    Args:
        by_set: accuracy by set, fractions.

    Raises:
        DataError: no sets, or an accuracy outside [0, 1].

    Example:
        >>> round(ood_average({"V2": 0.559, "Sketch": 0.423, "A": 0.315, "R": 0.693, "ObjectNet": 0.435}), 4)
        0.485
    """
    if not by_set:
        raise DataError("no out-of-distribution sets", got=dict(by_set), allowed="at least one")
    return fmean(as_fraction(accuracy, name) for name, accuracy in by_set.items())


def standard_error(accuracy: float, images: int) -> float:
    """Returns the standard error of an accuracy, √(p · (1 − p) / n), a fraction.

    Args:
        accuracy: the share of images that were classified right, p.
        images: their number, n.

    Example:
        >>> standard_error(0.5, images=100)
        0.05
    """
    return math.sqrt(accuracy * (1 - accuracy) / images)


def baseline_line(baseline: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Fits logit(OOD) = slope · logit(ID) + intercept to models without robustness of their own.

    On logit axes the accuracies of many models lie on a line (Taori et al. 2020, arXiv 2007.00644), to which it is
    fitted by least squares. With a single model it is the line of slope 1 through it: equal odds ratios.

    Args:
        baseline: ID and OOD accuracy of each model, fractions; those under 0.001 or over 0.999 count as these.

    Returns:
        Slope and intercept.

    Raises:
        DataError: no models, an accuracy outside [0, 1], or several models with the same ID accuracy only.

    Example:
        >>> slope, intercept = baseline_line([(0.633, 0.485)])
        >>> slope, round(intercept, 4)
        (1.0, -0.6051)
    """
    if not len(baseline):
        raise DataError("no models to draw a line through", where="baseline", allowed="at least one (ID, OOD)")
    points = np.array([(_logit(x, "baseline"), _logit(y, "baseline")) for x, y in baseline])  # (models, 2)
    x, y = points.T
    if len(points) == 1:
        return 1.0, float(y[0] - x[0])
    if np.ptp(x) == 0:
        remedy = "Give one of them, for a line of slope 1, or one that differs."
        allowed = "different ID accuracies"
        raise DataError("no line fits", where="baseline", got=list(baseline), allowed=allowed, remedy=remedy)
    slope, intercept = np.polyfit(x, y, 1)
    return float(slope), float(intercept)


def effective_robustness(id_accuracy: float, ood_accuracy: float, baseline: Sequence[tuple[float, float]]) -> float:
    """Returns how far OOD accuracy is above what the baseline line expects at this ID accuracy (arXiv 2007.00644).

    Args:
        id_accuracy: of the model in question, a fraction.
        ood_accuracy: of the model in question, a fraction.
        baseline: ID and OOD accuracy of each baseline model, see `baseline_line`; the zero-shot model alone is the
            usual choice here.

    Returns:
        The gain, a fraction; negative where the model is below the line.

    Raises:
        DataError: an accuracy is outside [0, 1], or `baseline` gives no line.

    Example:
        >>> round(effective_robustness(0.762, 0.442, [(0.633, 0.485)]), 4)
        -0.1941
    """
    slope, intercept = baseline_line(baseline)
    expected = float(expit(slope * _logit(id_accuracy, "id_accuracy") + intercept))
    return as_fraction(ood_accuracy, "ood_accuracy") - expected


class PairedTest(NamedTuple):
    """The outcome of `paired_test`.

    Attributes:
        only_first: images that only the first run classified correctly.
        only_second: images that only the second run classified correctly.
        p_value: two-sided; the probability of counts at least as unequal if both runs were equally good.
    """

    only_first: int
    only_second: int
    p_value: float


def bootstrap_interval(correct: ArrayLike, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """Returns the 95 % percentile bootstrap interval of an accuracy (Efron 1979).

    Images are drawn with replacement, as many as there are. What counts in such a draw is how many of its images are
    correct, so only that number is drawn: from the binomial distribution, which is the same and does not get slower
    with the number of images. Where all images are correct, or none, the interval has no width.

    Args:
        correct: `(images,)`, whether each image was classified correctly.
        resamples: how often images are drawn.
        seed: of the draws; the global random state has no part in them.

    Returns:
        The lower and the upper end, fractions. The order of the images does not matter.

    Raises:
        ConfigError: `resamples` is no integer from 1.
        DataError: there are no images, or `correct` has other values than true and false.

    Example:
        >>> low, high = bootstrap_interval([True] * 80 + [False] * 20)
        >>> round(low, 2), round(high, 2)
        (0.72, 0.88)
    """
    return _interval(as_correct(correct, "correct").astype(np.int64), resamples, seed)


def bootstrap_difference(
    first: ArrayLike, second: ArrayLike, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Returns the 95 % percentile bootstrap interval of the difference between two accuracies on the same images.

    An image is drawn together with both runs' results, so that what both runs share, easy and hard images, cancels.

    Args:
        first: `(images,)`, whether the first run classified each image correctly.
        second: `(images,)`, the same of the second run, in the same order.
        resamples: how often images are drawn.
        seed: of the draws; the global random state has no part in them.

    Returns:
        The lower and the upper end of accuracy(first) - accuracy(second), fractions.

    Raises:
        ConfigError: `resamples` is no integer from 1.
        DataError: the runs have different numbers of images, or values other than true and false, or none.

    Example:
        >>> low, high = bootstrap_difference([True] * 30 + [False] * 70, [False] * 20 + [True] * 15 + [False] * 65)
        >>> round(low, 2), round(high, 2)
        (0.06, 0.25)
    """
    one, other = _pair(first, second)
    return _interval(one.astype(np.int64) - other.astype(np.int64), resamples, seed)


def bootstrap_over_runs(values: ArrayLike, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """Returns the 95 % percentile bootstrap interval of a mean over runs and images, both drawn anew.

    Args:
        values: `(runs, images)`, finite numbers: how much better a method answers each image than another, say.
        resamples: how often runs and images are drawn.
        seed: of the draws; the global random state has no part in them.

    Returns:
        The lower and the upper end.

    Raises:
        DataError: they are no such numbers, or none.

    Example:
        >>> bootstrap_over_runs([[0, 1, 1], [0, 1, 1]])
        (0.0, 1.0)
    """
    of_runs = np.asarray(values, dtype=np.float64)
    if of_runs.ndim != 2 or of_runs.size == 0 or not np.isfinite(of_runs).all():
        raise DataError("no numbers by run and image", got=of_runs.shape, allowed="(runs, images), finite")
    rng, (runs, images) = np.random.default_rng(seed), of_runs.shape
    means = np.empty(resamples)
    for index in range(resamples):
        of_images = of_runs[rng.integers(runs, size=runs)].mean(axis=0)  # (images,)
        means[index] = of_images[rng.integers(images, size=images)].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def paired_test(first: ArrayLike, second: ArrayLike) -> PairedTest:
    """Tests whether two runs differ on the same images: McNemar's test, exact (McNemar 1947).

    Only images that one run gets right and the other wrong tell the runs apart. If the runs were equally good, each of
    them would be a fair coin.

    Args:
        first: `(images,)`, whether the first run classified each image correctly.
        second: `(images,)`, the same of the second run, in the same order.

    Returns:
        Both counts and the two-sided p-value; 1 where the runs never differ.

    Raises:
        DataError: the runs have different numbers of images, or values other than true and false, or none.

    Example:
        >>> paired_test([True, True, True, True, False], [False, False, False, True, False])
        PairedTest(only_first=3, only_second=0, p_value=0.25)
    """
    from scipy.stats import binomtest  # slow to import

    one, other = _pair(first, second)
    only_first, only_second = int(np.sum(one & ~other)), int(np.sum(other & ~one))
    different = only_first + only_second
    p_value = float(binomtest(only_first, different, 0.5).pvalue) if different else 1.0
    return PairedTest(only_first, only_second, p_value)


def as_correct(values: ArrayLike, where: str) -> np.ndarray:
    """Returns `values` as booleans, one per image.

    Args:
        values: `(images,)`, booleans or zeros and ones.
        where: the argument's name, for the message.

    Raises:
        DataError: there are no images, or other values than true and false.
    """
    array = np.asarray(values)
    if array.ndim != 1 or not array.size:
        allowed = "one value per image, at least one"
        raise DataError("there is no list of images", where=where, got=array.shape, allowed=allowed)
    if array.dtype != bool:
        wrong = array[(array != 0) & (array != 1)]
        if wrong.size:
            remedy = "Pass predictions == labels."
            raise DataError("not whether correct", where=where, got=wrong[0], allowed="True or False", remedy=remedy)
    return array.astype(bool)


def as_fraction(accuracy: float, where: str) -> float:
    """Returns `accuracy`, checked to be a fraction.

    Args:
        accuracy: the value.
        where: whose it is, for the message.

    Raises:
        DataError: it is outside [0, 1], or NaN.
    """
    if not 0 <= accuracy <= 1:
        remedy = "Divide percent by 100."
        raise DataError("accuracy is no fraction", where=where, got=accuracy, allowed="[0, 1]", remedy=remedy)
    return float(accuracy)


def _pair(first: ArrayLike, second: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    one, other = as_correct(first, "first"), as_correct(second, "second")
    if len(one) != len(other):
        remedy = "Evaluate both runs on the same images, in the same order."
        got = (len(one), len(other))
        raise DataError("runs have different numbers of images", got=got, allowed="the same number", remedy=remedy)
    return one, other


def _interval(values: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """The 2.5 % and 97.5 % quantiles of the mean of resampled `values`, of which few are distinct: `(images,)`."""
    if not isinstance(resamples, int) or resamples < 1:
        raise ConfigError("resamples is out of range", got=resamples, allowed="integers from 1")
    distinct, counts = np.unique(values, return_counts=True)  # (distinct,)
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(len(values), counts / len(values), size=resamples)  # (resamples, distinct)
    low, high = np.quantile(drawn @ distinct / len(values), [0.025, 0.975])
    return float(low), float(high)


def _logit(accuracy: float, where: str) -> float:
    return float(logit(np.clip(as_fraction(accuracy, where), LEAST_SHARE, 1 - LEAST_SHARE)))
