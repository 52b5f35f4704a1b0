# SPDX-License-Identifier: Apache-2.0
"""What would make a training or an evaluation worthless, found before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import datasets
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import ProcessorMixin, TrainingArguments

from ..data.columns import IMAGE_EMBEDS, KINDS, no_column
from ..data.rows import LabelledStream
from ..encoders.pretrained import ADAPTERS, check_vision_is_pretrained
from ..errors import ConfigError
from ..tasks.task import Rows, Task
from ..tuners.matching import check_adapter_name
from ..tuners.saft import saft_unselected
from .arguments import RobustTrainingArguments

SIXTEEN_BITS = (torch.float16, torch.bfloat16)
MOST_SHOWN = 3  # names in a message


def check_arguments(args: Any, processing_class: Any) -> None:
    """Refuses what `RobustTrainer` cannot be built with.

    Args:
        args: the training arguments.
        processing_class: the processor.

    Raises:
        ConfigError: they are of another type, or several GPUs would be used by one process.
    """
    if not isinstance(args, RobustTrainingArguments):
        remedy = "It takes all that TrainingArguments takes."
        got, allowed = type(args).__name__, "RobustTrainingArguments"
        raise ConfigError("not the arguments of RobustTrainer", where="args", got=got, allowed=allowed, remedy=remedy)
    if not isinstance(processing_class, ProcessorMixin):
        remedy = "Load it with AutoProcessor.from_pretrained(name), for the same name as the model."
        got, allowed = type(processing_class).__name__, "a processor of images and texts"
        what = "RobustTrainer needs the model's processor"
        raise ConfigError(what, where="processing_class", got=got, allowed=allowed, remedy=remedy)
    if args.n_gpu > 1:
        remedy = "Start the script with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one."
        raise ConfigError("one process cannot train on several GPUs", got=args.n_gpu, allowed="1", remedy=remedy)


def lacks_targets(rows: Rows) -> bool:
    """Returns whether rows are known to have nothing beside their images, which can be predicted alone.

    Args:
        rows: what `labelled_images` returned.
    """
    return rows.columns is not None and rows.columns.label is None


def check_targets(rows: Rows) -> None:
    """Refuses a set whose rows have nothing beside their images.

    Args:
        rows: what `labelled_images` returned.

    Raises:
        DataError: there is no column of it.
    """
    if lacks_targets(rows):
        raise no_column(KINDS[rows.target or "label"], columns_of(rows), rows.name)


def check_length(rows: Rows, args: TrainingArguments) -> None:
    """Refuses a training set without length for a training that is as long as it.

    Args:
        rows: what `labelled_images` returned.
        args: the training arguments.

    Raises:
        ConfigError: there is no number of steps.
    """
    if isinstance(rows, LabelledStream) and args.max_steps <= 0:
        what, remedy = "a dataset without length has no epochs to count", "Set max_steps."
        raise ConfigError(what, where="max_steps", got=args.max_steps, allowed="a number of steps", remedy=remedy)


def check_rows(rows: Rows, task: Task, targets: bool = True) -> None:
    """Refuses a set that cannot be trained or evaluated on; what a foreign dataset holds, the collator checks.

    Args:
        rows: what `labelled_images` returned.
        task: the task it is for.
        targets: whether its rows must say what is right.

    Raises:
        DataError: it lacks labels, or has one outside its classes.
        ConfigError: it has embeddings in the place of images, for a vision tower that is trained.
    """
    if targets:
        check_targets(rows)
    task.check_rows(rows, targets)
    if IMAGE_EMBEDS in columns_of(rows):
        check_vision_is_pretrained(task.model, f"{rows.name} has image embeddings in the place of images")


def check_trained(task: Task) -> None:
    """Refuses to train weights from which nothing would come, or not what was meant.

    Args:
        task: the task to train.

    Raises:
        ConfigError: nothing is trained, an adapter is frozen or merged, its name is none of a folder, weights are
            trained beside it, or weights of 16 bits are trained themselves.
    """
    for name in task.model.peft_config if isinstance(task.model, PeftModel) else ():
        check_adapter_name(name)  # of a stock method; those of this package have looked
    if saft_unselected(task.model):  # a checkpoint to resume from brings the entries
        return
    trained = {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}
    if not trained:
        _check_adapter(task.model, {})
        remedy = "Call model.requires_grad_(True), or add an adapter."
        raise ConfigError("no weight of the model is trained", where=f"task={task.name!r}", remedy=remedy)
    _check_adapter(task.model, trained)
    if isinstance(task.model, PeftModel):
        _check_beside(task.model)
    if task.trains_encoder and not any(name.startswith("model.") for name in trained):
        what, remedy = "only the head would be trained, which no evaluation uses", "Train the vision tower."
        raise ConfigError(what, where=f"task={task.name!r}", got=[*trained][:MOST_SHOWN], remedy=remedy)
    small = [name for name, parameter in trained.items() if parameter.dtype in SIXTEEN_BITS]
    if small:
        what = f"weights of 16 bits are trained, which lose most updates: {', '.join(small[:MOST_SHOWN])}"
        remedy = "Load the model with from_pretrained(..., dtype=torch.float32); bf16=True still computes in 16 bits."
        raise ConfigError(what, got=str(trained[small[0]].dtype), allowed="torch.float32", remedy=remedy)


def _check_adapter(encoder: nn.Module, trained: Mapping[str, Any]) -> None:
    merged = [n for n, module in encoder.named_modules() if isinstance(module, ADAPTERS) and module.merged_adapters]
    if merged:
        remedy = "Call unmerge_adapter() first."
        raise ConfigError("adapters are merged, so they get no gradient", where=merged[0], remedy=remedy)
    has_adapter = any(isinstance(module, ADAPTERS) for module in encoder.modules())
    if has_adapter and not any(name.startswith("model.") for name in trained):
        what = "the adapter is frozen" + (", only the head beside it would be trained" if trained else "")
        remedy = (
            "Load it with PeftModel.from_pretrained(..., is_trainable=True); an adapter of the text tower alone needs "
            "head='live'. To train a head on it as it is, merge it first: model.merge_and_unload()."
        )
        raise ConfigError(what, remedy=remedy)


def _check_beside(encoder: PeftModel) -> None:
    """Refuses weights beside the adapters, which are trained but that no file of an adapter would hold."""
    inside = {id(p) for module in encoder.modules() if isinstance(module, ADAPTERS) for p in module.parameters()}
    biases = any(vars(config).get("bias", "none") != "none" for config in encoder.peft_config.values())
    beside = [
        name
        for name, p in encoder.named_parameters()
        if p.requires_grad and (id(p) not in inside or ".base_layer." in name or ".original_module." in name)
    ]
    beside = [name for name in beside if not (biases and name.endswith("bias"))]  # which PEFT saves
    if beside:
        what = f"weights are trained beside the adapter, which it is saved without: {', '.join(beside[:MOST_SHOWN])}"
        raise ConfigError(what, remedy="Freeze them, or name their modules in the adapter's modules_to_save.")


def check_metrics(
    compute_metrics: Callable[..., dict[str, float]] | None, preprocess: Callable[..., Tensor] | None
) -> None:
    """Refuses to change the logits that the task's own metrics need.

    Args:
        compute_metrics: what the user gave.
        preprocess: what the user gave as `preprocess_logits_for_metrics`.

    Raises:
        ConfigError: there is a function for the logits, and none for the metrics.
    """
    if preprocess is not None and compute_metrics is None:
        remedy = "Pass compute_metrics, which gets what it returns."
        what = "accuracy and loss are computed from logits"
        raise ConfigError(what, where="preprocess_logits_for_metrics", remedy=remedy)


def check_best_metric(args: RobustTrainingArguments, eval_dataset: Any, task: Task, own_metrics: bool) -> None:
    """Refuses a metric for the best checkpoint, or for a schedule, that no evaluation will give.

    Args:
        args: the training arguments.
        eval_dataset: the evaluation set, or several by name.
        task: says what an evaluation gives.
        own_metrics: whether `compute_metrics` is the user's, whose names are not known.

    Raises:
        ConfigError: there will be no such metric.
    """
    if args.metric_for_best_model is None or args.eval_strategy == "no" or eval_dataset is None:
        return
    metric = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    prefixes = [f"eval_{name}_" for name in eval_dataset] if isinstance(eval_dataset, Mapping) else ["eval_"]
    known = [prefix + name for prefix in prefixes for name in task.metrics]
    no_loss = own_metrics and not task.batch_loss
    is_own = own_metrics and metric.startswith(tuple(prefixes))
    if no_loss and metric in [f"{prefix}loss" for prefix in prefixes]:
        remedy = "Let compute_metrics return it, or do without compute_metrics."
        raise ConfigError(
            "with compute_metrics the task has no loss of a set", where="metric_for_best_model", remedy=remedy
        )
    if metric not in known and not is_own:
        allowed, got = ", ".join(known), args.metric_for_best_model
        raise ConfigError("no evaluation gives the metric", where="metric_for_best_model", got=got, allowed=allowed)


def columns_of(rows: Rows) -> list[str]:
    """Returns the names of a set's columns; none where they show only when a row is read.

    Args:
        rows: what `labelled_images` returned.
    """
    if isinstance(rows.rows, datasets.Dataset):
        return rows.rows.column_names
    return list(getattr(rows.rows, "features", None) or ())
