# SPDX-License-Identifier: Apache-2.0
"""Attributes that have another value for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(of: Any, **attributes: Any) -> Iterator[None]:
    """Inside the context an object has other values of some attributes.

    Args:
        of: the object.
        attributes: the values by name.

    Example:
        >>> with replaced(args, dataloader_drop_last=False):
        ...     loader = trainer.get_test_dataloader(photos)
    """
    before = {name: getattr(of, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(of, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(of, name, value)
