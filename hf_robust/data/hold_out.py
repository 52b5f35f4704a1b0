# SPDX-License-Identifier: Apache-2.0
"""Images that are held out of a training set, where a source has no set of its own to look at."""

from __future__ import annotations

import numpy as np

from ..errors import DataError
from .columns import IDENTITY, LABEL
from .rows import LabelledImages


def hold_out(rows: LabelledImages, share: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Divides a set: what is left to train on, and what is held out.

    Of every class the share is held out, rounded, but one image at least where it has two, and never all; of
    identities whole ones, two at least, as others are evaluated than those that are trained; else any rows. Images
    that show the same thing, as frames of a film, are not known to belong together: put these into splits of their
    own.

    Args:
        rows: the set.
        share: of it, a fraction.
        seed: of the choice, from 0.

    Returns:
        Both in the order that the rows had.

    Raises:
        DataError: one of the two would be empty.

    Example:
        >>> train, validation = hold_out(labelled_images(photos, "photos"), 0.1, seed=0)
    """
    generator = np.random.default_rng(seed)
    labels = rows.shown_labels
    if labels is not None and rows.target == LABEL:
        groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        parts = [generator.permutation(group)[: _number(len(group), share)] for group in groups]
        held = np.concatenate(parts)
    elif labels is not None and rows.target == IDENTITY:
        known = np.unique(labels)
        held = np.flatnonzero(np.isin(labels, generator.permutation(known)[: _number(len(known), share, least=2)]))
    else:
        held = generator.permutation(len(rows))[: _number(len(rows), share)]
    kept = np.setdiff1d(np.arange(len(rows)), held)
    if len(held) == 0 or len(kept) == 0:
        remedy = "Give more images, or splits of your own."
        raise DataError("too few images to hold some out", where=rows.name, got=len(rows), remedy=remedy)
    return rows.select(kept), rows.select(np.sort(held))


def _number(of: int, share: float, least: int = 1) -> int:
    """The share, rounded, but `least` at least, and never all."""
    return min(max(round(share * of), least), of - 1)
