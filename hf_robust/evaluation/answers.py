# SPDX-License-Identifier: Apache-2.0
"""From the labels of a set to its right answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from datasets import Dataset

from ..data.class_spaces import ClassSpace, check_pairing, class_space
from ..data.columns import find_column, no_column
from ..data.labels import class_indices, is_text
from ..encoders.templates import check_class_names, name_key
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
    column = find_column("label", dataset.column_names, where, suite_set.label_column)
    if column is None:
        raise no_column("label", dataset.column_names, where)
    if len(dataset) == 0:
        raise DataError("dataset is empty", where=where, got=0, allowed="at least one image")
    labels, own_names = class_indices(dataset, column, where)
    names = _class_names(suite_set, own_names, where)
    answers = suite_set.answers(check_class_names(names))
    label_names, targets_of_labels = _label_space(suite_set, names, answers)
    numbers = labels
    if isinstance(suite_set.class_names, Mapping):
        pass  # the names are in the order of the labels
    elif is_text(dataset.features[column]) and own_names is not None:
        known = {name_key(name): index for index, name in enumerate(label_names)}
        numbers = np.array([known.get(name_key(name), -1) for name in own_names])[labels]
    elif own_names is not None:
        check_pairing(own_names, label_names, where)
    wrong = (numbers < 0) | (numbers >= len(label_names))
    wrong[~wrong] = targets_of_labels[numbers[~wrong]] == NO_CLASS
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        remedy = "Check class_names, subset, labels_in and merge of the set."
        what, allowed = f"label of row {row} is no class", f"the {len(answers)} answers, {[*answers][:3]}…"
        raise DataError(what, where=where, got=_label(dataset, column, row), allowed=allowed, remedy=remedy)
    return LoadedSet(suite_set, names, answers, targets_of_labels[numbers])


def among_known(one: LoadedSet, known: ClassSpace) -> LoadedSet:
    """Returns the set with a classifier's words for its classes, and the classes it lacks as possible answers.

    Args:
        one: the set; with a `subset` or a `merge` its settings say what can be answered, and nothing is added.
        known: the classifier's classes.
    """
    relation, n = known.relate(one.class_names), len(one.class_names)
    if one.suite_set.subset is not None or one.suite_set.merge is not None:
        return replace(one, class_names=relation.words[:n])
    missing = {name: [n + index] for index, name in enumerate(relation.words[n:])}
    return replace(one, class_names=relation.words, answers=one.answers | missing)


def with_rows(one: LoadedSet, rows: np.ndarray) -> LoadedSet:
    """Returns the set without the other rows.

    Args:
        one: the set.
        rows: the numbers of those that stay.

    Raises:
        DataError: no row with an answer stays.
    """
    targets = np.full(len(one.targets), LEFT_OUT)
    targets[rows] = one.targets[rows]
    if (targets == LEFT_OUT).all():
        raise DataError("all images are left out", where=one.suite_set.name, got=one.suite_set.merge)
    return replace(one, targets=targets)


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


def _class_names(suite_set: SuiteSet, own_names: list[str] | None, where: str) -> list[str]:
    if isinstance(suite_set.class_names, Sequence):
        return list(suite_set.class_names)
    return list(class_space(own_names, suite_set.class_names, where).words)


def _label(dataset: Dataset, column: str, row: int) -> object:
    return dataset.with_format("arrow")[row : row + 1][column][0].as_py()
