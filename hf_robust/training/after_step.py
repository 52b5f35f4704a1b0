# SPDX-License-Identifier: Apache-2.0
"""What a task does after every optimizer step."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..tasks.task import Task


class AfterStep(TrainerCallback):
    """Tells a task that its weights have changed, see `Task.after_step`."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tells the task.

        Args:
            args: the training arguments.
            state: of the training.
            control: what to do next.
            kwargs: the model among them.
        """
        task: Task = kwargs["model"]
        task.after_step()
