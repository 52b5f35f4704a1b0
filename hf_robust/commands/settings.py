# SPDX-License-Identifier: Apache-2.0
"""What trainings begin with in every command."""

from __future__ import annotations

from dataclasses import dataclass

from ..scripting.arguments import setting
from ..training.arguments import RobustTrainingArguments


@dataclass
class CommandSettings(RobustTrainingArguments):
    """`RobustTrainingArguments` as commands begin with them."""

    num_train_epochs: float = setting(5.0, "Passes over the training data.")
    per_device_train_batch_size: int = setting(32, "Images in a step, per device.")
    per_device_eval_batch_size: int = setting(64, "Images evaluated at once, per device.")
    lr_scheduler_type: str = setting("cosine", "How the learning rate falls.")
    warmup_steps: float = setting(0.1, "In which it rises; below 1: share of all steps.")
    logging_steps: float = setting(10, "The progress bar shows the loss so often.")
