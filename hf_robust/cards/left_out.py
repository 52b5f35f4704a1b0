# SPDX-License-Identifier: Apache-2.0
"""What a training and its evaluations left out, for a card: images, classes, adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from peft import PeftModel

from ..data.readable import bad_rows
from ..data.rows import LabelledImages
from ..peft_types import method_name
from ..tasks.task import Task

MOST_LISTED = 10  # images of a set, or classes


def left_out(task: Task, train_rows: object, sets: Mapping[str, tuple[int, Sequence[str]]]) -> list[str]:
    """Returns what was left out, one sentence each: plain text, without paths and names of adapters.

    Args:
        task: that was trained.
        train_rows: the training set.
        sets: of every evaluation set the images that were used, and what is wrong with the others.

    Example:
        >>> left_out(trainer.model, trainer.train_dataset, {"id": (99, ["row 7, image cannot be decoded"])})
        ['1 of 100 images of the set id: row 7, image cannot be decoded']
    """
    found = []
    if isinstance(train_rows, LabelledImages):
        found += _images("the training set", len(train_rows), bad_rows(train_rows))
        found += _classes(task.settings().get("class_names", []), train_rows)
    for name, (images, bad) in sets.items():
        found += _images(f"the set {name}", images, bad)
    return found + _adapters(task.model)


def _images(which: str, images: int, bad: Sequence[str]) -> list[str]:
    return [f"{len(bad):,} of {images + len(bad):,} images of {which}: {_listed(bad, '; ')}"] if bad else []


def _classes(class_names: Sequence[str], rows: LabelledImages) -> list[str]:
    """Classes that no training image has, as all of theirs were left out, say."""
    if rows.target != "label" or rows.shown_labels is None:
        return []
    seen = set(np.unique(rows.shown_labels).tolist())
    unseen = [name for label, name in enumerate(class_names) if label not in seen]
    return [f"{len(unseen):,} classes without a training image: {_listed(unseen, ', ')}"] if unseen else []


def _adapters(model: object) -> list[str]:
    if not isinstance(model, PeftModel):
        return []
    others = [config for name, config in model.peft_config.items() if name not in model.active_adapters]
    methods = sorted(map(method_name, others))
    return (
        [f"Other adapters of the model, not active and not in these figures: {', '.join(methods)}"] if methods else []
    )


def _listed(texts: Sequence[str], between: str) -> str:
    more = f" and {len(texts) - MOST_LISTED:,} more" if len(texts) > MOST_LISTED else ""
    return between.join(texts[:MOST_LISTED]) + more
