# SPDX-License-Identifier: Apache-2.0
"""What an evaluation found: per set, per role, and per image."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from .classification import accuracies, expected_calibration_error
from .roles import ROLES
from .statistics import bootstrap_interval
from .suite import CLASSIFICATION

# what is printed, by task; the first is the one whose means over roles are
SHOWN = {
    "classification": ("accuracy", "macro_accuracy", "worst_class_accuracy", "calibration_error"),
    "retrieval": (
        "recall@1",
        *(f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)),
    ),
    "several_labels": ("mAP_macro", "mAP_micro"),
}


@dataclass(frozen=True)
class SetResult:
    """What a model answered on one set of classification.

    Args:
        name: the set's name.
        role: `"id"`, `"ood"`, `"new"` or `"other"`.
        answers: names of what could be predicted.
        rows: `(images,)`, where in the dataset the images stand; those that were left out are missing.
        targets: `(images,)`, the right answers, indices into `answers`.
        predictions: `(images,)`, what the model answered, likewise.
        confidences: `(images,)`, the probability of the prediction, a fraction: softmax over the answers' logits.
        fingerprint: stands for the decoded images, before any corruption, and their right answers, in order. Two runs
            with the same one can be compared image by image.
        skipped: what is wrong with the images that were left out by `on_bad_image="skip"`.
    """

    name: str
    role: str
    answers: list[str]
    rows: np.ndarray
    targets: np.ndarray
    predictions: np.ndarray
    confidences: np.ndarray
    fingerprint: str
    skipped: Sequence[str] = ()

    @property
    def task(self) -> str:
        """`"classification"`."""
        return CLASSIFICATION

    @property
    def correct(self) -> np.ndarray:
        """`(images,)`, whether the prediction is right."""
        return self.predictions == self.targets

    @property
    def accuracy(self) -> float:
        """Share of the images whose prediction is right."""
        return float(self.correct.mean())

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The figures, fractions: accuracy, its 95 % interval, macro and worst-class accuracy, calibration error."""
        low, high = bootstrap_interval(self.correct)
        interval = {"accuracy_low": low, "accuracy_high": high}
        error = expected_calibration_error(np.minimum(self.confidences, 1), self.correct)  # softmax may round above 1
        return {**accuracies(self.predictions, self.targets), **interval, "calibration_error": error}

    def to_dict(self) -> dict[str, Any]:
        """Returns figures and answers as JSON can hold them."""
        return {
            "role": self.role,
            "task": self.task,
            "images": len(self.targets),
            "skipped": list(self.skipped),
            **self.metrics,
            "fingerprint": self.fingerprint,
            "answers": self.answers,
            "rows": self.rows.tolist(),
            "targets": self.targets.tolist(),
            "predictions": self.predictions.tolist(),
            "confidences": [round(confidence, 6) for confidence in self.confidences.tolist()],
        }


@dataclass(frozen=True)
class TaskResult:
    """What was found on one set of another task than classification.

    Args:
        name: the set's name.
        role: `"id"`, `"ood"`, `"new"` or `"other"`.
        task: `"retrieval"` or `"several_labels"`.
        rows: `(images,)`, where in the dataset the images stand; those that were left out are missing.
        metrics: those of `retrieval_metrics`, and `recall@1`, the mean of both directions; or those of `label_metrics`
            that need no threshold.
        fingerprint: stands for the decoded images, before any corruption, and their texts or labels, in order.
        skipped: what is wrong with the images that were left out by `on_bad_image="skip"`.
    """

    name: str
    role: str
    task: str
    rows: np.ndarray
    metrics: dict[str, float]
    fingerprint: str
    skipped: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns what was found as JSON can hold it."""
        return {
            "role": self.role,
            "task": self.task,
            "images": len(self.rows),
            "skipped": list(self.skipped),
            "metrics": self.metrics,
            "fingerprint": self.fingerprint,
            "rows": self.rows.tolist(),
        }


@dataclass(frozen=True)
class SuiteReport:
    """What a model answered on all sets of a suite; printed as a table for each task.

    Figures of different tasks cannot be compared, so no mean is of sets of several tasks.

    Args:
        sets: results by name, in the order of the suite.
        config: how it was evaluated.
        versions: of the packages that had a part in it.

    Example:
        >>> report = evaluate_suite(model, processor, suite)
        >>> report.sets["photos"].accuracy, report.means["ood"]
        (0.75, 0.5)
    """

    sets: dict[str, SetResult | TaskResult]
    config: dict[str, Any]
    versions: dict[str, str]

    @property
    def classified(self) -> dict[str, SetResult]:
        """The results of the sets of classification, by name."""
        return {name: one for name, one in self.sets.items() if isinstance(one, SetResult)}

    @property
    def means(self) -> dict[str, float]:
        """The mean accuracy over the sets of classification of every role there is, a fraction; see `means_of`."""
        return self.means_of("accuracy")

    def means_of(self, metric: str) -> dict[str, float]:
        """Returns the mean of a metric by role, over the sets whose task has it; every set counts the same.

        Args:
            metric: `"accuracy"`, `"image_to_text_recall@5"` or `"mAP_macro"`, say.

        Returns:
            Without the roles that have no such set.

        Example:
            >>> report.means_of("recall@1")
            {'other': 0.625}
        """
        of_sets = [(one.role, one.metrics[metric]) for one in self.sets.values() if metric in one.metrics]
        by_role = {role: [value for of_set, value in of_sets if of_set == role] for role in ROLES}
        return {role: sum(found) / len(found) for role, found in by_role.items() if found}

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as JSON can hold it; `means` are those of accuracies."""
        sets = {name: result.to_dict() for name, result in self.sets.items()}
        return {"means": self.means, "sets": sets, "config": self.config, "versions": self.versions}

    def to_json(self, path: str | Path) -> None:
        """Writes a JSON file, which is complete or not there.

        Args:
            path: the file.
        """
        write_json(self.to_dict(), Path(path))

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> SuiteReport:
        """Returns the report that `to_dict` was called on; confidences have six decimals.

        Args:
            content: what `to_dict` returned, or was read from the file that `to_json` wrote.
        """
        sets = {name: _result(name, found) for name, found in content["sets"].items()}
        return cls(sets, content["config"], content["versions"])

    def __str__(self) -> str:
        tasks = [task for task in SHOWN if any(one.task == task for one in self.sets.values())]
        tables = "\n\n".join(map(self._table, tasks))
        left_out = [
            f"{one.name}: {len(one.skipped)} images were left out" for one in self.sets.values() if one.skipped
        ]
        return "\n".join([tables, *left_out])

    def _table(self, task: str) -> str:
        """The sets of a task, and their means by role."""
        shown = SHOWN[task]
        interval = ["95 % interval"] if task == CLASSIFICATION else []
        table = [["set", "role", "images", *map(_title, shown), *interval]]
        for one in self.sets.values():
            if one.task == task:
                figures = [f"{one.metrics[name]:.4f}" for name in shown]
                table.append([one.name, one.role, str(len(one.rows)), *figures])
                if interval:
                    table[-1].append(f"{one.metrics['accuracy_low']:.4f} to {one.metrics['accuracy_high']:.4f}")
        table += [["mean", role, "", f"{mean:.4f}"] for role, mean in self.means_of(shown[0]).items()]
        widths = [max(map(len, column)) for column in zip_longest(*table, fillvalue="")]
        return "\n".join("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table)


def _title(metric: str) -> str:
    return metric.replace("_to_", "→").replace("_", " ")


def _result(name: str, found: dict[str, Any]) -> SetResult | TaskResult:
    """What `to_dict` of a result was called on; a report of earlier versions is of classification alone."""
    task, skipped = found.get("task", CLASSIFICATION), found.get("skipped", [])
    if task != CLASSIFICATION:
        rows = np.array(found["rows"], dtype=np.int64)
        return TaskResult(name, found["role"], task, rows, found["metrics"], found["fingerprint"], skipped)
    arrays = {"rows": np.int64, "targets": np.int64, "predictions": np.int64, "confidences": np.float64}
    values: Any = {key: np.array(found[key], dtype=dtype) for key, dtype in arrays.items()}
    texts = {key: found[key] for key in ("role", "answers", "fingerprint")}
    return SetResult(name=name, **texts, **values, skipped=skipped)


def write_json(content: dict[str, Any], path: Path) -> None:
    """Writes a JSON file that is complete or not there.

    Args:
        content: what JSON can hold.
        path: the file; its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
