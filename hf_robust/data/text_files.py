# SPDX-License-Identifier: Apache-2.0
"""Files that others may have written, and those of small text: settings, names, JSON."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from stat import S_ISREG
from typing import Any

from ..errors import DataError, HfRobustError, UnsafeFileError

LIMIT = 10 * 2**20  # bytes


def check_regular(path: str | Path) -> None:
    """Refuses what is no file, or no link to one: reading a pipe waits for ever, and a device may never end.

    Args:
        path: what will be read.

    Raises:
        UnsafeFileError: it is no regular file.
        OSError: it is not there.

    Example:
        >>> check_regular("/dev/zero")
        Traceback (most recent call last):
        hf_robust.errors.UnsafeFileError: not a regular file (at /dev/zero)
    """
    if not S_ISREG(os.stat(path).st_mode):
        raise UnsafeFileError("not a regular file", where=str(path))


def read_text(path: Path, limit: int = LIMIT, error: type[HfRobustError] = DataError) -> str:
    """Reads a text file in UTF-8.

    Args:
        path: the file, or a link to it.
        limit: how many bytes it may have.
        error: the class of what is raised.

    Raises:
        UnsafeFileError: it is no regular file.
        HfRobustError: of the class `error`: it is not there, too large, or no such text.

    Example:
        >>> read_text(Path("names.txt")).splitlines()
        ['tench', 'goldfish']
    """
    where = str(path)
    try:
        check_regular(path)
        with path.open("rb") as file:
            content = file.read(limit + 1)  # and not by its size, which may change, or be 0 under /proc
    except OSError as problem:
        raise error("file cannot be read", where=where, got=problem.strerror) from problem
    if len(content) > limit:
        raise error("file is too large", where=where, allowed=f"{limit:,} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error("file is no text in UTF-8", where=where, got=str(problem)) from problem


def read_json(path: Path, limit: int = LIMIT) -> Any:
    """Reads a JSON file, as strictly as `parse_json`.

    Args:
        path: the file, or a link to it.
        limit: how many bytes it may have.

    Raises:
        UnsafeFileError: it is no regular file.
        DataError: it is not there, too large, or refused by `parse_json`.

    Example:
        >>> read_json(Path("my-adapter", "classifier.json"))["class_names"]
        ['cat', 'dog']
    """
    return parse_json(read_text(path, limit), str(path))


def parse_json(text: str | bytes, where: str) -> Any:
    """Parses JSON in which no name is repeated in an object, and every number is one.

    Python's own parser keeps the last of two values of one name without a word, and takes NaN and Infinity, which are
    no JSON.

    Args:
        text: as text, or in UTF-8.
        where: the file, for the message.

    Raises:
        DataError: it is no JSON, repeats a name, has a number that is not finite or has thousands of digits, or has
            too many brackets within each other.

    Example:
        >>> parse_json('{"classes": ["cat", "dog"]}', "names.json")
        {'classes': ['cat', 'dog']}
    """
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        return json.loads(text, object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite)
    except ValueError as problem:
        raise DataError("no valid JSON", where=where, got=str(problem)) from problem
    except RecursionError as problem:
        raise DataError("no valid JSON", where=where, got="too many brackets within each other") from problem


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:40]!r} is there twice")
        found[name] = value
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is no finite number")
    return number
