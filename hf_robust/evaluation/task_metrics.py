# SPDX-License-Identifier: Apache-2.0
"""Retrieval, several labels and identities as `evaluate` metrics, built and used as those of `metrics.py`.

For those who have all embeddings or scores at hand there are functions in `hf_robust.tasks`: `retrieval_metrics`,
`label_metrics`, `identity_metrics`, and `verification_metrics` for a list of pairs.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import evaluate
import numpy as np
import torch
from datasets import Features, Value
from numpy.typing import ArrayLike

from ..errors import DataError
from ..tasks.identity_metrics import identity_metrics
from ..tasks.label_metrics import label_metrics
from ..tasks.retrieval_metrics import retrieval_metrics

ROW = Value("binary")  # a row of numbers is kept as its bytes; a list of Python's floats takes eight times the memory


class _RowMetric(evaluate.Metric):
    """A metric of columns with a row of numbers, or one integer, per entry."""

    columns: ClassVar[dict[str, Value]]
    kept_as: ClassVar[torch.dtype] = torch.float32  # numbers of rows

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=inspect.cleandoc(self.__doc__ or ""), citation="", features=Features(self.columns)
        )

    def add_batch(self, **columns: ArrayLike | torch.Tensor) -> None:
        """Adds a batch.

        Args:
            columns: `(batch, …)` each, see the class.

        Raises:
            DataError: what should be rows of numbers is not.
        """
        kept: dict[str, Any] = dict(columns)
        for name in [name for name, kind in self.columns.items() if kind == ROW]:
            rows = torch.as_tensor(kept[name], dtype=self.kept_as, device="cpu").detach()
            if rows.ndim != 2:
                raise DataError("not rows of numbers", where=name, got=tuple(rows.shape), allowed="(batch, numbers)")
            kept[name] = [row.tobytes() for row in rows.numpy()]
        super().add_batch(**kept)

    def add(self, *, prediction: Any = None, reference: Any = None, **columns: Any) -> None:
        """Adds an entry.

        Args:
            prediction: of the column `predictions`, if there is one.
            reference: of the column `references`, likewise.
            columns: of all others.

        Raises:
            DataError: as in `add_batch`.
        """
        entry = {"predictions": prediction, "references": reference} | columns
        self.add_batch(**{name: torch.as_tensor(entry[name])[None] for name in self.columns})

    def _rows(self, kept: list[bytes], where: str) -> torch.Tensor:
        lengths = {len(row) for row in kept}
        if len(lengths) != 1:
            got = sorted(length // self.kept_as.itemsize for length in lengths)
            raise DataError("rows are not of one length", where=where, got=got, allowed="one for all entries")
        return torch.frombuffer(bytearray().join(kept), dtype=self.kept_as).reshape(
            len(kept), -1
        )  # (entries, numbers)


class RetrievalRecall(_RowMetric):
    """Recall and median rank of image-text retrieval, both ways, see `retrieval_metrics`.

    Columns, an entry per text: `text_embeds`, its embedding, `(texts, dim)`; `image_embeds`, that of its image,
    likewise; and `images`, which image that is, an integer. Of an image with several texts the embedding is taken from
    the first. `compute` takes `scale`, for the loss.

    Example:
        >>> found = RetrievalRecall().compute(text_embeds=torch.eye(2), image_embeds=torch.eye(2), images=[7, 8])
        >>> found["image_to_text_recall@1"], found["text_to_image_median_rank"]
        (1.0, 1.0)
    """

    columns: ClassVar[dict[str, Value]] = {"text_embeds": ROW, "image_embeds": ROW, "images": Value("int64")}

    def _compute(
        self, *, text_embeds: list[bytes], image_embeds: list[bytes], images: list[int], scale: float | None = None
    ) -> dict[str, float]:
        _, first, image_of_text = np.unique(images, return_index=True, return_inverse=True)
        image_rows = self._rows(image_embeds, "image_embeds")[first]  # (images, dim)
        return retrieval_metrics(image_rows, self._rows(text_embeds, "text_embeds"), image_of_text, scale)


class MeanAveragePrecision(_RowMetric):
    """Mean average precision and F1 of several labels an image, see `label_metrics`.

    Columns: `predictions`, a row of scores per image, `(images, classes)`, and `references`, `(images, classes)`, 1 or
    0, and -1 or NaN where it is not known. `compute` takes `threshold`, the least score that says an image has a
    label.

    Example:
        >>> columns = {"predictions": [[2.0, -1.0], [1.0, 3.0]], "references": [[1, 0], [0, 1]]}
        >>> found = MeanAveragePrecision().compute(**columns, threshold=0.0)
        >>> found["mAP_macro"], found["f1_micro"]
        (1.0, 0.8)
    """

    columns: ClassVar[dict[str, Value]] = {"predictions": ROW, "references": ROW}
    kept_as = torch.float64

    def _compute(self, *, predictions: list[bytes], references: list[bytes], threshold: float) -> dict[str, float]:
        return label_metrics(self._rows(predictions, "predictions"), self._rows(references, "references"), threshold)


class Verification(_RowMetric):
    """Recall@1 and mAP@R of identities, ROC AUC and TAR at FAR of all pairs of images, see `identity_metrics`.

    Columns: `predictions`, an embedding per image, `(images, dim)`, and `references`, its identity, an integer.

    Example:
        >>> found = Verification().compute(predictions=torch.eye(2)[[0, 0, 1, 1]], references=[5, 5, 6, 6])
        >>> found["recall@1"], found["roc_auc"]
        (1.0, 1.0)
    """

    columns: ClassVar[dict[str, Value]] = {"predictions": ROW, "references": Value("int64")}

    def _compute(self, *, predictions: list[bytes], references: list[int]) -> dict[str, float]:
        return identity_metrics(self._rows(predictions, "predictions"), references)
