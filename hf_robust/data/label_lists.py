# SPDX-License-Identifier: Apache-2.0
"""From a column of several labels to a matrix that says which class each image has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import ClassLabel, LargeList, List, Value

from ..encoders.templates import name_key
from ..errors import DataError
from .labels import NO_LABEL, replace_column, shown_rows

REMEDY = "Cast indices to List(ClassLabel(names=...)), and vectors to List(Value('bool'))."
UNKNOWN = "it is not known which classes there are"
OF_ROWS = "Give 0/1 vectors with an entry for every class, or names of classes; or use a datasets.Dataset."
NO_NAMES = "Cast the column to List(ClassLabel(names=...)), or pass class_names as a list."


def is_list(feature: Any) -> bool:
    """Whether a column holds a list in every row.

    Args:
        feature: of the column in `dataset.features`.
    """
    return isinstance(feature, List | LargeList)


def is_of_indices(feature: Any) -> bool:
    """Whether a column says that it holds lists of class indices, and of which classes.

    Args:
        feature: of the column in `dataset.features`.
    """
    return is_list(feature) and isinstance(feature.feature, ClassLabel) and bool(feature.feature.names)


def class_lists(
    dataset: datasets.Dataset, column: str, where: str, order: Sequence[str] | None = None
) -> tuple[np.ndarray, list[str] | None]:
    """Reads a column of several labels.

    Args:
        dataset: any dataset.
        column: of lists: of class indices, of class names, or 0/1 vectors with an entry for every class.
        where: the dataset's name, for messages.
        order: class names whose order indices, vectors and names take.

    Returns:
        `(rows, classes)` int8: 1 for a class that the image has, 0 for one that it has not, -1 for one of which that
        is not known (-1, None or NaN in a vector). And the names of the classes: those of `List(ClassLabel)`; else
        `order`; else the names in alphabetical order; None for vectors without any.

    Raises:
        DataError: the column holds something else; a row has no list, an unknown class, a vector of another length;
            or it cannot be told which classes, or whether indices or vectors, are meant.

    Example:
        >>> class_lists(Dataset.from_dict({"labels": [["dog", "cat"], []]}), "labels", "train")
        (array([[1, 1], [0, 0]], dtype=int8), ['cat', 'dog'])
    """
    feature = dataset.features[column]
    if not is_list(feature):
        allowed = "lists of class indices, lists of class names, or 0/1 vectors"
        raise DataError("labels are no lists", where=f"{where}, {column}", got=str(feature), allowed=allowed)
    lists = _Lists.of(dataset.select_columns(column).with_format("arrow")[:][column].combine_chunks(), where)
    if is_of_indices(feature):
        names = list(feature.feature.names)
        return _of_indices(lists, names), names
    return _many_hot(lists, list(order) if order else None)


def row_labels(
    value: Any, number: int, where: str, names: Sequence[str] | None, are_indices: bool = False
) -> list[int]:
    """Returns which classes a row has, as a row of what `class_lists` returns.

    A row by itself does not show whether integers are a vector or indices, so that they are taken for a vector.

    Args:
        value: what the row has: class names, or a 0/1 vector with an entry for every class.
        number: of the row.
        where: the dataset's name, for messages.
        names: of all classes; None for 0/1 vectors.
        are_indices: whether the data say that it is a list of class indices.

    Raises:
        DataError: as of `class_lists`; there are indices where the data do not say so; or there are names in the place
            of a vector, of which not all are known.

    Example:
        >>> row_labels(["owl", "cat"], 0, "train", ["cat", "dog", "owl"])
        [1, 0, 1]
    """
    place = f"{where}, row {number}"
    plain = value.tolist() if isinstance(value, np.ndarray | torch.Tensor) else value
    if not isinstance(plain, list | tuple):
        raise DataError("labels are no lists", where=place, got=value, allowed="a list")
    try:
        lists = _Lists.of(pa.array([plain]), where, number)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise DataError("labels are neither integers nor text", where=place, got=value) from error
    if names is None and (pa.types.is_string(lists.flat.type) or not plain):
        raise DataError(UNKNOWN, where=place, got=value, remedy=NO_NAMES)
    if names is not None and (are_indices or not plain):
        return _of_indices(lists, list(names))[0].tolist()
    return _many_hot(lists, None if names is None else list(names))[0][0].tolist()


@dataclass(frozen=True)
class _Lists:
    """Lists in Arrow: `flat` has all entries, `(entries,)`, `lengths` how many each row has, `(rows,)`.

    `number` is that of the row, where there is one that was read by itself; there integers are `vectors`, as they are
    where all lists are of one length by their type.
    """

    flat: Any
    lengths: np.ndarray
    vectors: bool
    where: str
    number: int | None

    @classmethod
    def of(cls, lists: Any, where: str, number: int | None = None) -> _Lists:
        """Refuses rows without a list."""
        if lists.null_count:
            row = int(np.flatnonzero(lists.is_null().to_numpy(zero_copy_only=False))[0])
            remedy = "An empty list says that an image has none of the classes."
            raise DataError("row without labels", where=f"{where}, row {row}", remedy=remedy)
        lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)  # (rows,)
        vectors = number is not None or pa.types.is_fixed_size_list(lists.type)
        return cls(pc.list_flatten(lists), lengths, vectors, where, number)

    @property
    def rows(self) -> np.ndarray:
        """`(entries,)`, the row of each entry."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def place(self, row: int) -> str:
        """For messages."""
        return f"{self.where}, row {row if self.number is None else self.number}"

    @property
    def everywhere(self) -> str:
        """For messages about no row, or the only one."""
        return self.where if self.number is None else self.place(0)

    def numbers(self) -> np.ndarray:
        """`(entries,)`, in floating point; -1 for what is not known."""
        values = pc.fill_null(pc.cast(self.flat, pa.float64()), NO_LABEL).to_numpy(zero_copy_only=False)
        return np.where(np.isnan(values), NO_LABEL, values)

    def marked(self, classes: np.ndarray, n_classes: int) -> np.ndarray:
        """`(rows, classes)`, with a 1 where a row has a class; `classes` is that of each entry."""
        found = np.zeros((len(self.lengths), n_classes), np.int8)
        found[self.rows, classes] = 1
        return found


def _many_hot(lists: _Lists, names: list[str] | None) -> tuple[np.ndarray, list[str] | None]:
    kind = lists.flat.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _of_names(lists, names)
    if pa.types.is_boolean(kind) or pa.types.is_floating(kind):
        return _of_vectors(lists, names), names
    if not pa.types.is_integer(kind) and not pa.types.is_null(kind):  # empty lists alone have no type
        raise DataError("labels are neither integers nor text", where=lists.everywhere, got=str(kind))
    if lists.vectors or _are_vectors(lists, names):
        return _of_vectors(lists, names), names
    if names is None:
        raise DataError(UNKNOWN, where=lists.everywhere, remedy=NO_NAMES)
    return _of_indices(lists, names), names


def _are_vectors(lists: _Lists, names: list[str] | None) -> bool:
    """Whether lists of integers are vectors: of one length, of 0, 1 and -1; a list of indices has none twice."""
    values, length = lists.numbers(), int(lists.lengths[0])
    if length < 2 or (lists.lengths != length).any() or not np.isin(values, (0, 1, NO_LABEL)).all():
        return False
    if length > 2:
        return True
    if names is not None and len(names) != 2:
        return False
    pairs = values.reshape(-1, 2)  # (rows, 2)
    if (pairs.sum(axis=1) == 1).all():  # 0 and 1 in every row
        what, got = "labels may be class indices, or 0/1 vectors", pairs[0].astype(int).tolist()
        raise DataError(what, where=lists.everywhere, got=got, remedy=REMEDY)
    return True


def _of_vectors(lists: _Lists, names: list[str] | None) -> np.ndarray:
    classes = int(lists.lengths[0]) if names is None else len(names)
    other, remedy = np.flatnonzero(lists.lengths != classes), None if lists.number is None else OF_ROWS
    if len(other):
        what, row = "0/1 vector has another length than there are classes", int(other[0])
        got = int(lists.lengths[row])
        raise DataError(what, where=lists.place(row), got=got, allowed=str(classes), remedy=remedy)
    values = lists.numbers().reshape(-1, classes)  # (rows, classes)
    wrong = np.argwhere(~np.isin(values, (0, 1, NO_LABEL)))
    if len(wrong):
        row, column = wrong[0].tolist()
        what, allowed = "0/1 vector has another entry", "0, 1, or -1 for what is not known"
        entry = float(values[row, column])
        raise DataError(what, where=lists.place(row), got=entry, allowed=allowed, remedy=remedy)
    return values.astype(np.int8)


def _of_indices(lists: _Lists, names: list[str]) -> np.ndarray:
    values = lists.numbers().astype(np.int64)  # (entries,)
    wrong = np.flatnonzero((values < 0) | (values >= len(names)))
    if len(wrong):
        row, got = int(lists.rows[wrong[0]]), lists.flat[int(wrong[0])].as_py()
        raise DataError("label is no class", where=lists.place(row), got=got, allowed=f"0 to {len(names) - 1}")
    found = lists.marked(values, len(names))
    twice = np.flatnonzero(found.sum(axis=1, dtype=np.int64) != lists.lengths)
    if len(twice):  # it may have been meant as a vector
        row = int(twice[0])
        what, remedy = "list of classes has one of them twice", "A 0/1 vector has an entry for every class."
        raise DataError(what, where=lists.place(row), got=values[lists.rows == row].tolist(), remedy=remedy)
    return found


def _of_names(lists: _Lists, order: list[str] | None) -> tuple[np.ndarray, list[str]]:
    texts: list[Any] = lists.flat.to_pylist()
    for entry, text in enumerate(texts):
        if text is None or not text.strip():
            raise DataError("label without name", where=lists.place(int(lists.rows[entry])), got=text)
    if order is None:
        order = sorted(set(texts))
        places = {name: index for index, name in enumerate(order)}
    else:
        of_key = {name_key(name): index for index, name in enumerate(order)}
        places = {text: of_key.get(name_key(text), NO_LABEL) for text in set(texts)}
    found = np.array([places[text] for text in texts], dtype=np.int64)  # (entries,)
    lacking = np.flatnonzero(found == NO_LABEL)
    if len(lacking):
        entry, remedy = int(lacking[0]), "Name all labels, or pass a mapping from them to other words."
        what, where = "class_names lack a label of the data", lists.place(int(lists.rows[entry]))
        raise DataError(what, where=where, got=texts[entry], remedy=remedy)
    return lists.marked(found, len(order)), order


def replace_lists(
    dataset: datasets.Dataset, column: str, labels: np.ndarray, class_names: list[str]
) -> datasets.Dataset:
    """Puts what `class_lists` reads as these labels in the place of a column; images are not copied.

    Args:
        dataset: any dataset; it may show some rows of its table, in its own order.
        column: of the labels.
        labels: `(rows, classes)`.
        class_names: one per class; vectors, for where something is not known, do not keep them.
    """
    everywhere = np.zeros((len(dataset._data), len(class_names)), np.int8)
    everywhere[shown_rows(dataset)] = labels
    if (labels == NO_LABEL).any():
        return replace_column(dataset, column, everywhere.tolist(), List(Value("int8"), length=len(class_names)))
    lists = [np.flatnonzero(row).tolist() for row in everywhere]
    return replace_column(dataset, column, lists, List(ClassLabel(names=class_names)))
