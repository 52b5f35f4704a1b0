# SPDX-License-Identifier: Apache-2.0
"""Labels and identities of torch datasets, as torchvision's datasets hold them beside their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import DataError
from .columns import IDENTITY, TEXT, Target
from .labels import number_identities


def torch_labels(dataset: Any, target: Target, name: str) -> tuple[np.ndarray | None, list[str] | None]:
    """Reads `.targets` and `.classes`.

    Args:
        dataset: a torch dataset, or any sequence of rows.
        target: what its rows have beside their images.
        name: the dataset's, for messages.

    Returns:
        Labels and class names as of `LabelledImages`, each None where the dataset does not say it.

    Raises:
        DataError: identities are neither integers nor strings.
    """
    if target == TEXT or getattr(dataset, "target_transform", None) is not None:  # its names are those of other labels
        return None, None
    found, classes = getattr(dataset, "targets", None), getattr(dataset, "classes", None)
    names = None if classes is None else list(classes)
    if found is not None and target == IDENTITY:
        return number_identities(np.asarray(found).tolist(), names, name)
    return None if found is None else np.asarray(found), names


def stated_labels(rows: Any, numbers: Sequence[int], labels: list[int], target: Target) -> list[Any]:
    """Returns what rows should have as their labels: identities as they were before they got numbers.

    Args:
        rows: a torch dataset.
        numbers: of the rows.
        labels: of these.
        target: what they have beside their images.
    """
    if target != IDENTITY:
        return labels
    if isinstance(rows, torch.utils.data.ConcatDataset):  # whose parts look at theirs
        return [None] * len(labels)
    return [rows.targets[number] for number in numbers]


def check_same_labels(rows: Sequence[Mapping[str, Any]], labels: Sequence[Any], target: Target, name: str) -> None:
    """Refuses rows with other labels than the dataset states.

    Args:
        rows: with a label, or without.
        labels: what the dataset states; None for nothing.
        target: under which name rows have theirs.
        name: the dataset's, for the message.

    Raises:
        DataError: they differ.
    """
    for found, label in zip((row.get(target) for row in rows), labels, strict=True):
        if found is not None and label is not None and found != label:
            what, remedy = "labels of rows are not those of `targets`", "Leave `targets` out, or make them the same."
            raise DataError(what, where=name, got=(found, label), remedy=remedy)


def joined_identities(
    labels: Sequence[np.ndarray], names: Sequence[Sequence[str]]
) -> tuple[list[np.ndarray], list[str]]:
    """Numbers the identities of several sets as those of one, in the order in which the sets have them.

    Args:
        labels: `(rows,)` of each set.
        names: `(identities,)` of each set.

    Returns:
        The same with other numbers, and the names of all.

    Example:
        >>> joined_identities([np.array([0, 1]), np.array([1])], [["7", "9"], ["8", "9"]])
        ([array([0, 1]), array([1])], ['7', '9', '8'])
    """
    everyone = list(dict.fromkeys(name for of_set in names for name in of_set))
    number = {name: index for index, name in enumerate(everyone)}
    found = [np.array([number[name] for name in ours])[those] for those, ours in zip(labels, names, strict=True)]
    return found, everyone
