# SPDX-License-Identifier: Apache-2.0
"""The errors hf_robust raises: one class per cause, one message layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .shown import printable, sendable, shown

LONGEST = 500  # characters of a part of a message; each may hold what was read from a file
MOST_KNOWN, LONGEST_NAME = 20_000, 100  # names that one is compared with, which costs their product, and characters


class HfRobustError(Exception):
    """Base of all errors raised by hf_robust.

    The message reads `what (at where): got …; allowed …. remedy`, so that a user sees the observed value, the allowed
    values and what to do in one line. Whatever the parts hold, it is a short line that a terminal can show: a value is
    cut to 80 characters and every other part to 500, and control characters are escaped.

    Args:
        what: what is wrong, in one clause.
        where: file, module, dataset or argument.
        got: the observed value.
        allowed: the allowed values, in words.
        remedy: what to do about it, a sentence.

    Example:
        >>> from hf_robust.errors import ConfigError
        >>> raise ConfigError("density is out of range", got=1.5, allowed="(0, 1]")
        Traceback (most recent call last):
        hf_robust.errors.ConfigError: density is out of range: got 1.5; allowed (0, 1]
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: object = None,
        allowed: str | None = None,
        remedy: str | None = None,
    ) -> None:
        if "Original Traceback" in what:  # how a DataLoader hands on what a worker has raised: the last line is ours
            what = what.rstrip().rpartition("\n")[2].partition(": ")[2]
        self.what, self.got = printable(what, LONGEST), got
        self.where, self.allowed, self.remedy = (
            None if part is None else printable(part, LONGEST) for part in (where, allowed, remedy)
        )
        message = self.what + (f" (at {self.where})" if self.where else "")
        facts = [f"got {shown(got)}"] if got is not None else []
        facts += [f"allowed {self.allowed}"] if self.allowed else []
        message += (": " + "; ".join(facts)) if facts else ""
        super().__init__(message + (f". {self.remedy}" if self.remedy else ""))

    def __reduce__(self) -> tuple:  # keyword arguments would be lost in the pickle a DataLoader worker sends
        return _rebuild, (type(self), self.what, self.where, sendable(self.got), self.allowed, self.remedy)


def _rebuild(cls: type, what: str, where: str, got: object, allowed: str, remedy: str) -> HfRobustError:
    return cls(what, where=where, got=got, allowed=allowed, remedy=remedy)


class ConfigError(HfRobustError, ValueError):
    """A wrong setting, or a model a method cannot be applied to."""


class DataError(HfRobustError, ValueError):
    """A dataset, its labels, images or class names cannot be used."""


class SelectionError(HfRobustError, RuntimeError):
    """SAFT's entries could not be selected, or were needed before they were selected."""


class NonFiniteError(HfRobustError, ArithmeticError, ValueError):
    """A loss, gradient or weight is NaN or infinite."""


class BaseWeightsError(HfRobustError, RuntimeError):
    """The base's weights were edited, replaced or shared while they held an adapter's values; nothing is changed."""


class AdapterFileError(HfRobustError, ValueError):
    """A saved adapter does not fit the model, or its content is invalid."""


class CheckpointError(HfRobustError, RuntimeError):
    """A checkpoint cannot be written, is damaged or incomplete, or is of another run; whole ones stay as they are."""


class RankMismatchError(HfRobustError, RuntimeError):
    """The processes of a training differ in what has to be the same, or one of them has stopped."""


class MergeError(HfRobustError, ValueError):
    """Two models, checkpoints or an adapter and its base cannot be merged; nothing has been changed or written."""


class UnsafeFileError(HfRobustError, ValueError):
    """A file could run code when loaded, is no regular file, or names a file outside its folder."""


class HubError(HfRobustError, OSError):
    """A model could not be pushed to the Hub; the local copy is complete, and the message says how to go on."""


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Says how to install what an import needs, where that belongs to an extra and is not there.

    Args:
        extra: its name, as `identities`.

    Raises:
        ConfigError: a package that is imported inside is not installed.

    Example:
        >>> with needs_extra("identities"):
        ...     from pytorch_metric_learning.losses import ArcFaceLoss
    """
    try:
        yield
    except ModuleNotFoundError as error:
        remedy = f"pip install 'hf_robust[{extra}]'"
        raise ConfigError(f"package {error.name!r} is not installed", remedy=remedy) from error


def close_matches(name: str, known: list[str]) -> str:
    """Names the entries of `known` that resemble `name`, for the remedy of an error message.

    Args:
        name: what the user wrote.
        known: what exists.

    Example:
        >>> close_matches("qproj", ["q_proj", "k_proj", "fc1"])
        "Did you mean 'q_proj', 'k_proj'?"
    """
    import difflib

    readable = [one for one in known[:MOST_KNOWN] if len(one) <= LONGEST_NAME]
    matches = difflib.get_close_matches(name[:LONGEST_NAME], readable, n=3)
    if matches:
        return "Did you mean " + ", ".join(shown(match) for match in matches) + "?"
    return "There are " + ", ".join(shown(one) for one in known[:5]) + (", …" if len(known) > 5 else ".")
