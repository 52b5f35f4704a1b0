# SPDX-License-Identifier: Apache-2.0
"""Which column of a dataset is meant."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from ..errors import DataError

Target = Literal["label", "text", "labels", "identity"]  # what a row has beside its image, under this name
Kind = Literal["image", "label", "text", "labels", "identity"]  # of columns

IMAGE, LABEL, TEXT, LABELS, IDENTITY = "image", "label", "text", "labels", "identity"
# columns of cached embeddings, see `hf_robust.data.embeds_cache`: beside the images, and in their place
REFERENCE_EMBEDS, IMAGE_EMBEDS = "reference_embeds", "image_embeds"
ROW = "hf_robust_row"  # the column by which a row with texts knows its place in the set
SPELLINGS = {
    IMAGE: ("image", "img", "jpg", "jpeg", "png", "webp"),
    LABEL: ("label", "labels", "cls"),
    TEXT: ("text", "texts", "caption", "captions", "txt"),
    LABELS: ("label", "labels", "cls"),
    IDENTITY: ("identity", "identities"),
}
KINDS: dict[Target, Kind] = {"label": "label", "text": "text", "labels": "labels", "identity": "identity"}


def find_column(kind: Kind, columns: Iterable[str], where: str, named: str | None = None) -> str | None:
    """Returns the name of the column of images, of labels, of texts or of identities.

    Args:
        kind: what is looked for.
        columns: the dataset's columns.
        where: the dataset's name, for the message.
        named: the column that the user names; it is used, or there is an error.

    Returns:
        The column; None if no column has one of the usual spellings.

    Raises:
        DataError: the named column is not there, or several columns have a usual spelling.

    Example:
        >>> find_column("image", ["img", "fine_label", "coarse_label"], "train_dataset")
        'img'
    """
    columns, setting = sorted(columns), _setting(kind)
    if named is not None:
        if named not in columns:
            remedy = f"Set {setting} to one of them."
            raise DataError(f"no column {named!r}", where=where, allowed=", ".join(columns), remedy=remedy)
        return named
    found = [column for column in columns if column in SPELLINGS[kind]]
    if len(found) > 1:
        remedy = f"Set {setting}, or use dataset.remove_columns(...)."
        raise DataError(f"several columns could be the {kind}", where=where, got=found, remedy=remedy)
    return found[0] if found else None


def find_target(columns: Iterable[str], where: str) -> tuple[Target, str] | None:
    """Returns what rows have beside their images, by the columns, and the name of its column.

    Args:
        columns: the dataset's columns.
        where: the dataset's name, for the message.

    Returns:
        What it is, `labels` called `label`, and the column; None if no column has one of the usual spellings.

    Raises:
        DataError: there are columns of several kinds, say of texts and of labels; or several of one.

    Example:
        >>> find_target(["image", "caption"], "train_dataset")
        ('text', 'caption')
    """
    columns = list(columns)
    targets: tuple[Target, ...] = ("label", "text", "identity")
    pairs = [(target, find_column(KINDS[target], columns, where)) for target in targets]
    found = [(target, column) for target, column in pairs if column is not None]
    if len(found) > 1:
        what = " and ".join(f"{target} ({column!r})" for target, column in found)
        remedy = f"Name the task, or remove one: dataset.remove_columns({found[-1][1]!r})."
        raise DataError(f"rows have {what}: which is to be learned?", where=where, got=sorted(columns), remedy=remedy)
    return found[0] if found else None


def no_column(kind: Kind, columns: Iterable[str], where: str) -> DataError:
    """Returns the error for a dataset in which `find_column` found nothing.

    Args:
        kind: what was looked for.
        columns: the dataset's columns.
        where: the dataset's name.
    """
    columns = sorted(columns)
    remedy = f"Use dataset.rename_column(..., {kind!r}), or set {_setting(kind)} in a script or suite."
    if kind == IMAGE and "pixel_values" in columns:
        remedy = "Transforms must return images, in the column they come in; the collator makes pixel values of them."
    return DataError(f"no column {kind!r}", where=where, got=columns, remedy=remedy)


def _setting(kind: Kind) -> str:
    return "image_column" if kind == IMAGE else "label_column"
