# SPDX-License-Identifier: Apache-2.0
"""From the source of a set to its images."""

from __future__ import annotations

from glob import glob
from pathlib import Path

from datasets import Dataset, Image, load_dataset
from datasets.exceptions import DatasetNotFoundError

from ..errors import DataError


def load_source(source: str, split: str = "test") -> Dataset:
    """Loads a dataset from the Hub, parquet files or a folder of images.

    Args:
        source: as in `SuiteSet`.
        split: of a dataset of the Hub that is named without one.

    Raises:
        DataError: there is no such thing, or it has no rows.

    Example:
        >>> load_source("photos/test").column_names
        ['image', 'label']
    """
    files = sorted(glob(source + "/**/*.parquet" if Path(source).is_dir() else source, recursive=True))
    name, _, own_split = source.partition(":")
    try:
        if files:
            return load_dataset("parquet", data_files=files, split="train")
        if Path(source).is_dir():
            return load_dataset("imagefolder", data_files=source + "/**", drop_labels=False, split="train")
        return load_dataset(name, split=own_split or split)
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        raise DataError("no such file, folder of images or dataset of the Hub", got=source) from error
    except ValueError as error:  # how datasets says that there are no rows, or no such split
        raise DataError("dataset is empty or has no such split", where=source, got=str(error)) from error


def images_of(dataset: Dataset, column: str, where: str) -> Dataset:
    """Returns a dataset with the images alone, as `image`, not yet decoded where they are files.

    Args:
        dataset: any dataset.
        column: the name of its column of images.
        where: the set's name, for the message.

    Raises:
        DataError: it has no such column, or no rows.
    """
    check_column(dataset, column, "image_column", where)
    images = dataset.with_format(None).select_columns(column)
    images = images if column == "image" else images.rename_column(column, "image")
    feature = images.features["image"]
    return images.cast_column("image", Image(decode=False)) if isinstance(feature, Image) else images


def check_column(dataset: Dataset, column: str, setting: str, where: str) -> None:
    """Refuses a dataset without rows, or without a column.

    Args:
        dataset: any dataset.
        column: the column.
        setting: what names it, for the message.
        where: the set's name, likewise.
    """
    if len(dataset) == 0:
        raise DataError("dataset is empty", where=where, got=0, allowed="at least one image")
    if column not in dataset.column_names:
        allowed = ", ".join(dataset.column_names)
        raise DataError(f"no column {column!r}", where=where, allowed=allowed, remedy=f"Set {setting}.")
