# SPDX-License-Identifier: Apache-2.0
"""What would make a training or an evaluation worthless, found before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import ProcessorMixin

from ..data.columns import IMAGE_EMBEDS, no_column
from ..data.labels import check_labels
from ..data.rows import LabelledImages, LabelledStream
from ..encoders.pretrained import ADAPTERS, check_vision_is_pretrained
from ..errors import ConfigError, DataError
from ..tasks.class_names import ZeroShotClassifier
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


def check_rows(rows: LabelledImages | LabelledStream, classifier: ZeroShotClassifier, labels: bool = True) -> None:
    """Refuses a set that cannot be trained or evaluated on; what a foreign dataset holds, the collator checks.

    Args:
        rows: what `labelled_images` returned.
        classifier: the classifier it is for.
        labels: whether it needs labels.

    Raises:
        DataError: it lacks labels, or has one outside its classes.
        ConfigError: it has embeddings in the place of images, for a vision tower that is trained.
    """
    if labels and rows.columns is not None and rows.columns.label is None:
        raise no_column("label", columns_of(rows), rows.name)
    if isinstance(rows, LabelledImages) and rows.shown_labels is not None:
        check_labels(rows.shown_labels, len(rows.class_names or classifier.class_names), rows.name)
    names = classifier.class_space.data_names
    if names is not None and isinstance(rows.rows, datasets.IterableDataset) and rows.rows.features is None:
        what = "a stream without features does not say which classes its labels mean"
        raise DataError(
            what, where=rows.name, remedy="Use dataset.map(..., features=...), or from_generator likewise."
        )
    if rows.class_names is None and names is not None and all(map(str.isdecimal, names)):
        if [int(name) for name in names] != list(range(len(names))):
            what = "labels without names, for classes that are numbers in another order"
            remedy = "Give the labels their names: dataset.cast_column('label', ClassLabel(names=...)), or text."
            raise DataError(what, where=rows.name, got=list(names)[:MOST_SHOWN], remedy=remedy)
    if IMAGE_EMBEDS in columns_of(rows):
        check_vision_is_pretrained(classifier.model, f"{rows.name} has image embeddings in the place of images")


def check_training(classifier: ZeroShotClassifier, rows: LabelledImages | LabelledStream) -> None:
    """Refuses a training from which nothing would come, or not what was meant.

    Args:
        classifier: the classifier to train.
        rows: the training set.

    Raises:
        ConfigError: nothing is trained, an adapter is frozen, its name is none of a folder, weights are trained
            beside it, or weights of 16 bits are trained themselves.
        DataError: there is one class alone.
    """
    names = rows.class_names
    if names is not None and classifier.class_space.relate(names).kind != "same":
        allowed = ", ".join(map(repr, classifier.class_space.data_names or classifier.class_names))
        what = "the training set has other classes than the classifier, or in another order"
        raise DataError(what, where=rows.name, got=names, allowed=allowed, remedy="Build a new RobustTrainer for it.")
    labels = rows.shown_labels if isinstance(rows, LabelledImages) else None
    found = len(classifier.class_names) if labels is None else len(np.unique(labels))
    if found < 2:
        what = "there is nothing to tell apart: all images are of one class"
        raise DataError(what, where=rows.name, got=found, allowed="2 classes or more")
    for name in classifier.model.peft_config if isinstance(classifier.model, PeftModel) else ():
        check_adapter_name(name)  # of a stock method; those of this package have looked
    if saft_unselected(classifier.model):  # a checkpoint to resume from brings the entries
        return
    trained = {name: parameter for name, parameter in classifier.named_parameters() if parameter.requires_grad}
    if not trained:
        _check_adapter(classifier.model, {})
        remedy = "Call model.requires_grad_(True), or add an adapter."
        raise ConfigError("no weight of the model is trained", where=f"head={classifier.head!r}", remedy=remedy)
    _check_adapter(classifier.model, trained)
    if isinstance(classifier.model, PeftModel):
        _check_beside(classifier.model)
    small = [name for name, parameter in trained.items() if parameter.dtype in SIXTEEN_BITS]
    if small:
        what = f"weights of 16 bits are trained, which lose most updates: {', '.join(small[:MOST_SHOWN])}"
        remedy = "Load the model with from_pretrained(..., dtype=torch.float32); bf16=True still computes in 16 bits."
        raise ConfigError(what, got=str(trained[small[0]].dtype), allowed="torch.float32", remedy=remedy)


def _check_adapter(encoder: nn.Module, trained: Mapping[str, Any]) -> None:
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


def check_best_metric(args: RobustTrainingArguments, eval_dataset: Any, own_metrics: bool) -> None:
    """Refuses a metric for the best checkpoint, or for a schedule, that no evaluation will give.

    Args:
        args: the training arguments.
        eval_dataset: the evaluation set, or several by name.
        own_metrics: whether `compute_metrics` is the user's, whose names are not known.

    Raises:
        ConfigError: there will be no such metric.
    """
    if args.metric_for_best_model is None or args.eval_strategy == "no" or eval_dataset is None:
        return
    metric = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    prefixes = [f"eval_{name}_" for name in eval_dataset] if isinstance(eval_dataset, Mapping) else ["eval_"]
    known = [prefix + name for prefix in prefixes for name in ("accuracy", "loss")]
    if metric not in known and not (own_metrics and metric.startswith(tuple(prefixes))):
        allowed, got = ", ".join(known), args.metric_for_best_model
        raise ConfigError("no evaluation gives the metric", where="metric_for_best_model", got=got, allowed=allowed)


def columns_of(rows: LabelledImages | LabelledStream) -> list[str]:
    """Returns the names of a set's columns; none where they show only when a row is read.

    Args:
        rows: what `labelled_images` returned.
    """
    if isinstance(rows.rows, datasets.Dataset):
        return rows.rows.column_names
    return list(getattr(rows.rows, "features", None) or ())
