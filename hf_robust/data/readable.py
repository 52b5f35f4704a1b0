# SPDX-License-Identifier: Apache-2.0
"""Which rows of a dataset have an image that can be opened: found once, before anything is computed with them."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from ..errors import ConfigError, DataError
from .columns import IMAGE
from .draws import Draws, drawing
from .images import load_rgb
from .rows import LabelledImages, LabelledStream

logger = logging.getLogger(__name__)
MOST_LISTED = 10  # in the log
PROBLEM = re.compile(r"(?P<what>[^(]*) \(.*?, (?P<row>row \d+)\b")  # of `str(DataError)`


def readable_rows(rows: LabelledImages | LabelledStream, workers: int = 0, silent: bool = False) -> LabelledImages:
    """Leaves out the rows whose image cannot be used; they are logged, and listed in `skipped`.

    Every image is opened once. Several ranks share the work, and each returns the whole.

    Args:
        rows: what `labelled_images` returned; rows that have been looked at are returned as they are.
        workers: processes that open images.
        silent: without a progress bar.

    Raises:
        ConfigError: the dataset has no length, so that its rows cannot be looked at beforehand.
        DataError: no image can be used.

    Example:
        >>> kept = readable_rows(labelled_images(photos, "photos"))
        >>> kept.skipped
        ['image cannot be opened (...) (at photos, row 3, photos/cat/3.jpg)']
    """
    if isinstance(rows, LabelledStream):
        remedy = "Set on_bad_image='raise', or filter the dataset."
        raise ConfigError("rows of a stream cannot be skipped", where=rows.name, got="skip", remedy=remedy)
    if rows.skipped is not None:
        return rows
    state = PartialState()
    share = range(state.process_index, len(rows), state.num_processes)
    generator = torch.Generator()  # a loader without one draws from the global one
    shown = replace(rows, draws=Draws(seed=0))  # a transform would draw from the global generators
    loader: Any = DataLoader(Subset(shown, share), 16, num_workers=workers, collate_fn=_problems, generator=generator)
    title = f"Looking through {rows.name}"
    found = [problem for batch in tqdm(loader, desc=title, leave=False, disable=silent) for problem in batch]
    parts = gather_object([dict(zip(share, found, strict=True))])
    bad = {row: text for part in parts for row, text in part.items() if text is not None}
    kept = [row for row in range(len(rows)) if row not in bad]
    if not kept:
        raise DataError("no image can be used", where=rows.name, got=bad[0], allowed="at least one")
    skipped = [bad[row] for row in sorted(bad)]
    if skipped and state.is_main_process:
        more = f"\n… and {len(skipped) - MOST_LISTED} more" if len(skipped) > MOST_LISTED else ""
        listed = "\n".join(skipped[:MOST_LISTED]) + more
        logger.warning("%s: %d of %d images are left out:\n%s", rows.name, len(skipped), len(rows), listed)
    return replace(rows.select(kept), skipped=skipped)


def bad_rows(rows: LabelledImages) -> list[str]:
    """Returns which rows were left out and why, in a few words, without paths and what the system says of files.

    Args:
        rows: what `readable_rows` returned, or another set; of which none were.

    Example:
        >>> bad_rows(kept)
        ['row 3, image cannot be opened']
    """
    found = [PROBLEM.match(problem) for problem in rows.skipped or ()]
    return ["a row" if one is None else f"{one['row']}, {one['what']}" for one in found]


def _problems(rows: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """For every row what is wrong with its image."""
    found: list[str | None] = []
    for row in rows:
        try:
            if IMAGE in row:
                with drawing(row, "image"):
                    load_rgb(row[IMAGE])
            found.append(None)
        except DataError as error:
            found.append(str(error))
    return found
