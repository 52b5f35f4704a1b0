# SPDX-License-Identifier: Apache-2.0
"""Files of tensors that others may have written."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import AdapterFileError, HfRobustError, UnsafeFileError
from .text_files import parse_json

MAX_HEADER = 2**24  # bytes; that of an adapter of ViT-B/32 has 2**16


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of an adapter, or of a task. They may be mapped from the file.

    Args:
        path: a safetensors file.

    Raises:
        UnsafeFileError: it is a pipe, a device or a folder.
        AdapterFileError: it is not a whole safetensors file, or has a name twice.
    """
    if not path.is_file():
        raise UnsafeFileError("not a regular file", where=str(path))
    try:
        _read_header(path)
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterFileError("no whole safetensors file", where=str(path), got=str(error)) from error


def _read_header(path: Path) -> Any:
    """The header, read strictly: the library takes the last of two tensors of one name."""
    with path.open("rb") as file:
        start = file.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= size <= min(MAX_HEADER, path.stat().st_size):
            got, remedy = start[:8], "Is it a pickle? hf_robust reads safetensors only."
            raise AdapterFileError("no safetensors file", where=str(path), got=got, remedy=remedy)
        try:
            return parse_json(file.read(size), str(path))
        except HfRobustError as error:
            raise AdapterFileError(
                "header of a safetensors file is damaged", where=str(path), got=error.got
            ) from error
