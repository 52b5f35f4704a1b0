# SPDX-License-Identifier: Apache-2.0
"""Links out of docs/ into the repository work on the site as they do there: what they name is taken along."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
COPIES = "repository"  # folder of the site
LINK = re.compile(r"(?<=\]\()(?!https?:|#)[^)#\s]+(?=[)#])")


def on_files(files: Files, config: Any) -> Files:
    """Adds what pages link to, and what pages that are added link to.

    Args:
        files: of the site.
        config: of the site.

    Returns:
        The files, with copies.
    """
    pages = list(files.documentation_pages())
    for page in pages:
        for link in LINK.findall(page.content_string):
            path = _repository_path(page.src_uri, link)
            if path is None or files.get_file_from_path(f"{COPIES}/{path}"):
                continue
            file = File.generated(config, f"{COPIES}/{path}", abs_src_path=str(ROOT / path))
            files.append(file)
            if file.is_documentation_page():
                pages.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """Points links that lead out of docs/ to the copies.

    Args:
        markdown: of the page.
        page: the page.
        **kwargs: of mkdocs.

    Returns:
        The markdown. A link to no file is left, and mkdocs warns of it.
    """
    source = page.file.src_uri

    def copied(match: re.Match[str]) -> str:
        path = _repository_path(source, match[0])
        return match[0] if path is None else os.path.relpath(f"{COPIES}/{path}", PurePosixPath(source).parent)

    return LINK.sub(copied, markdown)


def _repository_path(source: str, link: str) -> str | None:
    """What a link of a page means in the repository, if that is a file and no page of docs/."""
    copied = source.startswith(f"{COPIES}/")
    written = PurePosixPath(source).relative_to(COPIES) if copied else PurePosixPath("docs", source)
    path = os.path.normpath(written.parent / link)
    return path if (ROOT / path).is_file() and not path.startswith("docs/") else None
