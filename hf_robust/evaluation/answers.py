# SPDX-License-Identifier: Apache-2.0
"""Sets of images with one label: from labels to right answers, from embeddings to predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ..data.class_spaces import ClassSpace, check_pairing, class_space
from ..data.columns import find_column, no_column
from ..data.labels import class_indices, is_text
from ..encoders.templates import check_class_names, name_key
from ..errors import DataError
from .loaded import LoadedSet, check_finite
from .report import SetResult
from .suite import CLASSIFICATION, TARGETS, SuiteSet
from .text_side import Head, TextSide

NO_CLASS, LEFT_OUT = -2, -1  # in the place of an answer


@dataclass(frozen=True)
class ClassificationSet(LoadedSet):
    """A set of images with one label each.

    Args:
        suite_set: the settings.
        wanted: `(rows,)`, whether a row takes part.
        class_names: one per column of the head.
        answers: names of what can be predicted, each with the indices of its classes.
        targets: `(rows,)`, the right answer of every row as an index into `answers`; -1 for one that is left out.
    """

    class_names: list[str]
    answers: dict[str, list[int]]
    targets: np.ndarray

    def among_known(self, known: ClassSpace) -> ClassificationSet:
        """Returns the set with a classifier's words for its classes, and the classes it lacks as possible answers.

        With a `subset` or a `merge` the settings say what can be answered, and nothing is added.
        """
        relation, n = known.relate(self.class_names), len(self.class_names)
        if self.suite_set.subset is not None or self.suite_set.merge is not None:
            return replace(self, class_names=relation.words[:n])
        missing = {name: [n + index] for index, name in enumerate(relation.words[n:])}
        return replace(self, class_names=relation.words, answers=self.answers | missing)

    def prepare(self, side: TextSide) -> Head:
        """Returns the head of the answers."""
        templates, target = self.suite_set.templates, TARGETS[CLASSIFICATION]
        return side.head(self.class_names, templates, target, _columns(self.answers))

    def of_batch(self, embeds: Any, prepared: Head) -> dict[str, Tensor]:
        """Returns predictions, and their probabilities as confidences."""
        logits = prepared(embeds)  # (batch, answers)
        check_finite(logits, "logits", self.suite_set.name)
        return {"predictions": logits.argmax(dim=-1), "confidences": logits.softmax(dim=-1).amax(dim=-1)}

    def right_answers(self, rows: np.ndarray) -> bytes:
        """Returns the targets."""
        return self.targets[rows].astype("<i8").tobytes()

    def result(
        self,
        rows: np.ndarray,
        kept: Mapping[str, np.ndarray],
        prepared: Head,
        fingerprint: str,
        skipped: Sequence[str],
    ) -> SetResult:
        """Returns the answer to every image."""
        one = self.suite_set
        what = kept["predictions"], kept["confidences"], fingerprint, skipped
        return SetResult(one.name, one.role, list(self.answers), rows, self.targets[rows], *what)


def load_labels(suite_set: SuiteSet, dataset: Dataset) -> ClassificationSet:
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
    targets = targets_of_labels[numbers]  # (rows,)
    return ClassificationSet(suite_set, targets != LEFT_OUT, names, answers, targets)


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


def _columns(answers: Mapping[str, list[int]]) -> Tensor:
    """`(answers, most classes of an answer)`: the classes of every answer, the first repeated to equal lengths."""
    longest = max(map(len, answers.values()))
    return torch.tensor([classes + classes[:1] * (longest - len(classes)) for classes in answers.values()])


def _label(dataset: Dataset, column: str, row: int) -> object:
    return dataset.with_format("arrow")[row : row + 1][column][0].as_py()
