# SPDX-License-Identifier: Apache-2.0
"""The pages of the documentation, and the blocks of code in them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OUTPUTS = ("text", "diff", "bibtex", "toml")  # what nobody runs


class Block(NamedTuple):
    """A fenced block: its language, its text and the line it begins in."""

    language: str
    text: str
    line: int


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """Those of a language, or all."""
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    fences = [token for token in tokens if token.type in ("fence", "code_block")]
    found = [Block(token.info.strip(), token.content, token.map[0] + 1) for token in fences]
    return [block for block in found if language in (None, block.language)]
