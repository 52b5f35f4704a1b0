# SPDX-License-Identifier: Apache-2.0
"""A folder that is there whole or not at all: written under another name, renamed when all of it is on the disk."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".hf_robust-tmp-"  # first part of the name of a folder that is not whole yet, or no more
BLOCK = 2**20  # bytes read at once


def seal(folder: Path) -> None:
    """Makes what a folder holds as readable as itself, and waits until all of it is on the disk.

    Args:
        folder: with all its files.

    Raises:
        OSError: the disk is full or fails.

    Example:
        >>> seal(Path(".hf_robust-tmp-1"))
        >>> os.rename(".hf_robust-tmp-1", "merged")
        >>> sync(Path("."))
    """
    mode, paths = folder.stat().st_mode & 0o666, list(folder.rglob("*"))
    for path in paths:
        if path.is_file():
            path.chmod(mode)  # the safetensors library writes for the owner alone
    for path in [*paths, folder]:
        sync(path)


def stream_sha256(stream: BinaryIO, length: int | None = None) -> bytes:
    """Returns the SHA-256 of what a stream holds from here on.

    Args:
        stream: a file opened for reading bytes.
        length: how many bytes count; None for all.

    Example:
        >>> stream_sha256(io.BytesIO(b"")).hex()[:8]
        'e3b0c442'
    """
    found, left = hashlib.sha256(), sys.maxsize if length is None else length
    while left > 0 and (block := stream.read(min(left, BLOCK))):
        found.update(block)
        left -= len(block)
    return found.digest()


def sync(path: Path) -> None:
    """Waits until a file, or the list of what is in a folder, is on the disk.

    Args:
        path: of either.

    Raises:
        OSError: the disk is full or fails.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
