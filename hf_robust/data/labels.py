# SPDX-License-Identifier: Apache-2.0
"""From a column of labels to class indices and the names that the data has for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Value

from ..encoders.templates import name_key
from ..errors import DataError

NO_LABEL = -1  # in the place of a label that is not there


def class_indices(
    dataset: datasets.Dataset, column: str, where: str, order: Sequence[str] | None = None
) -> tuple[np.ndarray, list[str] | None]:
    """Reads a column of labels.

    Args:
        dataset: any dataset.
        column: class indices, or text.
        where: the dataset's name, for the message.
        order: class names whose order labels of text take.

    Returns:
        `(rows,)` class indices, -1 for a row without one; and the data's own names of the classes in label order:
        those of its `ClassLabel`; of labels of text `order`, or else these in alphabetical order; or None.

    Raises:
        DataError: the column holds something else, or a label of text is missing, or not in `order`.

    Example:
        >>> class_indices(Dataset.from_dict({"label": ["dog", "cat"]}), "label", "train")
        (array([1, 0]), ['cat', 'dog'])
    """
    feature = dataset.features[column]
    values: list[Any] = dataset.select_columns(column).with_format("arrow")[:][column].to_pylist()
    dtype = feature.dtype if isinstance(feature, ClassLabel | Value) else type(feature).__name__
    if is_text(feature):
        return _of_text(values, where, order or ())
    if "int" not in dtype:
        allowed = "integers from 0, or text"
        raise DataError("labels are no class indices", where=f"{where}, {column}", got=values[:1], allowed=allowed)
    labels = np.array([NO_LABEL if value is None else value for value in values], dtype=np.int64)  # (rows,)
    return labels, list(feature.names) if isinstance(feature, ClassLabel) and feature.names else None


def identity_indices(dataset: datasets.Dataset, column: str, where: str) -> tuple[np.ndarray, list[str]]:
    """Reads a column of identities: of people, products, animals, whose names say nothing.

    Args:
        dataset: any dataset.
        column: any integers, or any strings; strings that differ in blanks or case are different.
        where: the dataset's name, for the message.

    Returns:
        `(rows,)`, 0 to n - 1 for the n identities of the rows, in the order of integers, of a `ClassLabel` or of the
        alphabet; and their names as text.

    Raises:
        DataError: the column holds something else, or a row has no identity.

    Example:
        >>> identity_indices(Dataset.from_dict({"identity": [7, 40, 7]}), "identity", "train")
        (array([0, 1, 0]), ['7', '40'])
    """
    feature = dataset.features[column]
    values: list[Any] = dataset.select_columns(column).with_format("arrow")[:][column].to_pylist()
    dtype = feature.dtype if isinstance(feature, ClassLabel | Value) else type(feature).__name__
    if not is_text(feature) and "int" not in dtype:
        where, allowed = f"{where}, {column}", "integers, or text"
        raise DataError("identities are neither integers nor text", where=where, got=values[:1], allowed=allowed)
    missing = [row for row, value in enumerate(values) if value is None]
    if missing:
        raise DataError("row without identity", where=f"{where}, row {missing[0]}")
    names = list(feature.names) if isinstance(feature, ClassLabel) and feature.names else None
    return number_identities(values, names, where)


def number_identities(values: Sequence[Any], names: Sequence[str] | None, where: str) -> tuple[np.ndarray, list[str]]:
    """Numbers the identities of rows, as `identity_indices` does.

    Args:
        values: `(rows,)`, integers alone or strings alone.
        names: what integers are called; None where they are names themselves.
        where: the dataset's name, for the message.

    Raises:
        DataError: a value is something else, or an integer without name.

    Example:
        >>> number_identities(["b", "a", "b"], None, "train")
        (array([1, 0, 1]), ['a', 'b'])
    """
    texts = len(values) > 0 and isinstance(values[0], str)
    for row, value in enumerate(values):
        if type(value) is not (str if texts else int):
            what, allowed = "identities are neither integers nor text", "integers alone, or text alone"
            raise DataError(what, where=f"{where}, row {row}", got=value, allowed=allowed)
        if names and not texts and value not in range(len(names)):
            what, allowed = "identity is none of those with a name", f"0 to {len(names) - 1}"
            raise DataError(what, where=f"{where}, row {row}", got=value, allowed=allowed)
    found, indices = np.unique(np.array(values, dtype=object), return_inverse=True)  # (identities,), (rows,)
    called = [names[one] if names and not texts else str(one) for one in found.tolist()]
    return indices.astype(np.int64), called


def is_text(feature: Any) -> bool:
    """Whether labels are text.

    Args:
        feature: of the column in `dataset.features`.
    """
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _of_text(values: list[Any], where: str, order: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    missing = [row for row, value in enumerate(values) if value is None or not value.strip()]
    if missing:
        raise DataError("row without label", where=f"{where}, row {missing[0]}", got=values[missing[0]])
    found, labels = np.unique(np.array(values, dtype=object), return_inverse=True)  # (names,), (rows,)
    place = {name_key(name): index for index, name in enumerate(order)}
    lacking = [name for name in found if name_key(name) not in place]
    if order and lacking:
        remedy = "Name all labels, or pass a mapping from them to other words."
        raise DataError("class_names lack a label of the data", where=where, got=lacking[0], remedy=remedy)
    if order:
        return np.array([place[name_key(name)] for name in found])[labels], list(order)
    return labels.astype(np.int64), found.tolist()


def check_labels(labels: np.ndarray, n_classes: int, where: str) -> None:
    """Refuses labels that are no class indices.

    Args:
        labels: `(rows,)`.
        n_classes: number of classes to choose from.
        where: the dataset's name, for the message.

    Raises:
        DataError: a label is none of them.
    """
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DataError("labels are no class indices", where=where, got=labels[:1].tolist(), allowed="integers from 0")
    wrong = np.flatnonzero((labels < 0) | (labels >= n_classes))
    if len(wrong):
        row, label = int(wrong[0]), int(labels[wrong[0]])
        raise DataError(f"label of row {row} is no class", where=where, got=label, allowed=f"0 to {n_classes - 1}")


def replace_labels(
    dataset: datasets.Dataset, column: str, labels: np.ndarray, class_names: list[str]
) -> datasets.Dataset:
    """Puts class indices in the place of a column of labels; images are not copied, as they would be by a cast.

    Args:
        dataset: any dataset; it may show some rows of its table, in its own order.
        column: of the labels.
        labels: `(rows,)`, class indices, -1 for none.
        class_names: one per class.
    """
    everywhere = np.full(len(dataset._data), NO_LABEL)
    everywhere[shown_rows(dataset)] = labels
    return replace_column(dataset, column, everywhere, ClassLabel(names=class_names))


def shown_rows(dataset: datasets.Dataset) -> np.ndarray:
    """Returns which rows of its table a dataset shows, `(rows,)`, in order.

    Args:
        dataset: any dataset.
    """
    indices = dataset._indices
    return np.arange(len(dataset)) if indices is None else indices["indices"].to_numpy().astype(np.int64)


def replace_column(dataset: datasets.Dataset, column: str, everywhere: Any, feature: Any) -> datasets.Dataset:
    """Puts another column in the place of one; the others are not copied.

    Args:
        dataset: any dataset; it may show some rows of its table, in its own order.
        column: the one that goes.
        everywhere: the values, for all rows of the table.
        feature: of the new column.
    """
    # the column is replaced in the whole table, since a dataset with a selection would first copy what it selects
    whole = datasets.Dataset(dataset._data, info=dataset.info, split=dataset.split, fingerprint=dataset._fingerprint)
    whole = whole.remove_columns(column).add_column(column, everywhere, feature=feature)
    whole = whole.select_columns(dataset.column_names)
    shown = whole if dataset._indices is None else whole.select(shown_rows(dataset))
    return shown.with_format(**dataset.format)
