# SPDX-License-Identifier: Apache-2.0
"""What scripts check before they start."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError, close_matches
from ..training.arguments import RobustTrainingArguments


def check_given(args: Any, *names: str) -> None:
    """Refuses settings that are missing.

    Args:
        args: a script's arguments.
        *names: those it needs.

    Raises:
        ConfigError: one is None or empty.

    Example:
        >>> check_given(args, "train_data", "test_data")
    """
    positional = {one.name for one in fields(args) if one.metadata.get("positional")}
    for name in names:
        if not getattr(args, name):
            remedy = "Give it first, without a flag; see --help." if name in positional else f"Set --{name}."
            raise ConfigError("not given", where=name, remedy=remedy)


def check_file(path: str | None, where: str) -> None:
    """Refuses a file to write that cannot be one, before what it will hold is computed.

    Args:
        path: the file; None for none.
        where: the setting.

    Raises:
        ConfigError: it is a folder, or lies in what is none.

    Example:
        >>> check_file("runs/results.json", "output")
    """
    if path is None:
        return
    if Path(path).is_dir():
        raise ConfigError("it is a folder", where=where, got=path, allowed="a file")
    nearest = next(parent for parent in Path(path).absolute().parents if parent.exists())
    if not nearest.is_dir():
        raise ConfigError("no file can be written there", where=where, got=path, allowed="a file in a folder")


def check_training(training_args: RobustTrainingArguments, fixed: Mapping[str, Any], own: Mapping[str, str]) -> None:
    """Refuses training arguments that a script sets itself.

    Args:
        training_args: as they were read.
        fixed: values that have to be, by name.
        own: the script's own settings that stand in the place of an argument, by its name.

    Raises:
        ConfigError: one was set.

    Example:
        >>> check_training(training_args, {"save_strategy": "no"}, {"seed": "seeds"})
    """
    for name, ours in own.items():
        if getattr(training_args, name) != getattr(RobustTrainingArguments, name):
            raise ConfigError("not a setting of this script", where=name, remedy=f"Set {ours}.")
    for name, value in fixed.items():
        got = getattr(training_args, name)
        if got != value:
            raise ConfigError("cannot be changed here", where=name, got=got, allowed=repr(value))


def check_values(methods: Sequence[str], known: Iterable[str], **lists: Sequence[Any]) -> None:
    """Refuses unknown methods, and lists that are empty or hold a value twice.

    Args:
        methods: chosen by the user.
        known: those there are.
        lists: other lists by name.

    Raises:
        ConfigError: there is one.

    Example:
        >>> check_values(["saft"], ["saft", "lora"], seeds=[1, 2])
    """
    for method in methods:
        if method not in known:
            raise ConfigError("unknown method", got=method, remedy=close_matches(method, list(known)))
    for name, values in {"methods": methods, **lists}.items():
        if len(values) == 0 or len(set(values)) < len(values):
            raise ConfigError(f"{name} are empty or repeated", got=values, allowed="at least one, each once")


def check_same_settings(found: Mapping[str, Any], expected: Mapping[str, Any], file: Path) -> None:
    """Refuses to go on with results of other settings.

    Args:
        found: sections of settings, as read from the file; it may hold more.
        expected: those of this call.
        file: where they were found.

    Raises:
        ConfigError: a setting differs.

    Example:
        >>> check_same_settings({"config": {"seed": 1}}, {"config": {"seed": 1}}, Path("results.json"))
    """
    pairs = [(part, name) for part, settings in expected.items() for name in settings]
    changed = [f"{part}.{name}" for part, name in pairs if found[part].get(name) != expected[part][name]]
    if changed:
        remedy = "Set another output_dir, or remove what is there."
        raise ConfigError("results are of other settings", where=str(file), got=changed, remedy=remedy)
