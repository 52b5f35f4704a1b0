# SPDX-License-Identifier: Apache-2.0
"""The command `hf-robust`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

COMMANDS = {
    "train": "fine-tune a model; see what it gained and cost",
    "evaluate": "a model and its base on several sets",
    "compare": "all methods on one task, over several seeds",
    "difficulty": "how hard a task is; which method to start with",
    "merge": "WiSE-FT and soups of models on disk",
    "predict": "classify images",
    "check": "look whether a saved adapter is whole",
}
DESCRIPTION = "Fine-tune CLIP-like models so that they do not forget."
EPILOG = """example: hf-robust train photos
More on each: hf-robust COMMAND --help"""
SHELLS = ("bash", "zsh", "tcsh")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line `hf-robust COMMAND …`.

    A command's module is imported when it is called.

    Args:
        arguments: of the command line; by default those of the process.

    Raises:
        SystemExit: with status 2, where the command line or what it names is wrong.

    Example:
        >>> main(["check", "runs/saft"])
        runs/saft: whole
        ...
    """
    name, *flags = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name not in COMMANDS:
        return _without_command([name, *flags])
    from .scripting.run import run

    command = _module(name)
    run(command.main, *command.TYPES, flags=flags, program=f"hf-robust {name}", example=command.EXAMPLE)


def _module(name: str) -> ModuleType:
    return import_module(f".commands.{name}", __package__)


def _without_command(flags: Sequence[str]) -> None:
    """Shows the help, writes what completes commands in a shell, or says what is wrong."""
    text: Any = {"description": DESCRIPTION, "epilog": EPILOG, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("hf-robust", "%(prog)s COMMAND …", allow_abbrev=False, **text)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, help in COMMANDS.items():
        commands.add_parser(name, help=help)
    completion = 'for a shell to complete commands: eval "$(hf-robust --completion bash)"'
    parser.add_argument("--completion", choices=SHELLS, help=completion)
    if flags[:1] == ["--completion"] and flags[1:] and flags[1] in SHELLS:
        print(_completion(flags[1]))
        return
    parser.parse_args(flags)


def _completion(shell: str) -> str:
    import shtab

    from .scripting.arguments import Parser

    whole = argparse.ArgumentParser(prog="hf-robust")
    commands = whole.add_subparsers(parser_class=argparse.ArgumentParser)
    for name, help in COMMANDS.items():
        parser = Parser(_module(name).TYPES, f"hf-robust {name}")
        for action in parser._actions:
            if not action.option_strings or action.dest in ("config", "output_dir", "output"):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        commands.add_parser(name, help=help, parents=[parser], add_help=False)
    return shtab.complete(whole, shell)
