# SPDX-License-Identifier: Apache-2.0
"""Sets of images with several labels: how well the scores of a class tell the images that have it from the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from datasets import Dataset
from torch import Tensor

from ..data.class_spaces import ClassSpace, class_space
from ..data.columns import find_column, no_column
from ..data.rows import LabelledImages
from ..errors import DataError
from ..tasks.label_metrics import label_metrics
from .loaded import LoadedSet, check_finite
from .report import TaskResult
from .suite import SEVERAL_LABELS, TARGETS, SuiteSet
from .text_side import Head, TextSide

WITHOUT_THRESHOLD = ("mAP_macro", "mAP_micro", "classes_without_positives")


@dataclass(frozen=True)
class SeveralLabelsSet(LoadedSet):
    """A set of images with any number of labels each. Only the set's own classes are asked for.

    Args:
        suite_set: the settings.
        wanted: `(rows,)`, whether a row takes part.
        class_names: one per column of `targets`.
        targets: `(rows, classes)`, 1, 0, or -1 where that is not known.
    """

    class_names: list[str]
    targets: np.ndarray

    def among_known(self, known: ClassSpace) -> SeveralLabelsSet:
        """Returns the set with a classifier's words for its classes."""
        return replace(self, class_names=known.relate(self.class_names).words[: len(self.class_names)])

    def prepare(self, side: TextSide) -> Head:
        """Returns the head of the classes."""
        return side.head(self.class_names, self.suite_set.templates, TARGETS[SEVERAL_LABELS])

    def of_batch(self, embeds: Tensor, prepared: Head) -> dict[str, Tensor]:
        """Returns the logits, in whose order images stand as in that of their sigmoids."""
        logits = prepared(embeds)[:, : len(self.class_names)]  # (batch, classes)
        check_finite(logits, "logits", self.suite_set.name)
        return {"logits": logits}

    def right_answers(self, rows: np.ndarray) -> bytes:
        """Returns the targets."""
        return self.targets[rows].astype(np.int8).tobytes()

    def result(
        self,
        rows: np.ndarray,
        kept: Mapping[str, np.ndarray],
        prepared: Head,
        fingerprint: str,
        skipped: Sequence[str],
    ) -> TaskResult:
        """Returns those figures of `label_metrics` that need no threshold."""
        one = self.suite_set
        found = label_metrics(kept["logits"], self.targets[rows], threshold=0.0)
        metrics = {name: found[name] for name in WITHOUT_THRESHOLD}
        return TaskResult(one.name, one.role, one.task, rows, metrics, fingerprint, skipped)


def load_label_lists(suite_set: SuiteSet, images: LabelledImages, dataset: Dataset) -> SeveralLabelsSet:
    """Reads the labels of a set.

    Args:
        suite_set: the settings.
        images: rows of images and several labels.
        dataset: where they are from.

    Raises:
        DataError: there is no column of labels, none is known, or the class names are missing or do not fit.
    """
    where = suite_set.name
    if find_column("label", dataset.column_names, where, suite_set.label_column) is None:
        raise no_column("labels", dataset.column_names, where)
    if images.labels is None or not (images.labels == 1).any():
        raise DataError("no image has a label", where=where, allowed="at least one image with one")
    words = class_space(images.class_names, suite_set.class_names, where).words
    classes = images.labels.shape[1]
    if len(words) != classes:
        raise DataError("class_names do not fit the labels", where=where, got=len(words), allowed=f"{classes} names")
    return SeveralLabelsSet(suite_set, np.ones(len(images.labels), dtype=bool), list(words), images.labels)
