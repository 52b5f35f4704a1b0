# SPDX-License-Identifier: Apache-2.0
"""The evaluation protocols of the CoOp family: base-to-new, few shots, and transfer to other datasets.

Base-to-new (Zhou et al. 2022, arXiv 2203.05557) trains on half of the classes, tests on both halves, each among its
own names, and reports the harmonic mean. Figures are means over seeds, 1, 2 and 3 for CoOp and those after it:

    train_base, _ = base_to_new(train)
    test_base, test_new = base_to_new(test)
    trainer = RobustTrainer(
        model,
        args,
        train_dataset=few_shot(train_base, shots=16, seed=1),
        eval_dataset={"base": test_base, "new": test_new},
        processing_class=processor,
    )
    trainer.train()
    metrics = trainer.evaluate()
    harmonic_mean(metrics["eval_base_accuracy"], metrics["eval_new_accuracy"])

Transfer to other datasets needs no function: `RobustTrainer` classifies every evaluation set among its own names.

    sets = {"pets": pets, "flowers": flowers, "food": food}
    train = few_shot(imagenet, shots=16, seed=1)
    trainer = RobustTrainer(model, args, train_dataset=train, eval_dataset=sets, processing_class=processor)
    trainer.train()
    trainer.evaluate()["eval_pets_accuracy"]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from ..data.columns import find_column, no_column
from ..data.labels import NO_LABEL, check_labels, class_indices, replace_labels
from ..errors import ConfigError, DataError


def base_to_new(dataset: Dataset) -> tuple[Dataset, Dataset]:
    """Splits a dataset by class: the first half of the classes, in label order, is base, the other half is new.

    Of an odd number of classes one more is base. This is the split of CoCoOp (Zhou et al. 2022, arXiv 2203.05557) and
    the methods after it. Images are neither decoded nor copied.

    Args:
        dataset: rows with labels that are a `ClassLabel`, or text.

    Returns:
        The base and the new rows, in the order they had, with all their columns. In each half labels start at 0 and
        `label` has the names of that half; a class without rows keeps its place.

    Raises:
        DataError: labels have no names, there are fewer than two classes, or a row's label is none of them.

    Example:
        >>> base, new = base_to_new(pets)
        >>> len(pets.features["label"].names), len(base.features["label"].names), len(new.features["label"].names)
        (37, 19, 18)
    """
    column, labels, names = _labels(dataset)
    if len(names) < 2:
        raise DataError("too few classes for two halves", where=column, got=names, allowed="at least 2")
    middle = -(-len(names) // 2)
    base, new = labels < middle, labels >= middle  # (rows,) each
    first = replace_labels(dataset, column, np.where(base, labels, NO_LABEL), names[:middle])
    second = replace_labels(dataset, column, np.where(new, labels - middle, NO_LABEL), names[middle:])
    return first.select(np.flatnonzero(base)), second.select(np.flatnonzero(new))


def few_shot(dataset: Dataset, shots: int, seed: int = 0) -> Dataset:
    """Draws the same number of rows of every class, without replacement.

    CoOp (Zhou et al. 2022, arXiv 2109.01134) trains on 1, 2, 4, 8 or 16 shots, and validates on `min(shots, 4)`.

    Args:
        dataset: rows with labels that are a `ClassLabel`, or text.
        shots: rows per class, from 1.
        seed: of the draw, from 0; the global random state has no part in it.

    Returns:
        `shots` rows of every class, in the order they had. Images are neither decoded nor copied.

    Raises:
        ConfigError: `shots` is no integer from 1.
        DataError: labels have no names, a row's label is none of the classes, or a class has fewer rows.

    Example:
        >>> len(few_shot(pets, shots=16, seed=1))  # 37 classes
        592
    """
    if not isinstance(shots, int) or shots < 1:
        raise ConfigError("shots is out of range", got=shots, allowed="integers from 1")
    _, labels, names = _labels(dataset)
    counts = np.bincount(labels, minlength=len(names))  # (classes,)
    for name, count in zip(names, counts.tolist(), strict=True):
        if count < shots:
            remedy = "Take fewer shots, or another split."
            raise DataError(
                f"class {name!r} has too few images", got=count, allowed=f"at least {shots}", remedy=remedy
            )
    generator = np.random.default_rng(seed)
    drawn = [generator.choice(np.flatnonzero(labels == c), shots, replace=False) for c in range(len(names))]
    return dataset.select(np.sort(np.concatenate(drawn)))


def harmonic_mean(base: float, new: float) -> float:
    """Returns H = 2 · base · new / (base + new), the figure of base-to-new; 0 where both are 0.

    The H of tables over several datasets or seeds is that of the mean accuracies, not the mean of their H.

    Args:
        base: accuracy on the base classes, a fraction.
        new: accuracy on the new classes, a fraction.

    Example:
        >>> round(harmonic_mean(0.8269, 0.6322), 4)
        0.7166
    """
    return 2 * base * new / (base + new) if base + new > 0 else 0.0


def one_standard_error_rule(accuracies: Sequence[float], losses: Sequence[float], errors: Sequence[float]) -> int:
    """Returns the place of the setting to take: the lowest loss among those as accurate as the best.

    As accurate is what lies within one standard error of the best accuracy, after Breiman et al. (Classification and
    Regression Trees, 1984). Of settings that a small validation set cannot tell apart it takes the one that is least
    sure of its mistakes.

    Args:
        accuracies: on validation data, by setting, fractions.
        losses: mean cross-entropy there, by setting.
        errors: standard errors of the accuracies, see `standard_error`.

    Example:
        >>> one_standard_error_rule([0.60, 0.74, 0.76, 0.40], [1.1, 0.8, 1.3, 4.0], errors=[0.03] * 4)
        1
    """
    best, error = max(zip(accuracies, errors, strict=True))
    least = best - error
    return min((i for i, accuracy in enumerate(accuracies) if accuracy >= least), key=lambda i: losses[i])


def _labels(dataset: Dataset) -> tuple[str, np.ndarray, list[str]]:
    """The column of labels, the labels `(rows,)`, and the names of the classes."""
    if not isinstance(dataset, Dataset):
        raise DataError("not a datasets.Dataset", where="dataset", got=type(dataset).__name__)
    column = find_column("label", dataset.column_names, "dataset")
    if column is None:
        raise no_column("label", dataset.column_names, "dataset")
    labels, names = class_indices(dataset, column, "dataset")
    if names is None:
        remedy = "Use dataset.cast_column('label', ClassLabel(names=...))."
        got, allowed = dataset.features[column], "a ClassLabel, or text"
        raise DataError("labels have no class names", where=column, got=got, allowed=allowed, remedy=remedy)
    check_labels(labels, len(names), column)
    return column, labels, names
