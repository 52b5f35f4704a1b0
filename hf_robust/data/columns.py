# SPDX-License-Identifier: Apache-2.0
"""Which column of a dataset is meant."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from ..errors import DataError

IMAGE, LABEL = "image", "label"
# columns of cached embeddings, see `hf_robust.data.embeds_cache`: beside the images, and in their place
REFERENCE_EMBEDS, IMAGE_EMBEDS = "reference_embeds", "image_embeds"
SPELLINGS = {IMAGE: ("image", "img", "jpg", "jpeg", "png", "webp"), LABEL: ("label", "labels", "cls")}


def find_column(
    kind: Literal["image", "label"], columns: Iterable[str], where: str, named: str | None = None
) -> str | None:
    """Returns the name of the column of images or of labels.

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
    columns, setting = sorted(columns), f"{kind}_column"
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


def no_column(kind: Literal["image", "label"], columns: Iterable[str], where: str) -> DataError:
    """Returns the error for a dataset in which `find_column` found nothing.

    Args:
        kind: what was looked for.
        columns: the dataset's columns.
        where: the dataset's name.
    """
    columns = sorted(columns)
    remedy = f"Use dataset.rename_column(..., {kind!r}), or set {kind}_column in a script or suite."
    if kind == IMAGE and "pixel_values" in columns:
        remedy = "Transforms must return images, in the column they come in; the collator makes pixel values of them."
    return DataError(f"no column {kind!r}", where=where, got=columns, remedy=remedy)
