# SPDX-License-Identifier: Apache-2.0
"""A test set under corruptions, for those who have no images of another distribution."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..data.columns import IMAGE, LABEL
from ..data.images import load_rgb
from ..data.rows import LabelledImages, labelled_images
from .corruptions import corrupt

# One of each kind of ImageNet-C that can be made here: noise, blur, light, and two of how images are stored
FIVE = ("gaussian_noise", "gaussian_blur", "contrast", "pixelate", "jpeg_compression")
SEVERITY = 3


class CorruptedImages(torch.utils.data.Dataset):
    """The images of a set, corrupted when they are read; what noise there is hangs on seed and row.

    Args:
        rows: labelled images.
        name: of the corruption, see `corrupt`.
        seed: of its noise, from 0.

    Example:
        >>> CorruptedImages(rows, "gaussian_blur", seed=0)[0]["image"].size
        (224, 224)
    """

    def __init__(self, rows: LabelledImages, name: str, seed: int) -> None:
        self.rows, self.name, self.seed = rows, name, seed
        self.classes = rows.class_names
        self.targets = None if rows.shown_labels is None else rows.shown_labels.tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        image = corrupt(load_rgb(row[IMAGE]), self.name, SEVERITY, self.seed, index)
        return {IMAGE: image, LABEL: row[LABEL]}


def corrupted_sets(rows: LabelledImages, seed: int = 0) -> dict[str, LabelledImages]:
    """Divides a set into five parts, each under a corruption of its own, so that they cost one pass over the set.

    Args:
        rows: labelled images.
        seed: of the noise, from 0.

    Returns:
        The parts that have an image by name, `ood_gaussian_noise` for instance.

    Example:
        >>> list(corrupted_sets(rows))[:2]
        ['ood_gaussian_noise', 'ood_gaussian_blur']
    """
    found: dict[str, LabelledImages] = {}
    for corruption, part in parts(rows).items():
        name = f"ood_{corruption}"
        corrupted: Any = labelled_images(CorruptedImages(part, corruption, seed), name)
        found[name] = replace(corrupted, skipped=part.skipped)
    return found


def parts(rows: LabelledImages) -> dict[str, LabelledImages]:
    """Divides a set among the five corruptions, of which few images leave some without any.

    Args:
        rows: labelled images, as they are.

    Example:
        >>> {name: len(part) for name, part in parts(rows).items()}  # of 7 images
        {'gaussian_noise': 2, 'gaussian_blur': 2, 'contrast': 1, 'pixelate': 1, 'jpeg_compression': 1}
    """
    return {name: rows.select(range(place, len(rows), len(FIVE))) for place, name in enumerate(FIVE[: len(rows)])}
