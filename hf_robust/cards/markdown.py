# SPDX-License-Identifier: Apache-2.0
"""Text of users, made safe for the Markdown and the metadata of a model card."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

MOST_CHARACTERS = 200  # of a value


def hub_id(name: str) -> str | None:
    """Returns `name` if it can be a model's or dataset's id on the Hub, and None if it is a local folder or no id.

    Args:
        name: what a model or dataset was loaded from.

    Example:
        >>> hub_id("openai/clip-vit-base-patch32"), hub_id("/data/models/clip")
        ('openai/clip-vit-base-patch32', None)
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if name and not Path(name).exists() else None


def plain(text: str) -> str:
    """Returns text in one line, without control characters and marks that change the direction of writing.

    Args:
        text: any text.
    """
    return " ".join("".join(" " if unicodedata.category(one).startswith("C") else one for one in text).split())


def escape(text: str) -> str:
    """Returns text that Markdown and HTML show as it is, in a table too.

    Args:
        text: any text.
    """
    text = plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#+!|~$:@-])", r"\\\1", text)


def code(text: str) -> str:
    """Returns text as a Markdown code span, with a fence that does not occur in it.

    Args:
        text: any text; what is longer than 200 characters is cut.
    """
    text = plain(text)
    text = text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "…"
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"
