# SPDX-License-Identifier: Apache-2.0
"""The heads of a classifier with class names: which there are, what they train, what they refuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from torch import Tensor, nn

from ..data.class_spaces import ClassSpace
from ..data.labels import check_labels
from ..data.rows import LabelledImages, LabelledStream
from ..encoders.dual_encoder import base_model, family, tower_modules
from ..errors import AdapterFileError, ConfigError, DataError

MOST_SHOWN = 3  # names in a message


def check_head(head: str, **live_sizes: int | None) -> None:
    """Refuses an unknown head, and settings of the live head for another.

    Args:
        head: `"frozen"`, `"live"` or `"trainable"`.
        live_sizes: settings by name; None for one that is not set.

    Raises:
        ConfigError: it is none of them, or has a setting that it does not use.
    """
    if head not in ("frozen", "live", "trainable"):
        raise ConfigError("unknown head", got=head, allowed="'frozen', 'live', 'trainable'")
    for setting, size in live_sizes.items():
        if size is not None and head != "live":
            what, remedy = f"head={head!r} encodes no prompts in training", "Set head='live', or leave it out."
            raise ConfigError(what, where=setting, got=size, remedy=remedy)


def freeze_unused(model: nn.Module, head: str) -> None:
    """Takes the gradient from parameters that a head does not use, or that cross-entropy cannot teach.

    Args:
        model: a dual encoder, plain or wrapped by PEFT.
        head: `"frozen"`, `"live"` or `"trainable"`.
    """
    base = base_model(model)
    if family(model).logit_bias:  # moves no probability: its gradient is rounding noise, which Adam amplifies
        base.logit_bias.requires_grad_(False)
    if head == "trainable":
        base.logit_scale.requires_grad_(False)
    if head != "live":
        for name in tower_modules(model, "text"):
            base.get_submodule(name).requires_grad_(False)


def check_batch_labels(labels: Tensor, n_classes: int) -> None:
    """Refuses labels that are no class: those of streams and foreign datasets show only in their batches.

    On a GPU, PyTorch would abort without saying which.

    Args:
        labels: `(batch,)`.
        n_classes: of how many.

    Raises:
        DataError: a label is none of them.
    """
    wrong = labels[(labels < 0) | (labels >= n_classes)]
    if len(wrong):
        raise DataError("label is no class", where="labels", got=int(wrong[0]), allowed=f"0 to {n_classes - 1}")


def check_class_rows(rows: LabelledImages | LabelledStream, space: ClassSpace) -> None:
    """Refuses a set with a label outside its classes, or of which it is not known what its labels mean.

    Args:
        rows: the set.
        space: the classes of the head.

    Raises:
        DataError: it is one.
    """
    if isinstance(rows, LabelledImages) and rows.shown_labels is not None:
        check_labels(rows.shown_labels, len(rows.class_names or space.words), rows.name)
    names = space.data_names
    if names is not None and isinstance(rows.rows, datasets.IterableDataset) and rows.rows.features is None:
        what = "a stream without features does not say which classes its labels mean"
        remedy = "Use dataset.map(..., features=...), or from_generator likewise."
        raise DataError(what, where=rows.name, remedy=remedy)
    if rows.class_names is None and names is not None and all(map(str.isdecimal, names)):
        if [int(name) for name in names] != list(range(len(names))):
            what = "labels without names, for classes that are numbers in another order"
            remedy = "Give the labels their names: dataset.cast_column('label', ClassLabel(names=...)), or text."
            raise DataError(what, where=rows.name, got=list(names)[:MOST_SHOWN], remedy=remedy)


def check_training_rows(rows: LabelledImages | LabelledStream, space: ClassSpace) -> None:
    """Refuses a training set of other classes, or of one class alone.

    Args:
        rows: the training set.
        space: the classes of the head.

    Raises:
        DataError: it is one.
    """
    if rows.class_names is not None and space.relate(rows.class_names).kind != "same":
        allowed = ", ".join(map(repr, space.data_names or space.words))
        what = "the training set has other classes than the classifier, or in another order"
        remedy = "Build a new RobustTrainer for it."
        raise DataError(what, where=rows.name, got=rows.class_names, allowed=allowed, remedy=remedy)
    labels = rows.shown_labels if isinstance(rows, LabelledImages) else None
    found = len(space.words) if labels is None else len(np.unique(labels))
    if found < 2:
        what = "there is nothing to tell apart: all images are of one class"
        raise DataError(what, where=rows.name, got=found, allowed="2 classes or more")


def check_saved_head(saved: Mapping[str, Any], head: str, class_names: Sequence[str], where: str) -> None:
    """Refuses a checkpoint of other classes or another head.

    Args:
        saved: what was written beside the encoder.
        head: `"frozen"`, `"live"` or `"trainable"`.
        class_names: one per class.
        where: the folder.

    Raises:
        AdapterFileError: it is one.
    """
    names = saved.get("class_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or "head" not in saved:
        raise AdapterFileError("file names no head and no classes", where=f"{where}/classifier.json")
    if saved["head"] != head:
        raise AdapterFileError("checkpoint has another head", where=where, got=saved["head"])
    if ClassSpace(class_names).relate(names).kind != "same":
        raise AdapterFileError("checkpoint is of other classes, or of another order", where=where, got=names)
