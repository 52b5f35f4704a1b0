# SPDX-License-Identifier: Apache-2.0
"""The command line of a script: a config file, and flags that win over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from ..data.yaml_files import read_yaml
from ..errors import ConfigError, HfRobustError


class Parser(HfArgumentParser):
    """A parser that raises instead of printing its usage and leaving."""

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
) -> tuple[Any, ...]:
    """Reads the config file that `--config` names, then the flags.

    What the file says is read as a flag of the same words would be: `1e-3`, which is text in YAML, becomes a number
    where a number is needed.

    Args:
        types: dataclasses; their fields are the settings.
        defaults: of the script, where they are not those of the dataclasses.
        flags: the command line; by default that of the program.
        program: what it is called in its help; by default the file's name.

    Returns:
        An instance of each type.

    Raises:
        ConfigError: an unknown, abbreviated or wrong flag; a config file that cannot be read, or has an unknown or
            wrong setting; or what the dataclasses raise.

    Example:
        >>> parse_arguments([ScriptArguments], flags=["--config", "my.yaml", "--seed", "1"])
        (ScriptArguments(seed=1),)
    """
    description = (types[0].__doc__ or "").splitlines()[0]
    parser = Parser(types, prog=program, allow_abbrev=False, description=description)
    parser.add_argument("--config", help="YAML file with settings by name; flags win.")
    parser.set_defaults(**(defaults or {}))
    names = [one.name for of_type in types for one in fields(of_type) if one.init]
    given, unknown = parser.parse_known_args(flags)
    if unknown:
        flag = unknown[0].partition("=")[0]
        remedy = _closest(flag.lstrip("-").replace("-", "_"), [*names, "config", "debug"], "--")
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
    flags = [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    try:
        return getattr(parser.parse_args(flags), name)
    except ConfigError as error:
        raise ConfigError("wrong value", where=f"{name} in {file}", got=value, remedy=f"{error}.") from error
