# SPDX-License-Identifier: Apache-2.0
"""What a set of a suite is for an evaluation, whatever its task: rows that take part, figures of their embeddings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from ..data.class_spaces import ClassSpace
from ..errors import DataError, NonFiniteError
from .report import SetResult, TaskResult
from .suite import SuiteSet
from .text_side import TextSide


@dataclass(frozen=True)
class LoadedSet(ABC):
    """A set whose labels or texts have been read; its images have not.

    Args:
        suite_set: the settings.
        wanted: `(rows,)`, whether a row takes part.
    """

    suite_set: SuiteSet
    wanted: np.ndarray

    def with_rows(self, rows: np.ndarray) -> LoadedSet:
        """Returns the set without the other rows.

        Args:
            rows: the numbers of those that stay.

        Raises:
            DataError: no row that took part stays.
        """
        wanted = np.zeros_like(self.wanted)
        wanted[rows] = self.wanted[rows]
        if not wanted.any():
            raise DataError("all images are left out", where=self.suite_set.name, got=self.suite_set.merge)
        return replace(self, wanted=wanted)

    def among_known(self, known: ClassSpace) -> LoadedSet:
        """Returns the set as a classifier of its task answers it.

        Args:
            known: the classifier's classes.
        """
        return self

    @abstractmethod
    def prepare(self, side: TextSide) -> Any:
        """Returns what images are compared with; no image has been opened then.

        Args:
            side: gives heads and embeddings of texts.
        """

    @abstractmethod
    def of_batch(self, embeds: Any, prepared: Any) -> dict[str, Tensor]:
        """Returns what is kept of a batch, by name: `(batch, …)` each.

        Args:
            embeds: what `TextSide.embed` returned: `(batch, dim)`, L2-normalised, if of one model.
            prepared: what `prepare` returned.

        Raises:
            NonFiniteError: there is NaN or infinity in it.
        """

    @abstractmethod
    def right_answers(self, rows: np.ndarray) -> bytes:
        """Returns what is right for some rows, for the fingerprint.

        Args:
            rows: their numbers, in order.
        """

    @abstractmethod
    def result(
        self, rows: np.ndarray, kept: Mapping[str, np.ndarray], prepared: Any, fingerprint: str, skipped: Sequence[str]
    ) -> SetResult | TaskResult:
        """Returns what was found.

        Args:
            rows: `(images,)`, the numbers of those that took part, in order.
            kept: what `of_batch` returned of them, `(images, …)` each.
            prepared: what `prepare` returned.
            fingerprint: stands for images and right answers.
            skipped: what is wrong with the images that were left out.
        """


def check_finite(values: Tensor, what: str, where: str) -> None:
    """Refuses NaN and infinity.

    Args:
        values: of any shape.
        what: they are, for the message.
        where: the set's name, likewise.

    Raises:
        NonFiniteError: there is one.
    """
    if not values.isfinite().all():
        raise NonFiniteError(f"{what} are NaN or infinite", where=where)
