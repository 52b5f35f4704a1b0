# SPDX-License-Identifier: Apache-2.0
"""What the documentation takes from elsewhere is as it stands there: messages, figures, citations."""

from __future__ import annotations

import ast
import re

import pytest

from hf_robust.training.learning_rates import FULL, HEAD_ALONE, OF_ADAPTERS, OTHERS
from tests.docs.pages import ROOT, blocks, name_of

METHODS = sorted(page for page in (ROOT / "docs/methods").glob("*.md") if page.name != "index.md")
OF_PEFT = {"KeyError: 'SAFT'"}
WITHOUT_A_CARD = {"FLYP", "TPGM", "Soups", "VRF"}  # which make no model of which the card would name them


def strings_of_the_source() -> str:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "hf_robust").rglob("*.py")]
    constants = (node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return "\n".join(text for text in constants if isinstance(text, str))


def test_error_messages_are_those_of_the_source():
    page = (ROOT / "docs/guides/troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^### `(.*)`$", page, re.MULTILINE)
    source = strings_of_the_source()
    assert len(quoted) > 40 and len(set(quoted)) == len(quoted)
    assert not [message for message in quoted if message not in source and message not in OF_PEFT]


def rows(text: str) -> dict[str, list[set[str]]]:
    """The cells of every row of every table, by what stands in its first cell."""
    found: dict[str, list[set[str]]] = {}
    for line in re.findall(r"^\|(.*)\|$", text, re.MULTILINE):
        first, *cells = (cell.strip().strip("*") for cell in line.split("|"))
        found.setdefault(first, []).append({*cells} - {""})
    return found


MEASURED = rows((ROOT / "examples/benchmarks/compare_methods.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [*METHODS, ROOT / "docs/guides/choosing.md"], ids=name_of)
def test_figures_are_those_of_the_comparison(page):
    shown = rows(page.read_text(encoding="utf-8"))
    compared = {name: cells for name, cells in shown.items() if name in MEASURED and name != "method"}
    assert "zero-shot" in compared and "full" in compared
    for name, several in compared.items():
        for cells in several:
            is_of_the_demo = any(re.search(r"± \d$", cell) for cell in cells)
            assert is_of_the_demo or any(cells <= measured for measured in MEASURED[name]), (name, cells)


@pytest.mark.parametrize("page", METHODS, ids=name_of)
def test_a_method_has_its_formula_use_limits_figures_and_citation(page):
    text = page.read_text(encoding="utf-8")
    sections = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert sections == ["Formula", "Use", "When not", "What it gained and cost", "Citation"]
    assert blocks(page, "text") and blocks(page, "python")
    (citation,) = blocks(page, "bibtex")
    template = (ROOT / "hf_robust/cards/model_card_template.md").read_text(encoding="utf-8")
    cited = re.sub(r'\{\{ "(.*?)" \}\}', r"\1", template)
    title = re.search(r"^# (.*)$", text, re.MULTILINE)[1]
    assert (citation.text in cited) != (title in WITHOUT_A_CARD)


def test_learning_rates_are_those_of_the_source():
    shown = rows((ROOT / "docs/guides/training.md").read_text(encoding="utf-8"))
    names = {"SAFT": "SAFT", "A-CLIP": "ACLIP", "R-Adapter": "RADAPTER", "LoRA": "LORA"}
    of_adapters = {**names, "learned context": "TRAINABLE_TOKENS"}
    expected = {title: OF_ADAPTERS[name] for title, name in of_adapters.items()}
    expected |= {"full fine-tuning": FULL, "a head alone": HEAD_ALONE, "other adapters": OTHERS}
    assert len(of_adapters) == len(OF_ADAPTERS)
    assert {title: shown[title] for title in expected} == {title: [{str(rate)}] for title, rate in expected.items()}


def test_the_readme_is_one_screen():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100
