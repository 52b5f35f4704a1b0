# SPDX-License-Identifier: Apache-2.0
"""What the evaluations of a trainer have found, kept for the card of the model it saves."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
from torch.utils.data import ConcatDataset

from ..data.readable import bad_rows
from ..data.rows import LabelledImages
from ..evaluation.roles import Role
from .results import Accuracy, CardResults, Column, EvaluationSet, with_interval

HIDDEN = ("validation", "train")  # sets that a choice was made on, or the training


@dataclass
class FoundSet:
    """What has been found on one set.

    Args:
        role: as in `EvaluationSet`.
        images: number of images.
        bad: what is wrong with images that were left out.
        rows: the set, so that its datasets live and it is known again.
        metrics: by column.
        steps: by column, which step of the training the model was at.
    """

    role: Role
    images: int
    bad: list[str]
    rows: LabelledImages
    metrics: dict[Column, Mapping[str, float]] = field(default_factory=dict)
    steps: dict[Column, int] = field(default_factory=dict)


class Found:
    """What the evaluations of a trainer have found, by set and by the model that was evaluated.

    Example:
        >>> found = Found(("accuracy", "loss"))
        >>> found.note("id", rows, "id", "zero-shot", {"accuracy": 0.5, "loss": 0.7})
        >>> found.note("id", rows, "id", "fine-tuned", {"accuracy": 0.75, "loss": 0.6}, step=100)
        >>> found.results(step=100).columns
        ['zero-shot', 'fine-tuned']
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.sets: dict[str, FoundSet] = {}

    def note(
        self, name: str, rows: LabelledImages, role: Role, column: Column, metrics: Mapping[str, float], step: int = 0
    ) -> None:
        """Keeps the metrics of a set, in the place of what was found of the same model on it before.

        Args:
            name: the set's. If it is that of a set with other rows, what was found on that one is forgotten. Rows are
                others if their numbers, their labels or their dataset are: by its fingerprint, else as an object.
            rows: the set.
            role: as in `EvaluationSet`.
            column: which model was evaluated.
            metrics: by name, without the set's. If the first of the task's is no fraction among them, as where a user
                computes others, nothing is kept.
            step: of the training.
        """
        if name in HIDDEN or not 0 <= metrics.get(self.names[0], -1) <= 1:
            return
        if name not in self.sets or _mark(self.sets[name].rows) != _mark(rows):
            self.sets[name] = FoundSet(role, len(rows), bad_rows(rows), rows)
        self.sets[name].metrics[column] = {n: metrics[n] for n in self.names if n in metrics}
        self.sets[name].steps[column] = step

    def forget(self, *columns: Column) -> None:
        """Forgets what was found of models that there are no more.

        Args:
            *columns: these models.
        """
        for one in self.sets.values():
            for column in columns:
                one.metrics.pop(column, None)

    def results(self, step: int, chosen_alpha: float | None = None) -> CardResults | None:
        """Returns what a card shows; None where nothing is known of the model that is saved.

        Args:
            step: of the training, which the fine-tuned model is at; another's metrics are left out.
            chosen_alpha: as in `CardResults`.
        """
        found = []
        for name, one in self.sets.items():
            of_set = {c: m for c, m in one.metrics.items() if c != "fine-tuned" or one.steps[c] == step}
            shares = {column: metrics[self.names[0]] for column, metrics in of_set.items()}
            known = self.names[0] == "accuracy"
            accuracies = {c: with_interval(v, one.images) if known else Accuracy(v) for c, v in shares.items()}
            more = {c: {n: m[n] for n in self.names[1:] if n in m and n != "loss"} for c, m in of_set.items()}
            found.append(EvaluationSet(name, one.role, one.images, accuracies, more=more))
        results = CardResults(found, chosen_alpha, metric=self.names[0])
        is_known = any(results.saved in one.accuracies for one in found)
        return results if is_known or chosen_alpha is not None else None


def _mark(rows: LabelledImages) -> tuple[Any, ...]:
    """Stands for the rows of a set, whose images are not read."""
    labels = b"" if rows.shown_labels is None else rows.shown_labels.tobytes()
    digests = [hashlib.sha256(content).hexdigest() for content in (rows.numbers.tobytes(), labels)]
    if isinstance(rows.rows, datasets.Dataset):
        return *digests, rows.rows._fingerprint
    if type(rows.rows) is ConcatDataset:  # made anew wherever a set is given
        parts: Any = rows.rows.datasets
        return *digests, *map(_mark, parts)
    return *digests, id(rows.rows)
