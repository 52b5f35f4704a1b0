# SPDX-License-Identifier: Apache-2.0
"""From the source of a set to its rows and their images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path

import datasets
import pyarrow.parquet
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    get_dataset_split_names,
    load_dataset,
    load_from_disk,
)
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..errors import DataError
from .files import IMAGES, PARQUET, exists, files_of, kind_of, reading, split_off
from .image_folders import load_image_folder
from .splits import choose_split, file_splits, image_splits, split_name
from .tables import check_same_columns, load_tables
from .text_files import check_regular, read_json

NOTHING = "no such file, folder of images or dataset of the Hub"


def load_source(
    source: str | Dataset | IterableDataset | DatasetDict | IterableDatasetDict, where: str = "source"
) -> Dataset | IterableDataset:
    """Loads one split of a dataset, its images not yet decoded.

    Text is `PATH` or `PATH:split`: a folder with one subfolder of images per class, with or without folders of splits
    above these; parquet, CSV, TSV or JSON lines, as a file, a pattern or a folder; a folder of `save_to_disk`; or a
    dataset of the Hub, `owner/name` or `owner/name:split`. A source of one split needs no `:split`. `val`, `valid`,
    `dev` and `validation` are the same split, so are `train` and `training`, `test` and `testing`.

    Args:
        source: where the rows are, or a dataset.
        where: the setting or the set's name, for the messages.

    Raises:
        DataError: there is no such thing, it holds several splits and none is chosen, or it cannot be read.
        UnsafeFileError: a file is no regular one.

    Example:
        >>> load_source("photos:test").column_names  # photos/{train,test}/<class>/*.jpg
        ['image', 'label']
    """
    if isinstance(source, DatasetDict | IterableDatasetDict):
        got, allowed = type(source).__name__, ", ".join(source)
        remedy = f"Pass one of them, as in dataset[{next(iter(source), 'train')!r}]."
        raise DataError("dataset with splits", where=where, got=got, allowed=allowed, remedy=remedy)
    if isinstance(source, str):
        with _silent_datasets():
            dataset = _load(source, where)
            if len(dataset) == 0:
                raise DataError("dataset is empty", where=where, got=source, allowed="at least one row")
            return _undecoded(dataset)
    if not isinstance(source, Dataset | IterableDataset):
        allowed = "text, a datasets.Dataset or a datasets.IterableDataset"
        raise DataError("no source of data", where=where, got=type(source).__name__, allowed=allowed)
    return _undecoded(source)


def split_names(source: str, where: str = "source") -> list[str]:
    """Returns what the splits of a source are called, as it spells them; nothing for one set without splits.

    Args:
        source: a `PATH` or id as of `load_source`, without `:split`.
        where: the setting, for the messages.

    Raises:
        DataError: there is no such thing, or it cannot be read.

    Example:
        >>> split_names("photos")  # photos/{train,test}/<class>/*.jpg
        ['test', 'train']
    """
    with _silent_datasets(), reading(source, where):
        if not exists(source):
            return _hub_splits(source, source, where)
        saved = _saved_splits(source)
        return saved if saved is not None else [split_name(place) for place in _places(source, where)[2]]


def _load(source: str, where: str) -> Dataset:
    name, split = split_off(source)
    if not exists(name):
        return _load_from_hub(name, split, source, where)
    with reading(source, where):
        splits = _saved_splits(name)
        if splits is not None:
            return load_from_disk(os.path.join(name, choose_split(splits, split, name, where) or ""))
        return _load_files(name, split, where)


def _places(name: str, where: str) -> tuple[str, str, dict[str, list[str]], list[str]]:
    """The folder, what kind of files there are, these by the place of their split, and all of them."""
    folder, files = files_of(name)
    kind, files = kind_of(files, name, where)
    splits = image_splits(files) if kind == IMAGES else file_splits(files)
    if "" in splits:
        remedy = "Move it into one of them."
        raise DataError("file lies beside the folders of splits", where=where, got=splits[""][0], remedy=remedy)
    return folder, kind, splits, files


def _load_files(name: str, split: str | None, where: str) -> Dataset:
    folder, kind, splits, files = _places(name, where)
    place = choose_split([*splits], split, name, where)
    files = files if place is None else splits[place]
    if kind == IMAGES:
        if not os.path.isdir(name):
            raise DataError("images are not in a folder", where=where, got=name, remedy="Name their folder.")
        return load_image_folder(folder, place, files, where)
    paths = [os.path.join(folder, file) for file in files]
    return _load_parquet(paths, where) if kind == PARQUET else load_tables(paths, where)


def _load_parquet(files: Sequence[str], where: str) -> Dataset:
    expected, rows = None, 0
    for file in files:
        check_regular(file)
        with reading(file, where), pyarrow.parquet.ParquetFile(file) as content:
            found, rows = Features.from_arrow_schema(content.schema_arrow), rows + content.metadata.num_rows
        expected = expected or found
        check_same_columns(files[0], [*expected], file, [*found])
        for name in found:
            if found[name] != expected[name]:  # datasets casts, and would keep the first names
                what = f"files have different types or class names in {name!r}"
                allowed = str(expected[name])
                raise DataError(what, where=f"{files[0]}, {file}", got=found[name], allowed=allowed)
    if rows == 0:  # datasets would have no split
        return Dataset(found.arrow_schema.empty_table())
    return load_dataset("parquet", data_files=[escape(os.path.abspath(file)) for file in files], split="train")


def _saved_splits(folder: str) -> list[str] | None:
    """The splits of a folder of `save_to_disk`, none for a single dataset; None for other folders."""
    if os.path.isfile(os.path.join(folder, "dataset_dict.json")):
        return read_json(Path(folder, "dataset_dict.json"))["splits"]
    return [] if os.path.isfile(os.path.join(folder, "state.json")) else None


def _load_from_hub(name: str, split: str | None, source: str, where: str) -> Dataset:
    with reading(source, where):
        if split is None or "[" not in split:  # datasets reads its own slices
            splits = _hub_splits(name, source, where)
            split = split if split in splits else choose_split(splits, split, name, where)
        with _named(source, where):
            return load_dataset(name, split=split)


def _hub_splits(name: str, source: str, where: str) -> list[str]:
    if "://" in source:
        remedy = "Download it, and name the file."
        raise DataError("source is not on this machine", where=where, got=source, remedy=remedy)
    with _named(source, where):
        validate_repo_id(name)
        return get_dataset_split_names(name)


@contextmanager
def _named(source: str, where: str) -> Iterator[None]:
    try:
        yield
    except (HFValidationError, ConnectionError, FileNotFoundError) as error:  # DatasetNotFoundError is of these
        raise DataError(NOTHING, where=where, got=source) from error


@contextmanager
def _silent_datasets() -> Iterator[None]:
    """Keeps datasets from writing on the screen, and leaves its settings as they were."""
    level = datasets.logging.get_verbosity()
    bars = datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is None and not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _undecoded(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        return dataset  # a transform of the user's expects pictures
    for column, feature in (dataset.features or {}).items():
        if isinstance(feature, Image) and feature.decode:
            dataset = dataset.cast_column(column, Image(decode=False))
    return dataset
