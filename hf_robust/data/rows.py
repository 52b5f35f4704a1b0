# SPDX-License-Identifier: Apache-2.0
"""What every entrance makes of the dataset that a user gives: numbered rows of unopened images with labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Image
from PIL.Image import Image as PILImage

from ..errors import DataError
from .columns import IMAGE, IMAGE_EMBEDS, LABEL, find_column, no_column
from .draws import DRAW, Draws, with_draws
from .images import UnopenedImage
from .labels import NO_LABEL, check_labels, class_indices, replace_labels

Transform = Callable[[dict[str, list[Any]]], Mapping[str, Any]]


@dataclass(frozen=True)
class Columns:
    """How a row of the user's becomes one of `image` and `label`.

    Args:
        dataset: its name, for messages.
        image: the column of images; None where there are embeddings in their place.
        label: the column of labels; None where there are none.
        transform: what the user gave `set_transform`.
    """

    dataset: str
    image: str | None
    label: str | None
    transform: Transform | None = None

    def read(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """Returns a row with `image`, unopened, and `label`, beside its other columns.

        Args:
            row: values by column.
            number: of the row.

        Raises:
            DataError: there is no image.
        """
        where = f"{self.dataset}, row {number}"
        found = {name: value for name, value in row.items() if name not in (self.image, self.label)}
        if self.image is not None:
            if row[self.image] is None:
                raise DataError("row without image", where=where)
            opened = None if self.transform is None else partial(self._transformed, row, where)
            found[IMAGE] = UnopenedImage(row[self.image], where, opened)
        if self.label is not None:
            found[LABEL] = row[self.label]
        return found

    def _transformed(self, row: Mapping[str, Any], where: str, image: PILImage) -> Any:
        """The user's transform takes batches, of one row here, with the column names that it knows."""
        if self.transform is None or self.image is None:
            return image
        result = self.transform({**{name: [value] for name, value in row.items()}, self.image: [image]})
        if self.image not in result:
            raise no_column("image", result, where)
        if self.label is not None and self.label in result and result[self.label][0] != row[self.label]:
            remedy = "Use dataset.map(...), which changes the labels for everyone."
            raise DataError("transform changes a label", where=where, got=result[self.label][0], remedy=remedy)
        return result[self.image][0]


@dataclass(frozen=True, eq=False)
class LabelledImages(torch.utils.data.Dataset):
    """Rows of images with labels. An image is opened by the collator; see `labelled_images`.

    Args:
        rows: the user's dataset, without formatting and with images not decoded.
        name: the dataset's, for messages.
        columns: which of its columns count; None where that shows only when a row is read.
        numbers: `(rows,)`, which of its rows are shown, in order.
        labels: `(all rows,)`, class indices; None where they are known only when a row is read.
        class_names: the data's own, in label order; None where there are none.
        skipped: what is wrong with the rows that were left out; None before `readable_rows` has looked for some.
        draws: what rows draw while they are read, and bring for the collator; None for the global generators.
    """

    rows: Any
    name: str
    columns: Columns | None
    numbers: np.ndarray
    labels: np.ndarray | None
    class_names: list[str] | None
    skipped: list[str] | None = None
    draws: Draws | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        found = self._labelled(indices)
        if self.draws is None:
            return found
        # by the place among these rows: one of the dataset's that is shown twice draws twice
        return [{**row, DRAW: partial(self.draws.of, index)} for row, index in zip(found, indices, strict=True)]

    def _labelled(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        numbers = self.numbers[indices].tolist()
        many = isinstance(self.rows, datasets.Dataset)  # reads the rows of a batch at once
        rows = self.rows.__getitems__(numbers) if many else list(map(self._row, indices, numbers))
        found = [_read(row, number, self.name, self.columns) for row, number in zip(rows, numbers, strict=True)]
        if self.labels is None:
            return found
        labels = self.labels[numbers].tolist()
        if self.columns is None:  # a torch dataset has labels in its rows, too
            _check_same_labels([row.get(LABEL) for row in found], labels, self.name)
        return [{**row, LABEL: label} for row, label in zip(found, labels, strict=True)]

    def _row(self, index: int, number: int) -> Any:
        try:
            with nullcontext() if self.draws is None else self.draws.of(index, "row"):
                return self.rows[number]
        except OSError as error:  # what Pillow raises where a torch dataset opens its images itself
            raise DataError(f"row cannot be read ({error})", where=f"{self.name}, row {number}") from error

    @property
    def shown_labels(self) -> np.ndarray | None:
        """`(rows,)`, class indices; None where they are known only when a row is read."""
        return None if self.labels is None else self.labels[self.numbers]

    def select(self, indices: Sequence[int] | np.ndarray) -> LabelledImages:
        """Returns some of the rows; they keep their numbers in messages.

        Args:
            indices: which of these rows, in order.
        """
        return replace(self, numbers=self.numbers[np.asarray(indices, dtype=np.int64)])

    def to_dataset(self) -> datasets.Dataset:
        """Returns the rows as a `datasets.Dataset` with the columns `image`, not decoded, and `label`.

        Raises:
            DataError: they come from a dataset of another kind, or with a transform.
        """
        if not isinstance(self.rows, datasets.Dataset) or self.columns is None or self.columns.transform is not None:
            got = "a transform" if isinstance(self.rows, datasets.Dataset) else type(self.rows).__name__
            raise DataError("not a datasets.Dataset without transform", where=self.name, got=got)
        shows_all = np.array_equal(self.numbers, np.arange(len(self.rows)))
        table = self.rows if shows_all else self.rows.select(self.numbers)
        if self.labels is not None and self.class_names is not None:
            table = replace_labels(table, str(self.columns.label), self.labels[self.numbers], self.class_names)
        for ours, theirs in ((IMAGE, self.columns.image), (LABEL, self.columns.label)):
            if theirs in table.column_names and theirs != ours:
                table = table.remove_columns([ours] if ours in table.column_names else []).rename_column(theirs, ours)
        return table


@dataclass(frozen=True, eq=False)
class LabelledStream(torch.utils.data.IterableDataset):
    """Rows of images with labels, of a dataset without length.

    Args:
        rows: the user's dataset, without formatting and with images not decoded.
        name: the dataset's, for messages.
        columns: which of its columns count; None where that shows only when a row is read.
        class_names: the data's own, in label order; None where there are none.
        draws: as of `LabelledImages`.
    """

    rows: Any
    name: str
    columns: Columns | None
    class_names: list[str] | None
    skipped: None = None
    draws: Draws | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.draws is None:
            for number, row in enumerate(self.rows):
                yield _read(row, number, self.name, self.columns)
            return
        for number, (row, of_row) in enumerate(with_draws(self.rows, self.draws)):
            yield {**_read(row, number, self.name, self.columns), DRAW: of_row}

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
) -> LabelledImages | LabelledStream:
    """Reads which columns of a dataset hold images and labels, and the labels; no image is opened.

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset` with columns of images and labels (class indices, or text),
            also with a `set_transform` that returns images; or a torch dataset whose rows are mappings of `image` and
            `label`, or pairs of both, with or without `.classes`, as torchvision's `ImageFolder`.
        name: the dataset's, for messages.
        image_column: the column of images; None for the one with a usual spelling.
        label_column: the column of labels, likewise. A dataset without labels can be predicted.
        order: class names whose order labels of text take; they name all of them.

    Raises:
        DataError: it is no dataset or holds several splits; a column is missing, or is one of several; it is empty; or
            a label is no class index or text.

    Example:
        >>> rows = labelled_images(load_dataset("imagefolder", data_dir="photos/train", split="train"), "train")
        >>> rows.class_names, rows[0]["label"]
        (['cat', 'dog'], 0)
    """
    if isinstance(dataset, LabelledImages | LabelledStream):
        return dataset
    if isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict):
        remedy = f"Pass one of them, for instance dataset[{next(iter(dataset), 'train')!r}]."
        raise DataError("several splits where one is needed", where=name, got=sorted(dataset), remedy=remedy)
    if isinstance(dataset, datasets.Dataset):
        return _from_table(dataset, name, image_column, label_column, order or ())
    if isinstance(dataset, datasets.IterableDataset):
        return _from_stream(dataset, name, image_column, label_column)
    if type(dataset) is torch.utils.data.Subset:
        whole = labelled_images(dataset.dataset, name, image_column, label_column, order)
        return whole.select(dataset.indices) if isinstance(whole, LabelledImages) else whole
    if type(dataset) is torch.utils.data.ConcatDataset:
        return _joined([labelled_images(part, name, image_column, label_column, order) for part in dataset.datasets])
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return LabelledStream(dataset, name, None, None)
    if isinstance(dataset, str) or not isinstance(dataset, torch.utils.data.Dataset | Sequence):
        allowed = "a datasets.Dataset, or a torch dataset of images with labels"
        remedy = "load_dataset('imagefolder', data_dir=..., split='train') makes one of a folder."
        raise DataError("no dataset", where=name, got=type(dataset).__name__, allowed=allowed, remedy=remedy)
    return _from_torch(dataset, name)


def _from_table(
    dataset: datasets.Dataset, name: str, image_column: str | None, label_column: str | None, order: Sequence[str]
) -> LabelledImages:
    transform = dataset.format["format_kwargs"]["transform"] if dataset.format["type"] == "custom" else None
    columns = _columns(dataset.column_names, name, image_column, label_column, transform)
    labels, names = (None, None) if columns.label is None else class_indices(dataset, columns.label, name, order)
    rows = _undecoded(dataset, columns)
    if labels is not None and len(labels) and (labels == NO_LABEL).all():  # how test sets of the Hub hide them
        rows, columns, labels = rows.remove_columns(str(columns.label)), replace(columns, label=None), None
    return _checked(LabelledImages(rows, name, columns, np.arange(len(rows)), labels, names))


def _from_stream(
    dataset: datasets.IterableDataset, name: str, image_column: str | None, label_column: str | None
) -> LabelledStream:
    if dataset.features is None:  # of a generator, say
        return LabelledStream(dataset, name, None, None)
    columns = _columns(dataset.features, name, image_column, label_column)
    label = None if columns.label is None else dataset.features[columns.label]
    names = list(label.names) if isinstance(label, ClassLabel) else None
    return LabelledStream(_undecoded(dataset, columns), name, columns, names)


def _check_same_labels(of_rows: list[Any], labels: list[int], name: str) -> None:
    for found, label in zip(of_rows, labels, strict=True):
        if found is not None and found != label:
            what, remedy = "labels of rows are not those of `targets`", "Leave `targets` out, or make them the same."
            raise DataError(what, where=name, got=(found, label), remedy=remedy)


def _joined(parts: Sequence[Any]) -> LabelledImages:
    """Sets one after the other; the same label must mean the same class in all of them."""
    names = [part.class_names for part in parts]
    other = next((one for one in names if one != names[0]), names[0])
    if other != names[0]:
        remedy = "Give all of them the same class names in the same order."
        raise DataError("joined datasets have other classes", where=parts[0].name, got=other, remedy=remedy)
    labels = [part.shown_labels for part in parts]
    known = None if any(one is None for one in labels) else np.concatenate(labels)
    rows: Any = torch.utils.data.ConcatDataset(parts)
    return _checked(LabelledImages(rows, parts[0].name, None, np.arange(len(rows)), known, names[0]))


def _from_torch(dataset: Any, name: str) -> LabelledImages:
    labels, class_names = _torch_labels(dataset)
    return _checked(LabelledImages(dataset, name, None, np.arange(len(dataset)), labels, class_names))


def _checked(rows: LabelledImages) -> LabelledImages:
    if len(rows) == 0:
        raise DataError("dataset is empty", where=rows.name, got=0, allowed="at least one image")
    if rows.labels is not None and rows.class_names is not None:
        check_labels(rows.labels, len(rows.class_names), rows.name)
    return rows


def _columns(
    names: Iterable[str],
    where: str,
    image_column: str | None = None,
    label_column: str | None = None,
    transform: Transform | None = None,
) -> Columns:
    names = list(names)
    image = find_column("image", names, where, image_column)
    if image is None and IMAGE_EMBEDS not in names:
        raise no_column("image", names, where)
    return Columns(where, image, find_column("label", names, where, label_column), transform)


def _read(row: Any, number: int, name: str, columns: Columns | None) -> dict[str, Any]:
    if isinstance(row, tuple | list) and len(row) == 2:
        row = dict(zip((IMAGE, LABEL), row, strict=True))
    if not isinstance(row, Mapping):
        allowed = "a mapping with 'image' and 'label', or a pair of both"
        raise DataError("row is of an unknown type", where=name, got=type(row).__name__, allowed=allowed)
    return (columns or _columns(row, name)).read(row, number)


def _undecoded(dataset: Any, columns: Columns) -> Any:
    plain = dataset.with_format(None)
    if columns.image is not None and isinstance(dataset.features[columns.image], Image):
        return plain.cast_column(columns.image, Image(decode=False))
    return plain


def _torch_labels(dataset: Any) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels and class names as torchvision's datasets hold them."""
    if getattr(dataset, "target_transform", None) is not None:  # then its names are those of other labels, too
        return None, None
    names, targets = getattr(dataset, "classes", None), getattr(dataset, "targets", None)
    return None if targets is None else np.asarray(targets), None if names is None else list(names)
