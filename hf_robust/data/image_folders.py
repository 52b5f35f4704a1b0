# SPDX-License-Identifier: Apache-2.0
"""A folder with one subfolder of images per class, or with a table of metadata."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import pyarrow as pa
from datasets import ClassLabel, Dataset, Image

from ..errors import DataError
from .files import is_visible
from .splits import METADATA, split_word
from .tables import load_tables

ONE_LEVEL = "one folder of images per class, or images alone"


def load_image_folder(folder: str, split: str | None, files: Sequence[str], where: str) -> Dataset:
    """Loads one split as `image`, files that have not been opened, and `label`.

    The classes are the subfolders in alphabetical order; an empty one is a class without images. Images without
    subfolders have no label. With metadata, the columns are those of the metadata.

    Args:
        folder: of the source.
        split: folder of the split in it, with a slash at the end; None in a source without splits.
        files: images and metadata of the split, relative to the source, with slashes.
        where: the setting, for the messages.

    Raises:
        DataError: the folder does not tell which image is of which class.
    """
    metadata = [os.path.join(folder, file) for file in files if file.rpartition("/")[2] in METADATA]
    if metadata:
        if len({os.path.splitext(file)[1] for file in metadata}) > 1:
            raise DataError("metadata of several kinds", where=where, got=metadata, allowed="one")
        return load_tables(metadata, where)
    columns = {"image": pa.array([os.path.join(os.path.abspath(folder), file) for file in files], pa.string())}
    inside = [file[len(split or "") :] for file in files]
    if not any("/" in file for file in inside):
        return Dataset(pa.table(columns)).cast_column("image", Image(decode=False))
    _check_levels(inside, os.path.join(folder, split or ""), where)
    found = [file.partition("/")[0] for file in inside]
    if split is None and len(set(found)) > 1 and all(map(split_word, set(found))):
        remedy, got = "Give each split one folder per class, or name the folder that is meant.", sorted(set(found))
        raise DataError("folders of splits hold no classes", where=where, got=got, remedy=remedy)
    names = sorted({*found, *_empty_folders(os.path.join(folder, split or ""), set(found), where)})
    index = {name: number for number, name in enumerate(names)}
    columns["label"] = pa.array([index[name] for name in found], pa.int64())
    dataset = Dataset(pa.table(columns)).cast_column("image", Image(decode=False))
    return dataset.cast_column("label", ClassLabel(names=names))


def _check_levels(files: Sequence[str], folder: str, where: str) -> None:
    for file in files:
        if file.count("/") != 1:
            what = "image is in a folder within a folder" if "/" in file else "image is beside the folders of classes"
            remedy, got = "Move it, or name the folder that is meant.", os.path.join(folder, file)
            raise DataError(what, where=where, got=got, allowed=ONE_LEVEL, remedy=remedy)


def _empty_folders(folder: str, full: set[str], where: str) -> Iterator[str]:
    for name in set(os.listdir(folder)) - full:
        path = os.path.join(folder, name)
        if os.path.isdir(path) and is_visible(name):
            for other in filter(is_visible, os.listdir(path)):
                got = os.path.join(path, other)
                raise DataError("folder of a class holds no images", where=where, got=got, allowed=ONE_LEVEL)
            yield name
