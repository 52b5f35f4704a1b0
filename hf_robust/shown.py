# SPDX-License-Identifier: Apache-2.0
"""Values and text of any size and content, as an error message can show them: short, and on one line."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator
from enum import Enum

import numpy as np
import torch

MOST, LEVELS = 80, 4  # characters of a value; how deep it is looked into
BRACKETS = {list: "[]", tuple: "()", set: "{}", frozenset: "{}", deque: "[]"}
CUT = "…"


def shown(value: object) -> str:
    """Returns `repr(value)`, cut to 80 characters without building the rest, and without control characters.

    Args:
        value: anything; a list of millions of items costs no more than one of ten.

    Example:
        >>> shown([0] * 10**7)
        '[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, …]'
    """
    return printable(_repr(value, LEVELS), MOST)


class Shown(str):
    """What was shown of a value, in the place of the value."""

    def __repr__(self) -> str:
        return str(self)


def sendable(value: object) -> object:
    """Returns a value that is short, or what is shown of it: another may have no pickle, or one without end.

    Args:
        value: anything.

    Example:
        >>> sendable(1.5), sendable([1.5])
        (1.5, [1.5])
        >>> type(sendable([1.5]))
        <class 'hf_robust.shown.Shown'>
    """
    is_short = (type(value) is str and len(value) <= MOST) or (type(value) is int and value.bit_length() <= 64)
    return value if is_short or type(value) in (type(None), bool, float) else Shown(shown(value))


def printable(text: str, most: int) -> str:
    r"""Returns text in one line, in which control characters, reversed writing and the like are escaped as by `repr`.

    Raw from a file, they could erase or rewrite what stands on a terminal.

    Args:
        text: any text.
        most: characters; of longer text the middle is left out.

    Example:
        >>> printable("\x1b[2Jcat", 20)
        '\\x1b[2Jcat'
    """
    text = _cut(text, most)
    return _cut("".join(c if c.isprintable() else _escaped(c) for c in text), most)


def _escaped(character: str) -> str:
    return " " if character.isspace() else character.encode("unicode_escape").decode()


def _cut(text: str, most: int) -> str:
    half = (most - 1) // 2
    return text if len(text) <= most else text[: most - 1 - half] + CUT + text[len(text) - half :]


def _repr(value: object, levels: int) -> str:
    if isinstance(value, Enum):
        return repr(value)
    if isinstance(value, str):
        return repr(_cut(value, MOST))
    if isinstance(value, bytes | bytearray):
        return repr(value) if len(value) <= MOST else f"{bytes(value[: MOST // 2])!r}{CUT}"
    if isinstance(value, int) and value.bit_length() > 4 * MOST:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, np.ndarray | torch.Tensor) and np.prod(value.shape) > MOST // 4:
        return f"{type(value).__name__} of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, dict):
        return _joined((f"{_repr(k, levels - 1)}: {_repr(v, levels - 1)}" for k, v in value.items()), "{}", levels)
    if isinstance(value, set | frozenset) and len(value) <= MOST:
        return _joined(sorted(_repr(one, levels - 1) for one in value), "{}", levels)
    if isinstance(value, tuple) and len(value) == 1:
        return f"({_repr(value[0], levels - 1)},)"
    for kind, brackets in BRACKETS.items():
        if isinstance(value, kind):
            return _joined((_repr(one, levels - 1) for one in value), brackets, levels)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.repr]
        parts = (f"{name}={_repr(getattr(value, name), levels - 1)}" for name in names)
        return type(value).__name__ + _joined(parts, "()", levels)
    try:
        return " ".join(repr(value).split())
    except Exception:  # of someone else's class: an error message must not raise another one
        return f"an object of {type(value).__name__}"


def _joined(parts: Iterable[str], brackets: str, levels: int) -> str:
    """Joins what fits; parts that are not needed are not made."""
    return brackets[0] + ", ".join(_first(parts) if levels else [CUT]) + brackets[1]


def _first(parts: Iterable[str]) -> Iterator[str]:
    room = MOST - 3
    for index, part in enumerate(parts):
        room -= len(part) + 2
        if room < 0 and index > 0:
            yield CUT
            return
        yield part
