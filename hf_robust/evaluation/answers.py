# SPDX-License-Identifier: Apache-2.0
"""From the labels of a set to its right answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import ClassLabel, Dataset, Value

from ..data.sources import check_column
from ..encoders.templates import check_class_names
from ..errors import DataError
from .suite import SuiteSet

NO_CLASS, LEFT_OUT = -2, -1  # in the place of an answer


@dataclass(frozen=True)
class LoadedSet:
    """A set whose labels have been read; its images have not.

    Args:
        suite_set: the settings.
        class_names: one per column of the head.
        answers: names of what can be predicted, each with the indices of its classes.
        targets: `(rows,)`, the right answer of every row as an index into `answers`; -1 for one that is left out.
    """

    suite_set: SuiteSet
    class_names: list[str]
    answers: dict[str, list[int]]
    targets: np.ndarray


def load_labels(suite_set: SuiteSet, dataset: Dataset) -> LoadedSet:
    """Reads the labels of a set, and makes right answers of them.

    Args:
        suite_set: the settings.
        dataset: what its source holds.

    Raises:
        DataError: there is no column of labels, its classes have no names, stand in another order than the settings
            say, or a label is none of them.
        ConfigError: subset or merge do not fit the class names.
    """
    where = suite_set.name
    check_column(dataset, suite_set.label_column, "label_column", where)
    labels, own_names = _labels(dataset, suite_set.label_column)
    names = own_names if suite_set.class_names is None else list(suite_set.class_names)
    if names is None:
        remedy = "Give class_names, or class_names_file."
        raise DataError("labels have no class names", where=where, got=labels[0].item(), remedy=remedy)
    answers = suite_set.answers(check_class_names(names))
    label_names, targets_of_labels = _label_space(suite_set, names, answers)
    if labels.dtype.kind in "iu":
        _check_order(label_names, own_names, where)
        numbers = labels
    else:
        known = {_key(name): index for index, name in enumerate(label_names)}
        numbers = np.array([known.get(_key(label), -1) for label in labels])
    wrong = (numbers < 0) | (numbers >= len(label_names))
    wrong[~wrong] = targets_of_labels[numbers[~wrong]] == NO_CLASS
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        remedy = "Check class_names, subset, labels_in and merge of the set."
        what, allowed = f"label of row {row} is no class", f"the {len(answers)} answers, {[*answers][:3]}…"
        raise DataError(what, where=where, got=labels[row].item(), allowed=allowed, remedy=remedy)
    targets = targets_of_labels[numbers]
    if (targets < 0).all():
        raise DataError("all images are left out", where=where, got=suite_set.merge)
    return LoadedSet(suite_set, names, answers, targets)


def _label_space(
    suite_set: SuiteSet, class_names: Sequence[str], answers: dict[str, list[int]]
) -> tuple[list[str], np.ndarray]:
    """The names of the dataset's labels, and the answer that is right for each of them."""
    if suite_set.merge is not None:
        position = {name: index for index, name in enumerate(answers)}
        labels = [str(label) for label in suite_set.merge]
        return labels, np.array([position.get(label, LEFT_OUT) for label in labels])
    if suite_set.subset is not None and suite_set.labels_in == "class_names":
        targets = np.full(len(class_names), NO_CLASS)
        targets[list(suite_set.subset)] = np.arange(len(suite_set.subset))
        return list(class_names), targets
    return list(answers), np.arange(len(answers))


def _labels(dataset: Dataset, column: str) -> tuple[np.ndarray, list[str] | None]:
    """Labels `(rows,)`, indices or text, and the names the dataset itself has for its classes."""
    feature = dataset.features[column]
    values = dataset.select_columns(column).with_format("arrow")[:][column].to_pylist()
    dtype = feature.dtype if isinstance(feature, ClassLabel | Value) else type(feature).__name__
    if dtype in ("string", "large_string"):
        labels = np.array(["" if value is None else value for value in values])
        return labels, sorted({label.replace("_", " ") for label in labels.tolist()})
    if "int" not in dtype:
        raise DataError("labels are no class indices", where=column, got=dtype, allowed="integers from 0, or text")
    labels = np.array([-1 if value is None else value for value in values])
    if isinstance(feature, ClassLabel) and feature.names:
        return labels, [name.replace("_", " ") for name in feature.names]
    return labels, None


def _check_order(label_names: Sequence[str], own_names: list[str] | None, where: str) -> None:
    """Refuses class names that the dataset counts otherwise: all accuracies would be wrong, and none would look it."""
    own = {_key(name): index for index, name in enumerate(own_names or [])}
    for index, name in enumerate(label_names):
        if own.get(_key(name), index) != index:
            what = f"class {index} stands elsewhere in the dataset"
            allowed = f"as class {own[_key(name)]}"
            remedy = "Leave class_names out, or relate labels to them by merge."
            raise DataError(what, where=where, got=name, allowed=allowed, remedy=remedy)


def _key(name: str) -> str:
    return name.replace("_", " ").strip().casefold()
