# SPDX-License-Identifier: Apache-2.0
"""Which towers a training moves: a term that holds one that stays would be zero for ever."""

from __future__ import annotations

from typing import Literal

from torch import nn

from ..encoders.dual_encoder import base_model, tower_modules
from ..encoders.pretrained import ADAPTERS
from ..errors import ConfigError
from ..tasks.task import Task


def learns(model: nn.Module, tower: Literal["vision", "text"]) -> bool:
    """Returns whether weights of a tower are trained, or it has adapters.

    Args:
        model: a dual encoder, plain or wrapped by PEFT.
        tower: `"vision"` or `"text"`.
    """
    parts = [base_model(model).get_submodule(name) for name in tower_modules(model, tower)]
    trained = any(parameter.requires_grad for part in parts for parameter in part.parameters())
    return trained or any(isinstance(one, ADAPTERS) for part in parts for one in part.modules())  # SAFT's may be empty


def check_images_move(task: Task, name: str) -> None:
    """Refuses a task whose vision tower is not trained, for a term that holds what it gives.

    Args:
        task: the task.
        name: of the term.

    Raises:
        ConfigError: what the tower gives cannot move.
    """
    if not learns(task.model, "vision"):
        what = "the vision tower is not trained, so what it gives cannot move"
        remedy = "Do without this loss, or train the vision tower."
        raise ConfigError(what, where=f"losses, {name}", got=type(task.model).__name__, remedy=remedy)
