# SPDX-License-Identifier: Apache-2.0
"""The arguments of `RobustTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import TrainingArguments

from .errors import ConfigError


@dataclass
class RobustTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with what a `ZeroShotClassifier` and SAFT need.

    > Parameters that control the classifier

    Args:
        templates: prompt templates of the class names: a key of `hf_robust.zero_shot.TEMPLATES`, or one template with
            `{}` in the place of the class name.
        head: `"live"` encodes the class prompts in every training step, `"frozen"` once before training,
            `"trainable"` starts a linear layer from them.

    > Parameters that control SAFT

    Args:
        selection_batch_size: images in a batch of the pass that selects SAFT's entries. It changes speed and memory,
            not the entries.

    > [!NOTE]
    > These defaults differ from `TrainingArguments`: `remove_unused_columns=False` (it would drop the images),
    > `ddp_broadcast_buffers=False` (no buffer changes in training), `report_to="none"`, `logging_nan_inf_filter=False`
    > (`RobustTrainer` stops at a loss that is not finite). On a machine without accelerator `use_cpu=True` (else
    > processes that were started together would each train alone) and `dataloader_pin_memory=False`.
    > `label_smoothing_factor` must stay 0.

    Raises:
        ConfigError: for a `label_smoothing_factor`.

    Example:
        >>> args = RobustTrainingArguments("runs/saft", templates="a drawing of a {}.", learning_rate=1e-3)
        >>> args.head, args.selection_batch_size
        ('live', 32)
    """

    templates: str = field(
        default="a photo of a {}.", metadata={"help": "Name of a template set, or one template with {}."}
    )
    head: Literal["live", "frozen", "trainable"] = field(
        default="live", metadata={"help": "How the class names become a classifier head: live, frozen or trainable."}
    )
    selection_batch_size: int = field(
        default=32, metadata={"help": "Images per batch while SAFT's entries are selected."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep False: it would drop the images."})
    ddp_broadcast_buffers: bool | None = field(default=False, metadata={"help": "Send buffers to all ranks."})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "Integrations to report to."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide losses that are not finite."})

    def __post_init__(self) -> None:
        if self.label_smoothing_factor != 0:
            raise ConfigError("label smoothing is not supported", got=self.label_smoothing_factor, allowed="0")
        if not torch.accelerator.is_available():
            self.use_cpu, self.dataloader_pin_memory = True, False
        super().__post_init__()
