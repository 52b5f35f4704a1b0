# SPDX-License-Identifier: Apache-2.0
"""The command line of a script: a config file, and flags that win over it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from ..data.yaml_files import read_yaml
from ..errors import ConfigError, HfRobustError
from .help import TRAINING_GROUPS, HelpAll, HelpFormatter


def setting(default: Any, help: str, group: str | None = None, positional: bool = False) -> Any:
    """Returns the field of a setting in a dataclass that `parse_arguments` reads.

    Args:
        default: its value; a list is copied for every instance.
        help: a sentence.
        group: of the help that it is shown in.
        positional: whether it is given without its name, before all flags.

    Example:
        >>> @dataclass
        ... class Arguments:
        ...     data: str | None = setting(None, "Images to train on.", "data", positional=True)
    """
    metadata: dict[str, Any] = {"help": help, **({"group": group} if group else {})}
    metadata |= {"positional": True} if positional else {}
    if isinstance(default, list):
        return field(default_factory=lambda: [*default], metadata=metadata)
    return field(default=default, metadata=metadata)


class Parser(HfArgumentParser):
    """A parser that raises instead of printing its usage and leaving, and whose help a person can read.

    See `setting` for what fields may say of themselves. Options of `TrainingArguments` that few people change are
    shown by `--help_all` alone.

    Args:
        types: dataclasses; their fields are the settings.
        program: what it is called in its help.
        example: a command line, for the help.
    """

    def __init__(self, types: Sequence[Any], program: str | None = None, example: str | None = None) -> None:
        self.seldom: list[tuple[argparse.Action, str | None]] = []
        self.group_of = {name: title for title, names in TRAINING_GROUPS.items() for name in names}
        self.hidden = {one.name for one in fields(TrainingArguments)} - self.group_of.keys()
        text = {"description": types[0].__doc__.splitlines()[0], "epilog": example and f"example: {example}"}
        how: Any = {"formatter_class": HelpFormatter, "add_help": False, "allow_abbrev": False}
        super().__init__(types, prog=program, **text, **how)
        self.add_argument("--config", help="YAML file with settings by name; flags win.")
        self.add_argument("-h", "--help", action="help", help="Show this; --debug shows the traceback of an error.")
        if self.seldom:
            self.add_argument("--help_all", action=HelpAll, help="Show the other options of TrainingArguments, too.")
        self.positionals = [action.dest for action in self._get_positional_actions()]
        self.usage = f"%(prog)s{''.join(f' [{name.upper()}]' for name in self.positionals)} [--setting value …]"

    def add_argument(self, *names: Any, group: str | None = None, positional: bool = False, **options: Any) -> Any:
        """Adds an argument to its group of the help.

        Args:
            *names: its flags.
            group: title of the group.
            positional: whether it is given without a flag.
            **options: as in `argparse`.
        """
        name = names[0].lstrip("-")
        group = group or self.group_of.get(name.removeprefix("no_"))
        place: Any = super() if group is None else self._group(group)
        if positional:
            options["nargs"] = "*" if options.get("nargs") else "?"
            return place.add_argument(name, **options)
        if options.get("type") is string_to_bool and "nargs" not in options:  # bool or None
            options |= {"nargs": "?", "const": True}
        action = place.add_argument(*names, **options)
        if name.startswith("no_"):
            action.help = f"Turns this off: {action.help}"
        elif options.get("default") is True:  # of no use but in scripts
            action.help = argparse.SUPPRESS
        if name.removeprefix("no_") in self.hidden:
            self.seldom.append((action, action.help))
            action.help = argparse.SUPPRESS
        return action

    def _group(self, title: str) -> Any:
        found = [group for group in self._action_groups if group.title == title]
        return found[0] if found else self.add_argument_group(title)

    def error(self, message: str) -> NoReturn:
        """Raises what argparse would print.

        Args:
            message: what is wrong.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(message)


def parse_arguments(
    types: Sequence[Any],
    defaults: Mapping[str, Any] | None = None,
    flags: Sequence[str] | None = None,
    program: str | None = None,
    example: str | None = None,
) -> tuple[Any, ...]:
    """Reads the config file that `--config` names, then the flags.

    What the file says is read as a flag of the same words would be: `1e-3`, which is text in YAML, becomes a number
    where a number is needed.

    Args:
        types: dataclasses; their fields are the settings.
        defaults: of the script, where they are not those of the dataclasses.
        flags: the command line; by default that of the program.
        program: what it is called in its help; by default the file's name.
        example: a command line, for the help.

    Returns:
        An instance of each type.

    Raises:
        ConfigError: an unknown, abbreviated or wrong flag; a config file that cannot be read, or has an unknown or
            wrong setting; or what the dataclasses raise.

    Example:
        >>> parse_arguments([ScriptArguments], flags=["--config", "my.yaml", "--seed", "1"])
        (ScriptArguments(seed=1),)
    """
    parser = Parser(types, program, example)
    parser.set_defaults(**(defaults or {}))
    names = [one.name for of_type in types for one in fields(of_type) if one.init]
    given, unknown = parser.parse_known_args(flags)
    if unknown:
        flag = unknown[0].partition("=")[0]
        name, known = flag.lstrip("-").replace("-", "_"), [one for one in names if one not in parser.positionals]
        remedy = _closest(name, [*known, "config", "debug"], "--")
        if name in parser.positionals:
            remedy = "Give it first, without a flag."
        raise ConfigError("unknown flag" if flag[:1] == "-" else "value of no flag", got=flag, remedy=remedy)
    if given.config:
        parser.set_defaults(**_read_config(given.config, types, names, parser))
    try:
        found = parser.parse_args_into_dataclasses(flags, True, look_for_args_file=False)
    except HfRobustError:
        raise
    except ValueError as error:  # of the dataclasses: TrainingArguments that do not go together
        raise ConfigError(str(error)) from error
    return tuple(found[: len(types)])


def _closest(name: str, known: Sequence[str], prefix: str = "") -> str:
    starting = [one for one in known if one.startswith(name)]
    matches = get_close_matches(name, known) if not starting else starting[:3]
    return f"Did you mean {', '.join(repr(prefix + one) for one in matches)}?" if matches else "--help lists them."


def _read_config(file: str, types: Sequence[Any], names: Sequence[str], parser: Parser) -> dict[str, Any]:
    settings = read_yaml(Path(file))
    if not isinstance(settings, dict):
        raise ConfigError("config file has no settings", where=file, got=settings, allowed="lines `name: value`")
    for name in settings:
        if name not in names:
            raise ConfigError("unknown setting", where=file, got=name, remedy=_closest(str(name), names))
    hints: dict[str, Any] = {}
    for of_type in types:
        hints |= get_type_hints(of_type)
    return {name: _converted(name, value, hints[name], file, parser) for name, value in settings.items()}


def _converted(name: str, value: Any, hint: Any, file: str, parser: Parser) -> Any:
    """What the flag `--name value` would give; some values have no flag."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = {get_origin(member) or member for member in members}
    if isinstance(value, list) and {list, str} <= kinds:  # the flag takes text alone
        return value
    if value is None or isinstance(value, dict):
        if type(value) in kinds:
            return value
        missing = "no value" if value is None else value
        raise ConfigError("wrong value", where=f"{name} in {file}", got=missing, remedy="Leave the line out.")
    if name in parser.positionals:
        values = [str(one) for one in (value if isinstance(value, list) else [value])]
        return values if list in kinds else values[0]
    flags = [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    try:
        return getattr(parser.parse_args(flags), name)
    except ConfigError as error:
        raise ConfigError("wrong value", where=f"{name} in {file}", got=value, remedy=f"{error}.") from error
