# SPDX-License-Identifier: Apache-2.0
"""What every entrance makes of the dataset that a user gives: numbered rows of unopened images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Image

from ..errors import DataError
from .columns import IDENTITY, IMAGE, LABELS, ROW, TEXT, Target
from .draws import DRAW, Draws, with_draws
from .label_lists import is_list, is_of_indices, replace_lists, row_labels
from .labels import NO_LABEL, check_labels, replace_labels
from .reading import Columns, find_image, read_row, table_columns, table_labels, transform_of
from .texts import read_texts
from .torch_labels import check_same_labels, joined_identities, stated_labels, torch_labels


@dataclass(frozen=True, eq=False)
class LabelledImages(torch.utils.data.Dataset):
    """Rows of images and what is beside them. An image is opened by the collator; see `labelled_images`.

    Args:
        rows: the user's dataset, without formatting and with images not decoded.
        name: the dataset's, for messages.
        columns: which of its columns count; None where that shows only when a row is read.
        numbers: `(rows,)`, which of its rows are shown, in order.
        labels: `(all rows,)`, indices of classes or identities, or `(all rows, classes)`, 1, 0 or -1 (not known), for
            several labels; None where there are texts, and where they are known only when a row is read.
        class_names: the data's own, in label order, or the identities as text; None where there are none.
        skipped: what is wrong with the rows that were left out; None before `readable_rows` has looked for some.
        draws: what rows draw while they are read, and bring for the collator; None for the global generators.
        target: what rows have beside their images, under this name; None if it was not named and there is nothing.
    """

    rows: Any
    name: str
    columns: Columns | None
    numbers: np.ndarray
    labels: np.ndarray | None
    class_names: list[str] | None
    skipped: list[str] | None = None
    draws: Draws | None = None
    target: Target | None = "label"

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        found = self._labelled(indices)
        if self.target == TEXT:
            found = [{**row, ROW: int(index)} for row, index in zip(found, indices, strict=True)]
        if self.draws is None:
            return found
        # by the place among these rows: one of the dataset's that is shown twice draws twice
        return [{**row, DRAW: partial(self.draws.of, index)} for row, index in zip(found, indices, strict=True)]

    def _labelled(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        numbers = self.numbers[indices].tolist()
        many = isinstance(self.rows, datasets.Dataset)  # reads the rows of a batch at once
        rows = self.rows.__getitems__(numbers) if many else list(map(self._row, indices, numbers))
        target, of_rows = self.target or "label", zip(rows, numbers, strict=True)
        found = [read_row(row, number, self.name, self.columns, target) for row, number in of_rows]
        if self.labels is None:
            return [_with_labels(row, number, self) for row, number in zip(found, numbers, strict=True)]
        labels = self.labels[numbers].tolist()
        if self.columns is None:  # a torch dataset has labels in its rows, too
            check_same_labels(found, stated_labels(self.rows, numbers, labels, target), target, self.name)
        return [{**row, target: label} for row, label in zip(found, labels, strict=True)]

    def _row(self, index: int, number: int) -> Any:
        try:
            with nullcontext() if self.draws is None else self.draws.of(index, "row"):
                return self.rows[number]
        except OSError as error:  # what Pillow raises where a torch dataset opens its images itself
            raise DataError(f"row cannot be read ({error})", where=f"{self.name}, row {number}") from error

    @property
    def shown_labels(self) -> np.ndarray | None:
        """Those of `labels` of the rows that are shown."""
        return None if self.labels is None else self.labels[self.numbers]

    @property
    def texts(self) -> list[list[str]] | None:
        """Those of every row that is shown, read without any image; None where only a row that is read shows them."""
        if self.target != TEXT:
            return None
        if isinstance(self.rows, datasets.Dataset) and self.columns is not None and self.columns.label is not None:
            return read_texts(self.rows, self.columns.label, self.numbers)
        parts: list[Any] = self.rows.datasets if isinstance(self.rows, torch.utils.data.ConcatDataset) else [None]
        of_parts = [part.texts if isinstance(part, LabelledImages) else None for part in parts]
        if any(texts is None for texts in of_parts):
            return None
        of_all = [row for texts in of_parts for row in texts or ()]
        return [of_all[number] for number in self.numbers]

    @property
    def has_several_texts(self) -> bool:
        """Whether a row may have more texts than one, to draw from; False where that shows only when it is read."""
        texts = None if self.columns is None or self.target != TEXT else self.columns.label
        return texts is not None and isinstance(self.rows, datasets.Dataset) and is_list(self.rows.features[texts])

    def select(self, indices: Sequence[int] | np.ndarray) -> LabelledImages:
        """Returns some of the rows; they keep their numbers in messages.

        Args:
            indices: which of these rows, in order.
        """
        return replace(self, numbers=self.numbers[np.asarray(indices, dtype=np.int64)])

    def to_dataset(self) -> datasets.Dataset:
        """Returns the rows as a `datasets.Dataset` with the columns `image`, not decoded, and that of the target.

        Raises:
            DataError: they come from a dataset of another kind, or with a transform.
        """
        if not isinstance(self.rows, datasets.Dataset) or self.columns is None or self.columns.transform is not None:
            got = "a transform" if isinstance(self.rows, datasets.Dataset) else type(self.rows).__name__
            raise DataError("not a datasets.Dataset without transform", where=self.name, got=got)
        shows_all = np.array_equal(self.numbers, np.arange(len(self.rows)))
        table = self.rows if shows_all else self.rows.select(self.numbers)
        if self.labels is not None and self.class_names is not None:
            replaced = replace_lists if self.target == LABELS else replace_labels
            table = replaced(table, str(self.columns.label), self.labels[self.numbers], self.class_names)
        for ours, theirs in ((IMAGE, self.columns.image), (str(self.columns.target), self.columns.label)):
            if theirs in table.column_names and theirs != ours:
                table = table.remove_columns([ours] if ours in table.column_names else []).rename_column(theirs, ours)
        return table


@dataclass(frozen=True, eq=False)
class LabelledStream(torch.utils.data.IterableDataset):
    """Rows of images and what is beside them, of a dataset without length.

    Args:
        rows: the user's dataset, without formatting and with images not decoded.
        name: the dataset's, for messages.
        columns: which of its columns count; None where that shows only when a row is read.
        class_names: the data's own, in label order; None where there are none.
        draws: as of `LabelledImages`.
        target: likewise.
    """

    rows: Any
    name: str
    columns: Columns | None
    class_names: list[str] | None
    skipped: None = None
    draws: Draws | None = None
    target: Target | None = "label"

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.draws is None:
            for number, row in enumerate(self.rows):
                yield self._read(row, number)
            return
        for number, (row, of_row) in enumerate(with_draws(self.rows, self.draws)):
            yield {**self._read(row, number), DRAW: of_row}

    def _read(self, row: Any, number: int) -> dict[str, Any]:
        found = read_row(row, number, self.name, self.columns, self.target or "label")
        return _with_labels(found, number, self)

    def set_epoch(self, epoch: int) -> None:
        """Passes on what the trainer says, so that rows are shuffled anew.

        Args:
            epoch: the number of the epoch.
        """
        if isinstance(self.rows, datasets.IterableDataset):
            self.rows.set_epoch(epoch)


def labelled_images(
    dataset: Any,
    name: str,
    image_column: str | None = None,
    label_column: str | None = None,
    order: Sequence[str] | None = None,
    target: Target | None = "label",
) -> LabelledImages | LabelledStream:
    """Reads which columns of a dataset hold images and what is beside them, and the labels; no image is opened.

    Beside its image a row has one of: `label`, a class index, or text; `labels`, a list of these, or a 0/1 vector, see
    `class_lists`; `text`, a string or a list of strings; `identity`, see `identity_indices`.

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset` with columns of these, also with a `set_transform` that
            returns images; or a torch dataset whose rows are mappings of `image` and the target, or pairs of both,
            with or without `.classes`, as torchvision's `ImageFolder`; its labels are integers from 0, its identities
            integers or strings of `.targets`, else integers from 0, and several labels names or 0/1 vectors.
        name: the dataset's, for messages.
        image_column: the column of images; None for the one with a usual spelling.
        label_column: the column of the target, likewise. A dataset without labels can be predicted.
        order: class names whose order labels of text take; they name all of them. For several labels also what
            integers and vectors mean, where the data do not say it.
        target: what counts of a row; columns of other targets are left alone. None: the one for which there is a
            column, or `"label"` for data whose columns show only when a row is read.

    Raises:
        DataError: it is no dataset or holds several splits; a column is missing, or is one of several; it is empty; a
            label is no class index or text; a row lacks text, labels or identity; or no target is named, and there are
            columns of several.

    Example:
        >>> rows = labelled_images(load_dataset("imagefolder", data_dir="photos/train", split="train"), "train")
        >>> rows.class_names, rows[0]["label"]
        (['cat', 'dog'], 0)
        >>> labelled_images(captioned, "train", target=None).texts[0]
        ['two dogs', 'dogs at play']
    """
    if isinstance(dataset, LabelledImages | LabelledStream):
        return dataset
    if isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict):
        remedy = f"Pass one of them, for instance dataset[{next(iter(dataset), 'train')!r}]."
        raise DataError("several splits where one is needed", where=name, got=sorted(dataset), remedy=remedy)
    how = image_column, label_column, order, target
    if isinstance(dataset, datasets.Dataset):
        return _from_table(dataset, name, *how)
    if isinstance(dataset, datasets.IterableDataset):
        return _from_stream(dataset, name, *how)
    if type(dataset) is torch.utils.data.Subset:
        whole = labelled_images(dataset.dataset, name, *how)
        return whole.select(dataset.indices) if isinstance(whole, LabelledImages) else whole
    if type(dataset) is torch.utils.data.ConcatDataset:
        return _joined([labelled_images(part, name, *how) for part in dataset.datasets])
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return LabelledStream(dataset, name, None, _names_of_lists(order, target), target=target or "label")
    if isinstance(dataset, str) or not isinstance(dataset, torch.utils.data.Dataset | Sequence):
        allowed = "a datasets.Dataset, or a torch dataset of images with labels"
        remedy = "load_dataset('imagefolder', data_dir=..., split='train') makes one of a folder."
        raise DataError("no dataset", where=name, got=type(dataset).__name__, allowed=allowed, remedy=remedy)
    return _from_torch(dataset, name, order, target or "label")


def images_alone(dataset: datasets.Dataset, name: str) -> LabelledImages:
    """Reads which column of a dataset holds images, and leaves all others as they are.

    Args:
        dataset: a `datasets.Dataset`; its columns may be those of several targets, or of none.
        name: the dataset's, for messages.

    Raises:
        DataError: it is empty, or has no column of images.

    Example:
        >>> images_alone(captioned, "train").to_dataset().column_names
        ['image', 'caption', 'photographer']
    """
    columns = Columns(name, find_image(dataset.features, name), None, transform_of(dataset))
    rows = _undecoded(dataset, columns)
    return _checked(LabelledImages(rows, name, columns, np.arange(len(rows)), None, None, target=None))


def _from_table(
    dataset: datasets.Dataset,
    name: str,
    image_column: str | None,
    label_column: str | None,
    order: Sequence[str] | None,
    target: Target | None,
) -> LabelledImages:
    how = name, image_column, label_column, target, transform_of(dataset)
    columns, found = table_columns(dataset.features, *how)
    labels, names = table_labels(dataset, columns, order) if len(dataset) else (None, None)
    rows = _undecoded(dataset, columns)
    if labels is not None and found != LABELS and (labels == NO_LABEL).all():  # how test sets of the Hub hide them
        rows, columns, labels = rows.remove_columns(str(columns.label)), replace(columns, label=None), None
    return _checked(LabelledImages(rows, name, columns, np.arange(len(rows)), labels, names, target=found))


def _from_stream(
    dataset: datasets.IterableDataset,
    name: str,
    image_column: str | None,
    label_column: str | None,
    order: Sequence[str] | None,
    target: Target | None,
) -> LabelledStream:
    if dataset.features is None:  # of a generator, say
        return LabelledStream(dataset, name, None, _names_of_lists(order, target), target=target or "label")
    columns, found = table_columns(dataset.features, name, image_column, label_column, target)
    feature: Any = None if columns.label is None else dataset.features[columns.label]
    label = feature.feature if found == LABELS and is_list(feature) else feature
    names = list(label.names) if isinstance(label, ClassLabel) else _names_of_lists(order, found)
    return LabelledStream(_undecoded(dataset, columns), name, columns, names, target=found)


def _names_of_lists(order: Sequence[str] | None, target: Target | None) -> list[str] | None:
    """What several labels mean where the data do not say it."""
    return list(order) if order and target == LABELS else None


def _with_labels(row: dict[str, Any], number: int, rows: LabelledImages | LabelledStream) -> dict[str, Any]:
    if rows.target != LABELS or LABELS not in row:
        return row
    are_indices = rows.columns is not None and is_of_indices(rows.rows.features[rows.columns.label])
    return {**row, LABELS: row_labels(row[LABELS], number, rows.name, rows.class_names, are_indices)}


def _joined(parts: Sequence[Any]) -> LabelledImages:
    """Sets one after the other; the same label must mean the same class in all of them."""
    target, names = parts[0].target, [part.class_names for part in parts]
    if any(part.target != target for part in parts):
        got = [part.target for part in parts]
        raise DataError("joined datasets have other targets", where=parts[0].name, got=got, remedy="Name the task.")
    labels = [part.shown_labels for part in parts if part.shown_labels is not None]
    if target == IDENTITY and len(labels) == len(parts):
        labels, everyone = joined_identities(labels, [of_part or [] for of_part in names])
        names = [everyone]
    other = next((one for one in names if one != names[0]), names[0])
    if other != names[0]:
        remedy = "Give all of them the same class names in the same order."
        raise DataError("joined datasets have other classes", where=parts[0].name, got=other, remedy=remedy)
    known = np.concatenate(labels) if len(labels) == len(parts) else None
    rows: Any = torch.utils.data.ConcatDataset(parts)
    return _checked(LabelledImages(rows, parts[0].name, None, np.arange(len(rows)), known, names[0], target=target))


def _from_torch(dataset: Any, name: str, order: Sequence[str] | None, target: Target) -> LabelledImages:
    labels, names = torch_labels(dataset, target, name)
    if target == LABELS:
        labels, names = None, names or _names_of_lists(order, target)
    return _checked(LabelledImages(dataset, name, None, np.arange(len(dataset)), labels, names, target=target))


def _checked(rows: LabelledImages) -> LabelledImages:
    if len(rows) == 0:
        raise DataError("dataset is empty", where=rows.name, got=0, allowed="at least one image")
    if rows.labels is not None and rows.class_names is not None and rows.target != LABELS:
        check_labels(rows.labels, len(rows.class_names), rows.name)
    return rows


def _undecoded(dataset: Any, columns: Columns) -> Any:
    plain = dataset.with_format(None)
    if columns.image is not None and isinstance(dataset.features[columns.image], Image):
        return plain.cast_column(columns.image, Image(decode=False))
    return plain
