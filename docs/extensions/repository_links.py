# SPDX-License-Identifier: Apache-2.0
"""Links out of docs/ into the repository work on the site as they do in the repository: what they name is taken along."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\((?P<target>(?:\.\./)+[^)#\s]+)")


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Points links that lead out of docs/ to copies of what they name.

    Args:
        markdown: of the page.
        page: the page.
        config: of the site.
        files: of the site; what is linked is added.

    Returns:
        The markdown with other links. A link to no file is left, and mkdocs warns of it.
    """
    folder = PurePosixPath("docs", page.file.src_uri).parent

    def taken_along(match: re.Match[str]) -> str:
        path = os.path.normpath(folder / match["target"])
        if path.startswith("docs/") or not (ROOT / path).is_file():
            return match[0]
        name = f"repository/{path}.txt" if path.endswith((".yaml", ".py", ".md")) else f"repository/{path}"
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
        return "](" + os.path.relpath(name, PurePosixPath(page.file.src_uri).parent)

    return LINK.sub(taken_along, markdown)
