# SPDX-License-Identifier: Apache-2.0
"""Docstrings as mkdocstrings reads them: `Example:` is its `Examples:`, and `[`name`]` a reference into the API."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Changes docstrings before they are read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Changes that of an object.

        Args:
            obj: a module, class, function or attribute.
            **kwargs: of other extensions.
        """
        if obj.docstring:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"\[`(\w+)`\](?!\[)", r"[`\1`][hf_robust.\1]", text)
