# SPDX-License-Identifier: Apache-2.0
"""Sets of images and texts: which of all texts belong to an image, and which of all images to a text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ..data.columns import no_column
from ..data.rows import LabelledImages
from ..tasks.retrieval_metrics import distinct_texts, retrieval_metrics
from .loaded import LoadedSet, check_finite
from .report import TaskResult
from .suite import SuiteSet
from .text_side import TextSide

DIRECTIONS = ("image_to_text", "text_to_image")


@dataclass(frozen=True)
class RetrievalSet(LoadedSet):
    """A set of images with a text or several each; every image and every text of the set is looked through.

    Args:
        suite_set: the settings.
        wanted: `(rows,)`, whether a row takes part.
        texts: of every row.
    """

    texts: list[list[str]]

    def prepare(self, side: TextSide) -> Tensor:
        """Returns embeddings of the different texts, `(texts, dim)`, L2-normalised."""
        one = self.suite_set
        texts, _, _ = distinct_texts([self.texts[row] for row in np.flatnonzero(self.wanted)])
        embeds = side.texts(texts, one.truncate, one.name)
        check_finite(embeds, "embeddings of texts", one.name)
        return embeds

    def of_batch(self, embeds: Tensor, prepared: Tensor) -> dict[str, Tensor]:
        """Returns the embeddings, which are compared when all are there."""
        check_finite(embeds, "embeddings of images", self.suite_set.name)
        return {"embeds": embeds}

    def right_answers(self, rows: np.ndarray) -> bytes:
        """Returns the texts."""
        return json.dumps([self.texts[row] for row in rows]).encode()

    def result(
        self,
        rows: np.ndarray,
        kept: Mapping[str, np.ndarray],
        prepared: Tensor,
        fingerprint: str,
        skipped: Sequence[str],
    ) -> TaskResult:
        """Returns what `retrieval_metrics` does, without a loss, and `recall@1`, the mean of both directions."""
        one = self.suite_set
        images = torch.from_numpy(kept["embeds"]).to(prepared.device)  # (images, dim)
        _, image_of_pair, text_of_pair = distinct_texts([self.texts[row] for row in rows])
        found = retrieval_metrics(images, prepared, image_of_pair, text_of_pair=text_of_pair)
        both = sum(found[f"{direction}_recall@1"] for direction in DIRECTIONS) / len(DIRECTIONS)
        return TaskResult(one.name, one.role, one.task, rows, {"recall@1": both, **found}, fingerprint, skipped)


def load_texts(suite_set: SuiteSet, images: LabelledImages, dataset: Dataset) -> RetrievalSet:
    """Reads the texts of a set.

    Args:
        suite_set: the settings.
        images: rows of images and texts.
        dataset: where they are from.

    Raises:
        DataError: there is no column of texts.
    """
    texts = images.texts
    if texts is None:
        raise no_column("text", dataset.column_names, suite_set.name)
    return RetrievalSet(suite_set, np.ones(len(texts), dtype=bool), texts)
