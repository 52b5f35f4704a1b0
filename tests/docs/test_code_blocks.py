# SPDX-License-Identifier: Apache-2.0
"""What stands in README.md and docs/ can be copied and run: every block of code, with a tiny model of the name."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
from importlib import import_module
from unittest.mock import patch

import pytest

from hf_robust.cli import COMMANDS
from hf_robust.data.yaml_files import parse_yaml
from hf_robust.scripting.arguments import parse_arguments
from tests.docs.a_users_folder import build
from tests.docs.pages import OUTPUTS, PAGES, ROOT, blocks, name_of

RUNNERS = {"python", "bash", "yaml"}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def having(language: str) -> list:
    return [pytest.param(page, id=name_of(page)) for page in PAGES if blocks(page, language)]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    build(folder)
    return folder


@pytest.fixture
def users_folder(original, tmp_path, monkeypatch):
    """A copy for every page, as pages write into it."""
    shutil.copytree(original, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("page", having("python"))
def test_python_blocks_run(page, users_folder):
    """In order, in one namespace, as a reader would type them."""
    names: dict = {"__name__": "page"}
    for block in blocks(page, "python"):
        exec(compile("\n" * block.line + block.text, str(page), "exec"), names)


def command_lines(text: str) -> list[list[str]]:
    lines = (shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines())
    return [line for line in lines if line]


@pytest.mark.parametrize("page", having("bash"))
def test_command_lines_can_be_typed(page, users_folder, monkeypatch):
    monkeypatch.setattr("hf_robust.scripting.run.run", read_command_line)
    for block in blocks(page, "bash"):
        for words in command_lines(block.text):
            check_command(words)


def read_command_line(main, *types, defaults=None, **settings):
    """In the place of what would run a script."""
    parse_arguments(types, defaults)


def check_command(words: list[str]) -> None:
    """Commands are read by their own parsers, and nothing else is shown than what is here."""
    if words[:2] == ["accelerate", "launch"]:
        start = next(place for place, word in enumerate(words) if word == "-m" or word.endswith(".py"))
        return check_command(["python", *words[start:]])
    if words[:3] == ["python", "-m", "hf_robust"]:
        return check_command(["hf-robust", *words[3:]])
    if words[0] == "hf-robust":
        assert words[1] in COMMANDS
        parse_arguments(import_module(f"hf_robust.commands.{words[1]}").TYPES, flags=words[2:])
    elif words[0] == "make":
        assert {*words[1:]} <= TARGETS
    elif words[0] == "python":
        with patch("sys.argv", words[1:]):
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    else:
        assert words[:2] == ["pip", "install"] and re.fullmatch(r"hf_robust(\[[a-z]+\])?|\.", words[2])


@pytest.mark.parametrize("page", having("yaml"))
def test_yaml_is_read_as_configs_are(page):
    for block in blocks(page, "yaml"):
        assert isinstance(parse_yaml(block.text, f"{name_of(page)}, line {block.line}"), dict)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_says_what_it_is(page):
    """Else it is run by nobody."""
    assert {block.language for block in blocks(page)} <= {*RUNNERS, *OUTPUTS}
