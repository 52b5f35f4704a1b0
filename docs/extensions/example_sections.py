# SPDX-License-Identifier: Apache-2.0
"""`Example:` of a docstring is what mkdocstrings calls `Examples:`, code with its output."""

from __future__ import annotations

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Renames the sections before docstrings are read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Renames those of an object.

        Args:
            obj: a module, class, function or attribute.
            **kwargs: of other extensions.
        """
        if obj.docstring:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
