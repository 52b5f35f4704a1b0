# SPDX-License-Identifier: Apache-2.0
"""Which task a training is of."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from torch import nn

from ..data.columns import Target
from ..errors import ConfigError, close_matches
from .class_names import ZeroShotClassifier
from .flyp import FLYP
from .identities import Identities
from .pairs import ImageTextPairs
from .settings import task_settings
from .several_labels import SeveralLabels
from .task import Rows, Task

FROM_ELSEWHERE = ("model", "processor", "class_names", "templates", "head", "data_names", "identities")
ALL = (ZeroShotClassifier, FLYP, ImageTextPairs, SeveralLabels, Identities)
TASKS: dict[str, type[Task]] = {task.name: task for task in ALL}


def target_of(given: str | Mapping[str, Any] | None, model: nn.Module | None) -> Target | None:
    """Returns what the rows of a training set must have beside their images; None if their columns say it.

    Args:
        given: as in `task_class`.
        model: a task, or a dual encoder that one will be built around; None where it is not known yet.
    """
    if isinstance(model, Task):
        return model.target
    return None if given is None else task_class(given, None).target


def task_class(given: str | Mapping[str, Any] | None, rows: Rows | None) -> type[Task]:
    """Returns the task that is meant.

    Args:
        given: its name, or a mapping from its name to its settings; None for the one that fits the rows.
        rows: the training set, whose columns say what is learned from it where `given` does not.

    Raises:
        ConfigError: there is no such task, or a setting that it does not have.

    Example:
        >>> task_class("class_names", None)
        <class 'hf_robust.tasks.class_names.ZeroShotClassifier'>
    """
    if given is None:
        target = (None if rows is None else rows.target) or "label"
        return next(task for task in TASKS.values() if task.target == target)
    name = next(iter(given), "") if isinstance(given, Mapping) else given
    if not isinstance(name, str) or name not in TASKS or (isinstance(given, Mapping) and len(given) != 1):
        raise ConfigError("unknown task", where="task", got=given, remedy=close_matches(str(name), list(TASKS)))
    known = [one for one in signature(TASKS[name]).parameters if one not in FROM_ELSEWHERE]
    for setting in task_settings(given):
        if setting not in known:
            where, remedy = f"task, {name}", close_matches(str(setting), known)
            raise ConfigError("unknown setting of a task", where=where, got=setting, remedy=remedy)
    return TASKS[name]
