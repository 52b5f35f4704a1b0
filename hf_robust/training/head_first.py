# SPDX-License-Identifier: Apache-2.0
"""LP-FT: a head is trained by itself, on embeddings of the pre-trained model, before everything is trained from there.

The first stage of Kumar et al. (ICLR 2022, https://huggingface.co/papers/2202.10054). A head that fits the embeddings
before the encoder moves gives gradients that bend these less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from ..data.columns import IMAGE_EMBEDS
from ..data.embeds_cache import is_cacheable
from ..encoders.class_embeds import evaluating
from ..errors import ConfigError, NonFiniteError
from ..tasks.progress import Progress
from ..tasks.task import Batch, Rows, Task
from ..tasks.task_loss import TaskLoss

if TYPE_CHECKING:
    from .arguments import RobustTrainingArguments

WHERE = "head_first_epochs"


def check_head_first_settings(epochs: Any, learning_rate: Any) -> None:
    """Refuses settings of the first stage that are none.

    Args:
        epochs: the setting `head_first_epochs`.
        learning_rate: the setting `head_first_learning_rate`.

    Raises:
        ConfigError: one is out of range, or there is a learning rate for a stage of no epochs.
    """
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
        raise ConfigError("this is no number of epochs", where=WHERE, got=epochs, allowed="integers from 0")
    if learning_rate is None:
        return
    where, is_number = "head_first_learning_rate", isinstance(learning_rate, int | float)
    if not is_number or isinstance(learning_rate, bool) or not 0 < learning_rate < math.inf:
        allowed = "None, or a number above 0"
        raise ConfigError("learning rate is out of range", where=where, got=learning_rate, allowed=allowed)
    if epochs == 0:
        remedy = "Set head_first_epochs, or leave it out."
        raise ConfigError("no head is trained first", where=where, got=learning_rate, remedy=remedy)


def head_parameters(task: Task) -> dict[str, nn.Parameter]:
    """Returns the trained parameters of a head that is a task's own, by name; none where it is made of prompts.

    Args:
        task: of class names or several labels with `head="trainable"`, of identities, or any other.

    Example:
        >>> list(head_parameters(ZeroShotClassifier(clip, processor, ["cat", "dog"], head="trainable")))
        ['class_head.weight', 'class_head.bias']
    """
    if task.settings().get("head", "trainable") != "trainable":  # tasks without class names have no such setting
        return {}
    own = {name: p for name, p in task.named_parameters() if not name.startswith(("model.", "terms."))}
    return {name: parameter for name, parameter in own.items() if parameter.requires_grad}


def check_head_first(task: Task, rows: Rows, collator: Any) -> None:
    """Refuses to train a head first that is not there, or on images that cannot be embedded once.

    Args:
        task: the task to train.
        rows: the training set.
        collator: of its images, without augmentation.

    Raises:
        ConfigError: it is so.
    """
    if not head_parameters(task):
        what, remedy = "the task has no head of its own to train first", "Set head='trainable', or leave it out."
        got = {"task": task.name, "head": task.settings().get("head")}
        allowed = "head='trainable' of class names or several labels, or the task 'identities'"
        raise ConfigError(what, where=WHERE, got=got, allowed=allowed, remedy=remedy)
    if not is_cacheable(rows, collator):
        what = "the head is trained on embeddings of images that are the same every time, and are not embedded yet"
        allowed = "a datasets.Dataset of images, without transform, and an ImageCollator"
        remedy = "An augmentation goes into ImageCollator(processor, transform=...), which this stage does without."
        raise ConfigError(what, where=WHERE, got=type(rows.rows).__name__, allowed=allowed, remedy=remedy)


def whole_set(batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Returns what a set of embedded images has, as one batch.

    Args:
        batches: of the set, in order.

    Example:
        >>> whole_set([{"labels": torch.tensor([0, 1])}, {"labels": torch.tensor([2])}])
        {'labels': tensor([0, 1, 2])}
    """
    found = list(batches)
    return {name: torch.cat([batch[name] for batch in found]) for name in found[0]}


def train_head(
    task: Task,
    data: Mapping[str, Tensor],
    loss: TaskLoss,
    args: RobustTrainingArguments,
    decayed: Collection[str] = (),
    log: Callable[[float], None] | None = None,
) -> None:
    """Trains the head of a task alone, on embeddings: min_W CE(W f_θ₀(x), y).

    By AdamW with the β, ε and weight decay of the arguments, at a rate that falls to 0 along half a cosine, in batches
    of as many images as an optimizer step has, shuffled by the seed; without warm-up, clipping or terms of the loss.
    Every process does the same, none draws from a global generator, and no image is looked at.

    The paper's code fits a logistic regression with L2 penalty (L-BFGS) to standardised features, with the best of
    many penalties on validation data, and then starts from its weights. Here the head starts where it stands, for
    class names zero-shot, and the loss is that of the second stage: with class weights, label smoothing, margins, or
    what a user has put in its place. Optimizer and schedule are a choice of this package.

    Args:
        task: with a head of its own, see `head_parameters`.
        data: `image_embeds` `(images, dim)`, with what else the task takes, all of the training set.
        loss: of the training.
        args: of the training.
        decayed: names of parameters that get weight decay.
        log: called with the mean loss of every epoch.

    Raises:
        NonFiniteError: a loss is NaN or infinite; the head is that of the step before.

    Example:
        >>> args = RobustTrainingArguments("runs/lp-ft", head="trainable", head_first_epochs=10)
        >>> train_head(classifier, {"image_embeds": embeds, "labels": labels}, TaskLoss(), args)
    """
    head, images = head_parameters(task), len(data[IMAGE_EMBEDS])
    like = next(iter(head.values()))
    data = {**data, IMAGE_EMBEDS: data[IMAGE_EMBEDS].to(like.dtype)}  # float32 on disk
    size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    optimizer = _optimizer(head, args, decayed)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, args.head_first_epochs * math.ceil(images / size))
    seed = args.seed if args.data_seed is None else args.data_seed
    generator = Progress(seed=seed).generator("head first")
    with evaluating(task), torch.enable_grad():
        for epoch in range(args.head_first_epochs):
            total = 0.0
            for rows in torch.randperm(images, generator=generator).split(size):  # (batch,)
                batch = {name: tensor[rows].to(like.device) for name, tensor in data.items()}
                value = loss(task(**batch), batch[task.label_names[0]], len(rows), len(rows))
                total += _finite(value, epoch) * len(rows)
                value.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            if log is not None:
                log(total / images)


def _optimizer(
    head: Mapping[str, nn.Parameter], args: RobustTrainingArguments, decayed: Collection[str]
) -> torch.optim.AdamW:
    rate: Any = args.learning_rate if args.head_first_learning_rate is None else args.head_first_learning_rate
    groups = [
        {"params": [p for name, p in head.items() if name in decayed], "weight_decay": args.weight_decay},
        {"params": [p for name, p in head.items() if name not in decayed], "weight_decay": 0.0},
    ]
    betas = args.adam_beta1, args.adam_beta2
    return torch.optim.AdamW([group for group in groups if group["params"]], rate, betas, args.adam_epsilon)


def _finite(loss: Tensor, epoch: int) -> float:
    value = loss.item()
    if not math.isfinite(value):
        remedy = "Lower head_first_learning_rate, or look for broken images."
        raise NonFiniteError(f"loss of the head is {value}", where=f"epoch {epoch + 1} of {WHERE}", remedy=remedy)
    return value
