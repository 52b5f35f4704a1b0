# SPDX-License-Identifier: Apache-2.0
"""Which task a training is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, close_matches
from .class_names import ZeroShotClassifier
from .task import Rows, Task

TASKS: dict[str, type[Task]] = {task.name: task for task in (ZeroShotClassifier,)}


def task_class(given: str | Mapping[str, Any] | None, rows: Rows | None) -> type[Task]:
    """Returns the task that is meant.

    Args:
        given: its name, or a mapping from its name to its settings; None for the one that fits the rows.
        rows: the training set, whose columns say what is learned from it where `given` does not.

    Raises:
        ConfigError: there is no such task.

    Example:
        >>> task_class("class_names", None)
        <class 'hf_robust.tasks.class_names.ZeroShotClassifier'>
    """
    if given is None:
        target = "label"
        return next(task for task in TASKS.values() if task.target == target)
    name = next(iter(given), "") if isinstance(given, Mapping) else given
    if name not in TASKS or (isinstance(given, Mapping) and len(given) != 1):
        raise ConfigError("unknown task", where="task", got=given, remedy=close_matches(str(name), list(TASKS)))
    return TASKS[name]
