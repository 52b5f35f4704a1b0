# SPDX-License-Identifier: Apache-2.0
"""To know a dataset again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from .columns import IMAGE_EMBEDS, TEXT
from .rows import LabelledImages, LabelledStream

ROWS = 256  # read at once


def rows_digest(rows: LabelledImages | LabelledStream) -> dict[str, Any]:
    """Describes a dataset: how many rows it has, the names of its classes, and digests of its content in order.

    What is beside the images counts as far as it is known before a row is read: labels, identities, texts.
    Of images in the dataset all bytes count, of files that it names their names, with that of the folder, and sizes.
    The images of a torch dataset, which may look different every time, and the rows of a stream are not looked at.

    Args:
        rows: what `labelled_images` returned.

    Returns:
        What can be compared, of what JSON can hold; None stands for what is not known.

    Example:
        >>> rows_digest(labelled_images(photos, "photos"))["rows"]
        9
    """
    if isinstance(rows, LabelledStream):
        return {"rows": None, "class_names": rows.class_names, "labels": None, "images": None}
    labels = rows.shown_labels
    found = {
        "rows": len(rows),
        "class_names": rows.class_names,
        "labels": None if labels is None else hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest(),
        "images": _images_digest(rows) if isinstance(rows.rows, datasets.Dataset) and rows.columns else None,
    }
    if rows.target != TEXT:
        return found
    texts = rows.texts
    return {**found, "texts": None if texts is None else hashlib.sha256(json.dumps(texts).encode()).hexdigest()}


def _images_digest(rows: LabelledImages) -> str:
    column = getattr(rows.columns, "image", None) or IMAGE_EMBEDS
    table, found = rows.rows.select_columns(column).with_format("arrow"), hashlib.sha256()
    for start in range(0, len(rows), ROWS):
        for image in table[rows.numbers[start : start + ROWS]].column(column):
            for part in _parts(image.as_py()):
                found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()


def _parts(image: Any) -> Iterator[bytes]:
    content, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (None, image)
    if content is not None:
        yield content
    elif isinstance(path, str):  # the folder may have been moved since
        size = os.path.getsize(path) if os.path.exists(path) else -1
        yield f"{'/'.join(Path(path).parts[-2:])} {size}".encode()
    else:  # an embedding, or no image
        yield repr(path).encode()
