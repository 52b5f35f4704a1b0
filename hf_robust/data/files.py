# SPDX-License-Identifier: Apache-2.0
"""The files of a source on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from glob import glob, has_magic, iglob
from itertools import accumulate, takewhile
from pathlib import Path

import PIL.Image

from ..errors import DataError, HfRobustError
from .splits import METADATA, image_splits, split_word

IMAGES, PARQUET, TABLES = "images", ".parquet", (".csv", ".tsv", ".jsonl", ".json")
NO_TABLES = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")


@contextmanager
def reading(source: str, where: str) -> Iterator[None]:
    """Reports whatever datasets, pyarrow and the file system raise while a source is read.

    Args:
        source: file, folder or dataset of the Hub.
        where: the setting that names it.

    Raises:
        DataError: anything went wrong.
        UnsafeFileError: a file is no regular file.
    """
    try:
        yield
    except HfRobustError:
        raise
    except Exception as error:  # they have no common class; the first cause is the one that says something
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
        raise DataError(f"source cannot be read ({reason})", where=where, got=source) from error


def split_off(source: str) -> tuple[str, str | None]:
    """Returns `PATH:split` as its two parts; the longest part that exists, as it is or as a pattern, is the path.

    Args:
        source: what the user wrote.

    Example:
        >>> split_off("owner/name:test")
        ('owner/name', 'test')
    """
    if exists(source):
        return source, None
    for index in range(len(source) - 1, 0, -1):
        if source[index] == ":" and exists(source[:index]):
            return source[:index], source[index + 1 :]
    name, colon, split = source.partition(":")
    return name, split if colon else None


def exists(path: str) -> bool:
    """Whether a path exists, or a pattern fits something.

    Args:
        path: of a file or folder, or a pattern of files.
    """
    return os.path.exists(path) or has_magic(path) and any(iglob(path, recursive=True))


def files_of(path: str) -> tuple[str, list[str]]:
    """Returns a folder, and the files of a source relative to it, with slashes and in order; hidden ones left out.

    Links are followed, but not back into a folder that they lie in: that has no end.

    Args:
        path: of a file or folder, or a pattern of files, that exists.
    """
    if os.path.isfile(path):
        folder, file = os.path.split(path)
        return folder, [file]
    if os.path.isdir(path):
        return path, sorted(_walk(path))
    folder = str(Path(*takewhile(lambda part: not has_magic(part), Path(path).parts)))
    files = [Path(os.path.relpath(file, folder)).as_posix() for file in glob(path, recursive=True)]
    files = [file for file in files if all(map(is_visible, file.split("/")))]
    returning = {parent for parent in {os.path.dirname(file) for file in files} if _returns(folder, parent)}
    return folder, sorted(file for file in files if os.path.dirname(file) not in returning)


def is_visible(name: str) -> bool:
    """Whether a file or folder is the user's own, neither hidden nor left by a program that packs archives.

    Args:
        name: without folder.
    """
    return not name.startswith(".") and name != "__MACOSX"


def _walk(folder: str) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        inside = "" if parent == folder else Path(os.path.relpath(parent, folder)).as_posix() + "/"
        folders[:] = [name for name in folders if is_visible(name) and not _returns(folder, inside + name)]
        yield from (inside + file for file in files if is_visible(file))


def _returns(folder: str, path: str) -> bool:
    """Whether a path below a folder leads, by a link, through one that it has been in."""
    steps = accumulate([folder, *Path(path).parts], os.path.join)
    real = [os.path.realpath(step) for step in steps]
    return len(set(real)) < len(real)


def kind_of(files: Sequence[str], source: str, where: str) -> tuple[str, list[str]]:
    """Returns what a source consists of, and the files that are of this kind.

    Tables beside images are the source, unless the images have classes or metadata of their own.

    Args:
        files: relative to the source, with slashes.
        source: what the user wrote.
        where: the setting, for the messages.

    Returns:
        `IMAGES`, `PARQUET` or one of `TABLES`; other files are left out.

    Raises:
        DataError: there is nothing that can be read, or files of several kinds.

    Example:
        >>> kind_of(["cat/0.jpg", "dog/0.png", "README.md"], "photos", "train_data")
        ('images', ['cat/0.jpg', 'dog/0.png'])
    """
    kinds: dict[str, list[str]] = {}
    with_images = any(map(is_image, files))
    for file in files:
        name, suffix = file.rpartition("/")[2], os.path.splitext(file)[1].lower()
        if is_image(file) or with_images and name in METADATA:
            kinds.setdefault(IMAGES, []).append(file)
        elif suffix in (PARQUET, *TABLES) and name not in NO_TABLES:
            kinds.setdefault(suffix, []).append(file)
    if len(kinds) == 2 and IMAGES in kinds and PARQUET not in kinds and not _has_classes(kinds[IMAGES]):
        del kinds[IMAGES]
    if not kinds:
        allowed = "parquet, .csv, .tsv, .jsonl (.json), images in folders, or what save_to_disk writes"
        raise DataError("source holds no data", where=where, got=source, allowed=allowed)
    if len(kinds) > 1:
        got = [some[0] for some in kinds.values()]
        remedy = "Name the files that are meant, by a path or a pattern such as 'photos/*.csv'."
        raise DataError(f"files of several kinds in {source!r}", where=where, got=got, allowed="one", remedy=remedy)
    return kinds.popitem()


def _has_classes(images: Sequence[str]) -> bool:
    folders = {file.partition("/")[0] for file in images if file.count("/") == 1}
    described = any(file.rpartition("/")[2] in METADATA for file in images)
    return described or bool(image_splits(images)) or (len(folders) > 1 and not all(map(split_word, folders)))


def is_image(file: str) -> bool:
    """Whether a file is an image, by its ending.

    Args:
        file: its name, with or without folder.
    """
    return os.path.splitext(file)[1].lower() in _image_suffixes()


@lru_cache
def _image_suffixes() -> set[str]:
    """Of all files that Pillow can open, with the plugins that the program has registered."""
    found = PIL.Image.registered_extensions()
    return {suffix for suffix, kind in found.items() if kind in PIL.Image.OPEN}
