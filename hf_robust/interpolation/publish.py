# SPDX-License-Identifier: Apache-2.0
"""A folder that is there whole or not at all."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..data.publish import TEMPORARY, seal, sync
from ..errors import MergeError

CURRENT_FOLDER, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


def check_output(out_dir: Path, inputs: list[Path], overwrite: bool) -> None:
    """Refuses an output folder that is in use.

    Args:
        out_dir: the folder to be written.
        inputs: the folders to be read.
        overwrite: whether it may hold something.

    Raises:
        MergeError: it is a file, holds something, or is, holds or lies in an input, by links too.

    Example:
        >>> check_output(Path("merged"), [Path("runs/full")], overwrite=False)
    """
    out_dir = out_dir.resolve()
    for source in inputs:
        if _lies_in(out_dir, source.resolve()) or _lies_in(source.resolve(), out_dir):
            raise MergeError("output and input overlap", got=str(out_dir), where=str(source))
    if out_dir.exists() and not out_dir.is_dir():
        raise MergeError("output is no folder", got=str(out_dir))
    if not overwrite and out_dir.exists() and any(out_dir.iterdir()):
        remedy = "With overwrite the folder is replaced as a whole."
        raise MergeError("output folder is not empty", got=str(out_dir), remedy=remedy)


@contextmanager
def publish_folder(out_dir: Path, overwrite: bool, needed: int = 0) -> Iterator[Path]:
    """Gives a temporary folder, which becomes the output folder when all has been written, and else disappears.

    Whenever the process dies, the output folder is what it was or complete; a folder `.hf_robust-tmp-*` may be left.

    Args:
        out_dir: the output folder; what it holds is deleted at the end.
        overwrite: whether it may hold something.
        needed: what will be written, in bytes.

    Yields:
        The temporary folder, beside the output folder.

    Raises:
        MergeError: the disk is full or fails, or the system cannot exchange two folders at once.

    Example:
        >>> with publish_folder(Path("merged"), overwrite=False) as folder:
        ...     (folder / "config.json").write_text("{}")
    """
    out_dir = out_dir.resolve()
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out_dir.parent).free
    if needed > free:
        raise MergeError("not enough disk space", where=str(out_dir.parent), got=f"{free} bytes free, {needed} needed")
    temporary = out_dir.parent / (TEMPORARY + secrets.token_hex(8))
    try:
        temporary.mkdir()  # not tempfile: its folders are for their owner alone
        yield temporary
        seal(temporary)
        if overwrite and out_dir.exists() and any(out_dir.iterdir()):
            _exchange(temporary, out_dir)
        else:
            os.rename(temporary, out_dir)  # also onto an empty folder
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise MergeError(f"files cannot be read or written ({error})", where=str(out_dir)) from error
        raise
    sync(out_dir.parent)
    if temporary.exists():  # it holds what was there before
        shutil.rmtree(temporary)


def _lies_in(folder: Path, other: Path) -> bool:
    return any(one.exists() and other.exists() and one.samefile(other) for one in [folder, *folder.parents])


def _exchange(first: Path, second: Path) -> None:
    try:
        library = ctypes.CDLL(None, use_errno=True)
        names = CURRENT_FOLDER, os.fsencode(first), CURRENT_FOLDER, os.fsencode(second)
        if library.renameat2(*names, EXCHANGE) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    except (AttributeError, TypeError, OSError) as error:  # no such function, no such library, not on this disk
        remedy = "Remove it yourself, or choose another."
        what = "output folder cannot be replaced in one step here"
        raise MergeError(what, got=str(second), remedy=remedy) from error
