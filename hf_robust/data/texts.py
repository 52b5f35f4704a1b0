# SPDX-License-Identifier: Apache-2.0
"""The texts of rows: one string, or a list of them."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import LargeList, List

from ..errors import DataError
from .labels import is_text

REMEDY = "Remove such rows: dataset.filter(...)."


def check_texts(dataset: datasets.Dataset, column: str, where: str) -> None:
    """Refuses a column of texts that lacks some.

    Args:
        dataset: any dataset.
        column: of strings, or of lists of strings.
        where: the dataset's name, for the message.

    Raises:
        DataError: the column holds something else; or a row has no text, an empty one or an empty list.
    """
    feature = dataset.features[column]
    if not is_text(feature.feature if isinstance(feature, List | LargeList) else feature):
        allowed = "strings, or lists of strings"
        raise DataError("texts are no strings", where=f"{where}, {column}", got=str(feature), allowed=allowed)
    texts = _column(dataset, column)
    missing = pc.fill_null(_is_blank(texts) if is_text(feature) else pc.equal(pc.list_value_length(texts), 0), True)
    bad = np.flatnonzero(missing.to_numpy(zero_copy_only=False))  # rows
    if not is_text(feature) and len(bad) == 0:
        blank = pc.fill_null(_is_blank(pc.list_flatten(texts)), True).to_numpy(zero_copy_only=False)
        bad = pc.list_parent_indices(texts).to_numpy()[blank]
    if len(bad):
        row = int(bad[0])
        raise DataError("row without text", where=f"{where}, row {row}", got=texts[row].as_py(), remedy=REMEDY)


def read_texts(dataset: datasets.Dataset, column: str, rows: np.ndarray) -> list[list[str]]:
    """Returns the texts of some rows; no image is opened.

    Args:
        dataset: any dataset.
        column: of texts that `check_texts` has looked at.
        rows: which, in order.

    Example:
        >>> read_texts(photos, "caption", np.array([3, 0]))
        [['two dogs', 'dogs at play'], ['a cat']]
    """
    found = _column(dataset, column).take(pa.array(rows)).to_pylist()
    return [[text] for text in found] if is_text(dataset.features[column]) else found


def row_texts(value: Any, where: str) -> list[str]:
    """Returns the texts of a row.

    Args:
        value: what the row has.
        where: dataset and row, for messages.

    Raises:
        DataError: there is no text, or an empty one.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts:
        allowed = "a string, or a list of strings"
        raise DataError("row without text", where=where, got=value, allowed=allowed, remedy=REMEDY)
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise DataError("row without text", where=where, got=text, allowed="strings", remedy=REMEDY)
    return list(texts)


def _column(dataset: datasets.Dataset, column: str) -> pa.Array:
    found = dataset.select_columns(column).with_format("arrow")[:][column]  # (rows,)
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found


def _is_blank(texts: pa.Array) -> pa.Array:
    return pc.equal(pc.utf8_trim_whitespace(texts), "")
