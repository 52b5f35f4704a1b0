# SPDX-License-Identifier: Apache-2.0
"""Which splits a source holds, and which of them is meant."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import DataError, close_matches

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
METADATA = ("metadata.csv", "metadata.jsonl")  # beside images: a row for every one of them
SHARD = re.compile(r"-\d+-of-\d+.*$")  # what datasets' push_to_hub appends to the split, in old files with a hash


def split_word(name: str) -> str | None:
    """Returns the split that a word means, in any case; None for other words.

    Args:
        name: of a folder, or of a file without suffix.

    Example:
        >>> split_word("Dev"), split_word("test_tube")
        ('validation', None)
    """
    return SPLITS.get(name.casefold())


def choose_split(places: Sequence[str], asked: str | None, source: str, where: str) -> str | None:
    """Returns the one place of a source that is read; None if the source is one set without splits.

    Args:
        places: where the splits are; each ends in the split's name, or in this and a slash.
        asked: what the user wrote behind the colon.
        source: what the user wrote before it.
        where: the setting, for the messages.

    Raises:
        DataError: two places mean the same split, several come into question, or none is the one asked for.

    Example:
        >>> choose_split(["train/", "val/"], "validation", "photos", "eval_data")
        'val/'
    """
    pair = _same_split(places)
    if pair:
        what = f"{pair[0]} and {pair[1]} are the same split"
        raise DataError(what, where=where, got=source, remedy="Move one of them to a source of its own.")
    names = [split_name(place) for place in places]
    if asked is None:
        if len(names) > 1:
            first = next((name for name in names if split_word(name) == "train"), names[0])
            remedy, allowed = f"Write {f'{source}:{first}'!r}.", ", ".join(names)
            raise DataError("source has several splits", where=where, got=source, allowed=allowed, remedy=remedy)
        return places[0] if places else None
    for name, place in zip(names, places, strict=True):
        if _meaning(name) == _meaning(asked):
            return place
    raise _no_such_split(names, asked, source, where)


def _no_such_split(names: list[str], asked: str, source: str, where: str) -> DataError:
    got, allowed = f"{source}:{asked}", ", ".join(names)
    if "[" in asked:
        remedy = "Put these rows into a file or folder of their own; slices are for datasets of the Hub."
        return DataError("slice of a local source", where=where, got=got, allowed=allowed, remedy=remedy)
    if not names:
        return DataError("source has no splits", where=where, got=got, remedy=f"Write {source!r}.")
    return DataError("no such split", where=where, got=got, allowed=allowed, remedy=close_matches(asked, names))


def file_splits(files: Sequence[str]) -> dict[str, list[str]]:
    """Returns files by the place of their split; nothing if their names tell no splits apart.

    A file's split is its name, or the nearest folder that is named by a split. They tell splits apart if one is named
    by a split, or if not the same splits occur within all names (`birds_train`, `birds_test`).

    Args:
        files: relative to the source, with slashes.

    Example:
        >>> file_splits(["data/train-00000-of-00002.csv", "data/train-00001-of-00002.csv", "extra/0.csv"])
        {'data/train': ['data/train-00000-of-00002.csv', 'data/train-00001-of-00002.csv'], 'extra/0': ['extra/0.csv']}
    """
    splits: dict[str, list[str]] = {}
    for file in files:
        splits.setdefault(_place(file), []).append(file)
    names = [split_name(place) for place in splits]
    within = {frozenset(map(split_word, re.split(r"[\W\d_]+", name))) - {None} for name in names}
    return splits if len(within) > 1 or any(map(split_word, names)) else {}


def image_splits(files: Sequence[str]) -> dict[str, list[str]]:
    """Returns the files of an image folder by the place of their split; nothing if it has no splits.

    Folders are splits if one of them is named by a split and holds folders of images, or metadata. One with images
    directly in it is a class, whatever its name. Files beside the splits have the place `""`.

    Args:
        files: relative to the source, with slashes.

    Example:
        >>> image_splits(["train/cat/0.jpg", "test_catalogue/cat/0.jpg"])
        {'train/': ['train/cat/0.jpg'], 'test_catalogue/': ['test_catalogue/cat/0.jpg']}
        >>> image_splits(["train/0.jpg", "bus/0.jpg"])
        {}
    """
    folders: dict[str, list[str]] = {}
    for file in files:
        top, slash, _ = file.partition("/")
        folders.setdefault(top + slash if slash else "", []).append(file)
    return folders if any(_is_split(place, inside) for place, inside in folders.items()) else {}


def _is_split(place: str, files: Sequence[str]) -> bool:
    described = any(place + name in files for name in METADATA)
    return bool(split_word(split_name(place))) and (described or all(file.count("/") > 1 for file in files))


def _place(file: str) -> str:
    """The file without number of shard and suffix, or its folder and a slash."""
    *folders, last = file.split("/")
    stem = SHARD.sub("", last.rpartition(".")[0])
    numbered = re.fullmatch(r"(.+?)[-_.]?\d+", stem)  # train-0, train_1: parts of one split too
    if numbered and split_word(numbered[1]):
        stem = numbered[1]
    if not split_word(stem):
        for depth in range(len(folders), 0, -1):
            if split_word(folders[depth - 1]):
                return "/".join(folders[:depth]) + "/"
    return "/".join([*folders, stem])


def split_name(place: str) -> str:
    """Returns what a split is called, by its place.

    Args:
        place: as of `image_splits` and `file_splits`.

    Example:
        >>> split_name("photos/test_catalogue/")
        'test_catalogue'
    """
    return place.rstrip("/").rpartition("/")[2]


def _meaning(name: str) -> str:
    return split_word(name) or name


def _same_split(places: Sequence[str]) -> tuple[str, str] | None:
    """Two places of the same split."""
    seen: dict[str, str] = {}
    for place in places:
        other = seen.setdefault(_meaning(split_name(place)), place)
        if other != place:
            return other, place
    return None
