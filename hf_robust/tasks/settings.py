# SPDX-License-Identifier: Apache-2.0
"""The settings of a task, as arguments, config files and flags have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..errors import ConfigError


def task_settings(given: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the settings of the task that is meant.

    Args:
        given: a name, or a mapping from it to the settings, see `RobustTrainingArguments`.

    Raises:
        ConfigError: they are no mapping.

    Example:
        >>> task_settings({"class_names": {"text_chunk_size": 64}})
        {'text_chunk_size': 64}
    """
    settings = next(iter(given.values()), None) if isinstance(given, Mapping) else {}
    if not isinstance(settings, Mapping):
        allowed = "{name: {setting: value, …}}"
        raise ConfigError("settings of a task are no mapping", where="task", got=given, allowed=allowed)
    return dict(settings)


def check_no_words(class_names: Any, args: Any, task: str) -> None:
    """Refuses settings of class names for a task without any.

    Args:
        class_names: what the user gave.
        args: the `RobustTrainingArguments`.
        task: its name.

    Raises:
        ConfigError: there are any.
    """
    defaults = {field.name: field.default for field in fields(args)}
    given = {"class_names": class_names} if class_names is not None else {}
    given |= {n: getattr(args, n) for n in ("templates", "head") if getattr(args, n) != defaults[n]}
    if given:
        what, remedy = f"{task} have no class names in words", "Leave it out."
        raise ConfigError(what, where=", ".join(given), got=[*given.values()], remedy=remedy)
