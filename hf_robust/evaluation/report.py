# SPDX-License-Identifier: Apache-2.0
"""What an evaluation found: per set, per role, and per image."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .metrics import accuracies, expected_calibration_error
from .roles import ROLES
from .statistics import bootstrap_interval

SHOWN = ("accuracy", "macro_accuracy", "worst_class_accuracy", "calibration_error")


@dataclass(frozen=True)
class SetResult:
    """What a model answered on one set.

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
    def correct(self) -> np.ndarray:
        """`(images,)`, whether the prediction is right."""
        return self.predictions == self.targets

    @property
    def accuracy(self) -> float:
        """Share of the images whose prediction is right."""
        return float(self.correct.mean())

    @property
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
class SuiteReport:
    """What a model answered on all sets of a suite; printed as a table.

    Args:
        sets: results by name, in the order of the suite.
        config: how it was evaluated.
        versions: of the packages that had a part in it.

    Example:
        >>> report = evaluate_suite(model, processor, suite)
        >>> report.sets["photos"].accuracy, report.means["ood"]
        (0.75, 0.5)
    """

    sets: dict[str, SetResult]
    config: dict[str, Any]
    versions: dict[str, str]

    @property
    def means(self) -> dict[str, float]:
        """The mean accuracy over the sets of every role there is, a fraction; every set counts the same."""
        by_role = {role: [one.accuracy for one in self.sets.values() if one.role == role] for role in ROLES}
        return {role: sum(found) / len(found) for role, found in by_role.items() if found}

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as JSON can hold it."""
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
        arrays = {"rows": np.int64, "targets": np.int64, "predictions": np.int64, "confidences": np.float64}
        sets = {}
        for name, found in content["sets"].items():
            values: Any = {key: np.array(found[key], dtype=dtype) for key, dtype in arrays.items()}
            texts = {key: found[key] for key in ("role", "answers", "fingerprint")}
            sets[name] = SetResult(name=name, **texts, **values, skipped=found.get("skipped", []))
        return cls(sets, content["config"], content["versions"])

    def __str__(self) -> str:
        table = [["set", "role", "images", *(name.replace("_", " ") for name in SHOWN), "95 % interval"]]
        for one in self.sets.values():
            found = one.metrics
            interval = f"{found['accuracy_low']:.4f} to {found['accuracy_high']:.4f}"
            figures = [f"{found[name]:.4f}" for name in SHOWN]
            table.append([one.name, one.role, str(len(one.targets)), *figures, interval])
        for role, mean in self.means.items():
            table.append(["mean", role, "", f"{mean:.4f}", *[""] * len(SHOWN)])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
        left_out = [
            f"{one.name}: {len(one.skipped)} images were left out" for one in self.sets.values() if one.skipped
        ]
        return "\n".join(lines + left_out)


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
