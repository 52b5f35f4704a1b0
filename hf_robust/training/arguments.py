# SPDX-License-Identifier: Apache-2.0
"""The arguments of `RobustTrainer`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from ..data.text_files import parse_json
from ..errors import ConfigError
from ..tasks.choose import task_class
from ..tasks.settings import task_settings
from ..tasks.task_loss import check_loss_settings
from .head_first import check_head_first_settings
from .losses import settings_of
from .unsupported import check_options


def check_learning_rate(rate: Any) -> None:
    """Refuses what is no learning rate.

    Args:
        rate: of a training; None for that of its method.

    Raises:
        ConfigError: it is no number from 0.
    """
    is_number = isinstance(rate, int | float) and not isinstance(rate, bool)
    if rate is not None and not (is_number and 0 <= rate < math.inf):
        raise ConfigError("no learning rate", where="learning_rate", got=rate, allowed="a number from 0, or None")


@dataclass
class RobustTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with what tasks, SAFT and terms of the loss need.

    > Parameters that control the task

    Args:
        task: what is learned: a name of `hf_robust.tasks.choose.TASKS`, or a mapping from it to its settings,
            `{"class_names": {"text_chunk_size": 64}}`, on the command line as JSON; None for what the columns of the
            training set say.

    > Parameters that control the head of class names

    Args:
        templates: prompt templates of the class names: a key of `hf_robust.tasks.class_names.TEMPLATES`, or one
            template with `{}` in the place of the class name.
        head: `"live"` encodes the class prompts in every training step, `"frozen"` once before training,
            `"trainable"` starts a linear layer from them.
        head_first_epochs: LP-FT (Kumar et al., ICLR 2022, https://huggingface.co/papers/2202.10054): passes over the
            training set that train a head of the task's own by itself, with the encoder as it was pre-trained, before
            the training, which goes on from there; 0 for none. For `head="trainable"` and for identities. Images are
            embedded once, without augmentation and adapters, and the embeddings kept on disk, see
            `with_image_embeds`, and in CPU memory (2 GB for a million of 512 numbers); epochs look at no image. The
            paper trains it to convergence. It is logged as `head_first_loss`; terms of the loss are no part of it. θ₀,
            from where WiSE-FT interpolates, keeps the zero-shot head. A resumed run does not repeat it.
        head_first_learning_rate: its peak, which falls to 0 along half a cosine; None for `learning_rate`, which is
            rather small for a head alone. Batches, seed, β, ε and weight decay are those of the training, the
            optimizer is AdamW; see `hf_robust.training.head_first.train_head` for what the paper's code does.

    > Parameters that control the data

    Args:
        image_size: height and width of the model's input in pixels, a multiple of the patch size; None as in
            pre-training. The trainer then uses, and saves, its own copy of the processor, see `with_image_size`. Image
            embeddings that stand in the place of images must have been made with such a processor. On a GPU the
            gradient of interpolated positions is not the same bits every time; where positions are trained (not by
            A-CLIP or LoRA), `full_determinism=True` stops there.
        on_bad_image: `"raise"` stops at an image that cannot be used. `"skip"` opens every image of a set once, before
            anything is computed with it, and leaves out those that cannot be used; they are logged, counted in the
            metrics as `skipped_images`, and listed in `trainer.train_dataset.skipped`.

    > Parameters that control the loss

    Args:
        class_weights: weights of the classes in the cross-entropy of training: `"balanced"`, by how many training
            images they have, or a list of one number for every class; scaled such that their mean over the training
            images is 1. See `TaskLoss`. With OGEN they are for real images alone.

    `label_smoothing_factor` is for training, too: evaluation is by the plain cross-entropy.

    > Parameters that control the optimizer

    Args:
        learning_rate: its peak; None for that of the method, see `hf_robust.training.learning_rates.method_rate`:
            methods need rates that are orders of magnitude apart.

    > Parameters that control SAFT

    Args:
        selection_batch_size: images in a batch of the pass that selects SAFT's entries. It changes speed and memory,
            not the entries, where the loss is a mean over images; of pairs it is the images that each is told from.

    > Parameters that control what is added to the loss

    Args:
        losses: terms by name, each with its settings, as `{"similarity": {"weight": 10.0}}`, on the command line as
            JSON: `"similarity"`, see `SimilarityLoss`, and `"ogen"`, see `OGENConfig`. Terms of your own are given to
            the trainer.
        cache_reference_embeddings: embed the training set with the pre-trained model once and keep that on disk,
            instead of in every step, for all terms that compare embeddings of images. In batches of other sizes an
            embedding is rounded otherwise: in float32 the cosine distance of the first step is below 1e-6, without
            cache (and dropout) it is exactly 0.

    > Parameters that control resuming

    Args:
        allow_changed: names of what may differ between a run and the checkpoint that it resumes from, as
            `["num_train_epochs"]`; the error that refuses it tells the names. The result is then not that of the
            uninterrupted run. What the optimizer's saved state has (learning rate, weight decay, β, ε) cannot change.

    `ddp_timeout` is how many seconds ranks wait for one that has stopped, before an error names it. Where the first
    rank works alone for longer, embedding a large training set for a cache, it must be raised.

    > [!NOTE]
    > These defaults differ from `TrainingArguments`: `remove_unused_columns=False` (it would drop the images),
    > `ddp_broadcast_buffers=False` (no buffer changes in training), `report_to="none"`, `logging_nan_inf_filter=False`
    > (`RobustTrainer` stops at a loss that is not finite), `restore_callback_states_from_checkpoint=True` (early
    > stopping goes on counting), `ddp_timeout=600`. On a machine without accelerator `use_cpu=True` (else
    > processes that were started together would each train alone) and `dataloader_pin_memory=False`.
    > Options that are not served are refused, see `hf_robust.training.unsupported`.

    Raises:
        ConfigError: for a setting that is none of the above or is not served.

    Example:
        >>> args = RobustTrainingArguments("runs/saft", templates="a drawing of a {}.", learning_rate=1e-3)
        >>> args.head, args.selection_batch_size
        ('live', 32)
    """

    task: None | str | dict = field(
        default=None, metadata={"help": "What is learned: a task's name, or JSON of it and its settings."}
    )
    templates: str = field(
        default="a photo of a {}.", metadata={"help": "Name of a template set, or one template with {}."}
    )
    head: Literal["live", "frozen", "trainable"] = field(
        default="live", metadata={"help": "How the class names become a classifier head: live, frozen or trainable."}
    )
    head_first_epochs: int = field(
        default=0, metadata={"help": "LP-FT: epochs that train the trainable head alone, before everything."}
    )
    head_first_learning_rate: float | None = field(
        default=None, metadata={"help": "LP-FT: of the head alone; None for learning_rate."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Height and width of the input in pixels; None as in pre-training."}
    )
    on_bad_image: Literal["raise", "skip"] = field(
        default="raise", metadata={"help": "Images that cannot be used: raise an error, or skip them."}
    )
    class_weights: None | str | list[float] = field(
        default=None, metadata={"help": "Weights of the classes in training: balanced, or one number a class."}
    )
    learning_rate: float | None = field(  # type: ignore[assignment]  # a number in every trainer
        default=None, metadata={"help": "Of AdamW, at its peak; default: that of the method."}
    )
    selection_batch_size: int = field(
        default=32, metadata={"help": "Images per batch while SAFT's entries are selected."}
    )
    losses: None | str | dict = field(
        default=None, metadata={"help": "Terms that are added to the loss: JSON of their settings by name."}
    )
    cache_reference_embeddings: bool = field(
        default=False, metadata={"help": "Embed the training set with the pre-trained model once, and keep that."}
    )
    allow_changed: list[str] = field(
        default_factory=list, metadata={"help": "What may differ from the run that is resumed: num_train_epochs data."}
    )
    resume_from_checkpoint: None | str = field(
        default=None, metadata={"help": "For scripts: a checkpoint's folder, or last for the last whole one."}
    )
    ddp_timeout: int = field(default=600, metadata={"help": "Seconds that ranks wait for one that has stopped."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Callbacks, as early stopping, go on where they were."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep False: it would drop the images."})
    ddp_broadcast_buffers: bool | None = field(default=False, metadata={"help": "Send buffers to all ranks."})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "Integrations to report to."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide losses that are not finite."})

    def __post_init__(self) -> None:
        check_options(self)
        if isinstance(self.task, str) and self.task.startswith("{"):
            self.task = parse_json(self.task, "task")
        task_class(self.task, None)
        task_settings(self.task)
        if self.on_bad_image not in ("raise", "skip"):
            allowed = "'raise', 'skip'"
            raise ConfigError("unknown setting", where="on_bad_image", got=self.on_bad_image, allowed=allowed)
        check_learning_rate(self.learning_rate)
        check_loss_settings(self.class_weights, self.label_smoothing_factor)
        check_head_first_settings(self.head_first_epochs, self.head_first_learning_rate)
        self.losses = settings_of(self.losses)
        if not torch.accelerator.is_available():
            self.use_cpu, self.dataloader_pin_memory = True, False
        super().__post_init__()

    @property
    def place_model_on_device(self) -> bool | None:
        """True where `Trainer` would wait for its evaluation to cast the model: here a copy is cast."""
        return True if self.bf16_full_eval or self.fp16_full_eval else super().place_model_on_device
