# SPDX-License-Identifier: Apache-2.0
"""How one row of a user's dataset is read: its image, unopened, and what it has beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import numpy as np
from PIL.Image import Image as PILImage
from torch import Tensor

from ..errors import DataError
from .columns import (
    IDENTITY,
    IMAGE,
    IMAGE_EMBEDS,
    KINDS,
    LABEL,
    LABELS,
    TEXT,
    Target,
    find_column,
    find_target,
    no_column,
)
from .images import UnopenedImage
from .label_lists import class_lists, is_list
from .labels import class_indices, identity_indices
from .texts import check_texts, row_texts

Transform = Callable[[dict[str, list[Any]]], Mapping[str, Any]]


@dataclass(frozen=True)
class Columns:
    """How a row of the user's becomes one of `image` and what it has beside it.

    Args:
        dataset: its name, for messages.
        image: the column of images; None where there are embeddings in their place.
        label: the column of what rows have beside their images; None where there is none.
        transform: what the user gave `set_transform`.
        target: what rows have beside their images; they have it under this name.
    """

    dataset: str
    image: str | None
    label: str | None
    transform: Transform | None = None
    target: Target = "label"

    def read(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """Returns a row with `image`, unopened, and the target, beside its other columns.

        Args:
            row: values by column.
            number: of the row.

        Raises:
            DataError: there is no image, or no text where there must be one.
        """
        where = f"{self.dataset}, row {number}"
        found = {name: value for name, value in row.items() if name not in (self.image, self.label)}
        if self.image is not None:
            if row[self.image] is None:
                raise DataError("row without image", where=where)
            opened = None if self.transform is None else partial(self._transformed, row, where)
            found[IMAGE] = UnopenedImage(row[self.image], where, opened)
        if self.label is not None:
            found[self.target] = row_texts(row[self.label], where) if self.target == TEXT else row[self.label]
        return found

    def _transformed(self, row: Mapping[str, Any], where: str, image: PILImage) -> Any:
        """The user's transform takes batches, of one row here, with the column names that it knows."""
        if self.transform is None or self.image is None:
            return image
        result = self.transform({**{name: [value] for name, value in row.items()}, self.image: [image]})
        if self.image not in result:
            raise no_column("image", result, where)
        if self.label is not None and self.label in result:
            found = result[self.label][0]
            if (found.tolist() if isinstance(found, Tensor | np.ndarray) else found) != row[self.label]:
                what, remedy = (
                    f"transform changes a {self.target}",
                    "Use dataset.map(...), which changes it for everyone.",
                )
                raise DataError(what, where=where, got=found, remedy=remedy)
        return result[self.image][0]


def table_columns(
    features: Mapping[str, Any],
    where: str,
    image_column: str | None,
    label_column: str | None,
    target: Target | None,
    transform: Transform | None = None,
) -> tuple[Columns, Target | None]:
    """Finds the columns of a dataset that says what they hold.

    Args:
        features: by column.
        where: the dataset's name, for messages.
        image_column: the column of images; None for the one with a usual spelling.
        label_column: likewise, of what rows have beside their images.
        target: what that is; None where the columns decide.
        transform: what the user gave `set_transform`.

    Returns:
        The columns, and the target; None if none was named, and there is none.

    Raises:
        DataError: a column is missing, or is one of several; or there are columns of several targets to choose from.
    """
    image = find_image(features, where, image_column)
    if target is None and label_column is None:
        target, label = find_target(features, where) or (None, None)
        target = "labels" if target == LABEL and is_list(features[str(label)]) else target
    else:
        label = find_column(KINDS[target or "label"], features, where, label_column)
        target = target or ("labels" if is_list(features[str(label)]) else "label")
    return Columns(where, image, label, transform, target or "label"), target


def table_labels(
    dataset: datasets.Dataset, columns: Columns, order: Sequence[str] | None
) -> tuple[np.ndarray | None, list[str] | None]:
    """Reads what rows have beside their images, as far as it is indices; texts are looked at.

    Args:
        dataset: with at least one row.
        columns: which count.
        order: as of `labelled_images`.

    Returns:
        Labels and class names as of `LabelledImages`.

    Raises:
        DataError: a row lacks its target, or has one that cannot be used.
    """
    if columns.label is None:
        return None, None
    if columns.target == TEXT:
        check_texts(dataset, columns.label, columns.dataset)
        return None, None
    if columns.target == IDENTITY:
        return identity_indices(dataset, columns.label, columns.dataset)
    read = class_lists if columns.target == LABELS else class_indices
    return read(dataset, columns.label, columns.dataset, order)


def read_row(row: Any, number: int, where: str, columns: Columns | None, target: Target) -> dict[str, Any]:
    """Returns a row as `Columns.read` does.

    Args:
        row: a mapping, or a pair of an image and what it has beside it.
        number: of the row.
        where: the dataset's name, for messages.
        columns: which count; None where that shows in the row.
        target: what a row has beside its image, where `columns` do not say it.

    Raises:
        DataError: it is neither of both, or lacks an image.
    """
    if isinstance(row, tuple | list) and len(row) == 2:
        row = dict(zip((IMAGE, target), row, strict=True))
    if not isinstance(row, Mapping):
        allowed = f"a mapping with 'image' and {target!r}, or a pair of both"
        raise DataError("row is of an unknown type", where=where, got=type(row).__name__, allowed=allowed)
    if columns is None:
        label = find_column(KINDS[target], row, where)
        columns = Columns(where, find_image(row, where), label, target=target)
    return columns.read(row, number)


def transform_of(dataset: datasets.Dataset) -> Transform | None:
    """Returns what the user gave `set_transform`; None where there is none.

    Args:
        dataset: any dataset.
    """
    return dataset.format["format_kwargs"]["transform"] if dataset.format["type"] == "custom" else None


def find_image(names: Iterable[str], where: str, named: str | None = None) -> str | None:
    """Returns the name of the column of images; None where there are embeddings in their place.

    Args:
        names: of the columns.
        where: the dataset's name, for messages.
        named: the column that the user names.

    Raises:
        DataError: there is neither of both, or several could be the images.
    """
    names = list(names)
    image = find_column("image", names, where, named)
    if image is None and IMAGE_EMBEDS not in names:
        raise no_column("image", names, where)
    return image
