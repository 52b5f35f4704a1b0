# SPDX-License-Identifier: Apache-2.0
"""`make docs`: the site builds without a warning, and nothing public is missing from it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocstrings import Inventory

import hf_robust
from hf_robust import errors, evaluation
from tests.docs.pages import ROOT, name_of

LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        patch.chdir(ROOT)
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))  # strict: a dead link or anchor raises
    return folder


def public_names() -> list[str]:
    """What users import: the package's own names, the measures, the errors."""
    rooms = {"hf_robust": hf_robust, "hf_robust.evaluation": evaluation}
    found = [(f"{room}.{name}", getattr(module, name)) for room, module in rooms.items() for name in dir(module)]
    names = [name for name, value in found if "._" not in name and not inspect.ismodule(value)]
    kinds = [name for name, value in vars(errors).items() if getattr(value, "__module__", "") == errors.__name__]
    return names + [f"hf_robust.errors.{name}" for name in kinds if name.endswith("Error")]


def test_every_public_name_has_its_place_in_the_api(site):
    with (site / "objects.inv").open("rb") as file:
        documented = Inventory.parse_sphinx(file)
    missing = [name for name in public_names() if name not in documented]
    assert len(public_names()) > 100 and not missing


def test_docstrings_are_shown(site):
    """A name that could not be followed to where it is defined would be a heading with nothing beneath."""
    page = (site / "api" / "tuners.html").read_text(encoding="utf-8")
    assert "share of the eligible parameters to train" in page and "Examples:" in page and "&gt;&gt;&gt;" in page


def test_nothing_is_fetched_when_a_page_is_viewed(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link)[^>]*(?:src|href)="(https?://[^"]+)"', page.read_text(encoding="utf-8")
        )
        assert not [one for one in loaded if "squidfunk" not in one], page


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=name_of)
def test_links_work_in_the_repository_too(page):
    for path, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = page if not path else page.parent / path
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"
