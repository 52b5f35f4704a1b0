# SPDX-License-Identifier: Apache-2.0
"""Accuracy, calibration, robustness and forgetting as `evaluate` metrics.

For those who have predictions or accuracies at hand there are functions, in `classification.py` and `statistics.py`. A
metric collects images over batches and ranks, and so gets sets right whose images are spread over ranks. It is built
from its class, never by `evaluate.load`, so that nothing is downloaded:

    accuracy = Accuracy()
    for predictions, references in batches:
        accuracy.add_batch(predictions=predictions, references=references)
    accuracy.compute()

Until `compute` the images are in a file under `cache_dir`, or in memory with `keep_in_memory=True`. On several ranks,
which must share that folder, each builds `Accuracy(num_process=ranks, process_id=rank, experiment_id=run_name)` and
adds its own images, each image once and at least one on every rank; the first rank gets the result, the others None.
All results are fractions.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import ClassVar

import evaluate
import numpy as np
import torch
from datasets import Features, Value
from numpy.typing import ArrayLike

from ..errors import ConfigError, DataError
from .classification import accuracies, expected_calibration_error
from .protocols import harmonic_mean
from .statistics import effective_robustness, forgetting, ood_average


class _ImageMetric(evaluate.Metric):
    """A metric of columns with one entry per image."""

    columns: ClassVar[dict[str, Value]] = {"predictions": Value("int64"), "references": Value("int64")}

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=inspect.cleandoc(self.__doc__ or ""), citation="", features=Features(self.columns)
        )


class Accuracy(_ImageMetric):
    """Accuracy, macro accuracy and worst-class accuracy, see `accuracies`.

    Columns: `predictions` and `references`, the predicted and the true class indices.

    Example:
        >>> Accuracy().compute(predictions=[0, 0, 0, 1], references=[0, 0, 1, 1])
        {'accuracy': 0.75, 'macro_accuracy': 0.75, 'worst_class_accuracy': 0.5}
    """

    def _compute(self, *, predictions: list[int], references: list[int]) -> dict[str, float]:
        return accuracies(predictions, references)


class CalibrationError(_ImageMetric):
    """Expected calibration error, see `expected_calibration_error`.

    Columns: `predictions`, a row of logits or probabilities per image, `(images, classes)`, and `references`, the true
    class indices. Which of the two they are is said to the constructor, since it cannot be told for sure from their
    values: `CalibrationError("logits")` or `CalibrationError("probabilities")`. Only confidence and correctness of
    each image are kept, not the row. `compute` takes `bins`, 15 by default.

    Example:
        >>> CalibrationError("probabilities").compute(predictions=[[0.75, 0.25], [0.25, 0.75]], references=[0, 1])
        {'calibration_error': 0.25}
    """

    columns: ClassVar[dict[str, Value]] = {"predictions": Value("float64"), "references": Value("bool")}

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in ("logits", "probabilities"):
            allowed = "CalibrationError('logits') or CalibrationError('probabilities')"
            raise ConfigError("kind of predictions is not given", got=self.config_name, allowed=allowed)
        return super()._info()

    def add_batch(self, *, predictions: ArrayLike | torch.Tensor, references: ArrayLike | torch.Tensor) -> None:
        """Adds a batch.

        Args:
            predictions: `(batch, classes)`, logits or probabilities.
            references: `(batch,)`, the true class indices.

        Raises:
            DataError: shapes do not fit, values are NaN, a reference is no class, or probabilities do not sum to 1.
        """
        rows = torch.as_tensor(predictions, dtype=torch.float64, device="cpu").detach()
        true = torch.as_tensor(references, device="cpu")
        _check_rows(rows, true, self.config_name)
        rows = rows.softmax(dim=1) if self.config_name == "logits" else rows
        confidences, predicted = rows.max(dim=1)  # (batch,)
        super().add_batch(predictions=confidences.clamp(max=1).tolist(), references=(predicted == true).tolist())

    def add(self, *, prediction: ArrayLike | torch.Tensor, reference: int) -> None:
        """Adds an image.

        Args:
            prediction: `(classes,)`, logits or probabilities.
            reference: the true class index.

        Raises:
            DataError: as in `add_batch`.
        """
        self.add_batch(predictions=torch.as_tensor(prediction)[None], references=torch.as_tensor(reference)[None])

    def _compute(self, *, predictions: list[float], references: list[bool], bins: int = 15) -> dict[str, float]:
        return {"calibration_error": expected_calibration_error(predictions, references, bins)}


class _SetMetric(_ImageMetric):
    """A metric of the accuracies on several sets, of which each image names its own."""

    columns: ClassVar[dict[str, Value]] = _ImageMetric.columns | {"sets": Value("string")}


class BaseNewAccuracy(_SetMetric):
    """Accuracy on base and on new classes and its harmonic mean H, see `base_to_new` and `harmonic_mean`.

    Columns: `predictions` and `references`, class indices among the names of the image's own half, and `sets`,
    `"base"` or `"new"`.

    Example:
        >>> BaseNewAccuracy().compute(predictions=[0, 1, 0], references=[0, 1, 1], sets=["base", "new", "new"])
        {'base_accuracy': 1.0, 'new_accuracy': 0.5, 'harmonic_mean': 0.6666666666666666}
    """

    def _compute(self, *, predictions: list[int], references: list[int], sets: list[str]) -> dict[str, float]:
        found = _accuracy_by_set(predictions, references, sets)
        if found.keys() != {"base", "new"}:
            raise DataError("sets are not the two halves", where="sets", got=sorted(found), allowed="'base' and 'new'")
        h = harmonic_mean(found["base"], found["new"])
        return {"base_accuracy": found["base"], "new_accuracy": found["new"], "harmonic_mean": h}


class OODAverage(_SetMetric):
    """The mean accuracy over out-of-distribution sets, see `ood_average`.

    Columns: `predictions` and `references`, class indices, and `sets`, the name of the image's set.

    Example:
        >>> OODAverage().compute(predictions=[0, 1, 0], references=[0, 1, 1], sets=["sketch", "v2", "v2"])
        {'ood_average': 0.75}
    """

    def _compute(self, *, predictions: list[int], references: list[int], sets: list[str]) -> dict[str, float]:
        return {"ood_average": ood_average(_accuracy_by_set(predictions, references, sets))}


class EffectiveRobustness(_SetMetric):
    """The gain of OOD accuracy over the baseline line, see `effective_robustness`.

    Columns: `predictions` and `references`, class indices, and `sets`: `"id"` for images of the ID set, the name of
    their set for all others, whose `ood_average` counts. `compute` takes `baseline`, ID and OOD accuracy of each
    baseline model.

    Example:
        >>> columns = {"predictions": [0, 1, 0, 0], "references": [0, 1, 1, 0], "sets": ["id", "id", "id", "v2"]}
        >>> round(EffectiveRobustness().compute(**columns, baseline=[(0.5, 0.5)])["effective_robustness"], 4)
        0.3333
    """

    def _compute(
        self,
        *,
        predictions: list[int],
        references: list[int],
        sets: list[str],
        baseline: Sequence[tuple[float, float]],
    ) -> dict[str, float]:
        found = _accuracy_by_set(predictions, references, sets)
        if "id" not in found:
            raise DataError("no image of the ID set", where="sets", got=sorted(found), allowed="'id' and other names")
        id_accuracy = found.pop("id")
        return {"effective_robustness": effective_robustness(id_accuracy, ood_average(found), baseline)}


class Forgetting(_SetMetric):
    """The mean over other tasks of zero-shot minus tuned accuracy, see `forgetting`.

    Columns: `predictions` of the tuned model and `references`, class indices, and `sets`, the name of the image's
    task. `compute` takes `zero_shot`, the zero-shot model's accuracy by task.

    Example:
        >>> columns = {"predictions": [0, 1, 0], "references": [0, 1, 1], "sets": ["dtd", "pets", "pets"]}
        >>> Forgetting().compute(**columns, zero_shot={"dtd": 1.0, "pets": 1.0})
        {'forgetting': 0.25}
    """

    def _compute(
        self, *, predictions: list[int], references: list[int], sets: list[str], zero_shot: Mapping[str, float]
    ) -> dict[str, float]:
        return {"forgetting": forgetting(zero_shot, _accuracy_by_set(predictions, references, sets))}


def _accuracy_by_set(predictions: list[int], references: list[int], sets: list[str]) -> dict[str, float]:
    correct, names = np.array(predictions) == np.array(references), np.array(sets)
    return {str(name): float(correct[names == name].mean()) for name in np.unique(names)}


def _check_rows(rows: torch.Tensor, true: torch.Tensor, kind: str) -> None:
    if rows.ndim != 2 or true.shape != rows.shape[:1]:
        shapes = (tuple(rows.shape), tuple(true.shape))
        raise DataError("predictions and references do not fit", got=shapes, allowed="(batch, classes) and (batch,)")
    if rows.isnan().any():
        raise DataError("predictions are NaN", where="predictions", allowed=kind)
    wrong = true[(true < 0) | (true >= rows.shape[1])]
    if len(wrong):
        raise DataError(
            "label is no class", where="references", got=int(wrong[0]), allowed=f"0 to {rows.shape[1] - 1}"
        )
    sums = rows.sum(dim=1)
    if kind == "probabilities" and ((rows < 0).any() or ((sums - 1).abs() > 0.01).any()):  # 0.01: half precision
        remedy = "For logits: CalibrationError('logits')."
        got = rows[(sums - 1).abs().argmax()].tolist()[:5]
        raise DataError("not probabilities", where="predictions", got=got, allowed="rows that sum to 1", remedy=remedy)
