# SPDX-License-Identifier: Apache-2.0
"""Every image of a suite encoded once: sets with the same images share a pass, ranks share its batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor

from ..data.collator import ImageCollator, batches_in_order
from ..data.columns import IMAGE
from ..data.images import load_rgb
from ..data.rows import LabelledImages, labelled_images
from ..data.sources import load_source
from ..encoders.dual_encoder import base_model
from ..errors import DataError, HfRobustError
from .answers import load_labels
from .corruptions import corrupt
from .label_sets import load_label_lists
from .loaded import LoadedSet
from .report import SetResult, TaskResult
from .retrieval_sets import load_texts
from .suite import RETRIEVAL, SEVERAL_LABELS, TARGETS, RobustnessSuite, SuiteSet
from .text_side import TextSide

ROW, DIGEST = "row", "digest"  # what stands in a batch beside the model's inputs
ROWS, DIGESTS = ("", ROW), ("", DIGEST)  # what is found of them, beside what is found by set and name
Found = dict[tuple[str, str], np.ndarray]


@dataclass(frozen=True)
class Pass:
    """Images that several sets may share: the dataset's column of images, and the sets.

    Args:
        images: rows of unopened images.
        sets: whose images they are, with the same corruption.
        skipped: what is wrong with the images that are left out.
    """

    images: LabelledImages
    sets: list[LoadedSet]
    skipped: list[str]


def load_passes(suite: RobustnessSuite, look_through: Callable[[Any], LabelledImages] | None) -> list[Pass]:
    """Loads the sets of a suite, and reads their labels and texts.

    Args:
        suite: the sets.
        look_through: returns the rows whose image can be used; None to take all for usable.

    Raises:
        ConfigError: settings do not fit the data.
        DataError: a source cannot be loaded, or its labels or texts cannot be used.
    """
    sources: dict[Any, Any] = {}
    readable: dict[Any, LabelledImages] = {}
    passes: dict[Any, Pass] = {}
    for one in suite.sets:
        source = _source_key(one)
        if source not in sources:
            sources[source] = load_source(one.source, one.name)
        images = _rows(one, sources[source])
        column = (source, one.image_column)
        if look_through is not None and column not in readable:
            readable[column] = look_through(images)
        key = (*column, None if one.corruption is None else tuple(one.corruption))
        if key not in passes:
            skipped = readable[column].skipped if column in readable else None
            passes[key] = Pass(images, [], skipped or [])
        kept = readable[column].numbers if column in readable else images.numbers
        passes[key].sets.append(_load(one, images, sources[source]).with_rows(kept))
    return list(passes.values())


def _source_key(suite_set: SuiteSet) -> Any:
    return suite_set.source if isinstance(suite_set.source, str) else id(suite_set.source)


def _rows(one: SuiteSet, dataset: Dataset) -> LabelledImages:
    order = one.class_names if one.task == SEVERAL_LABELS and isinstance(one.class_names, Sequence) else None
    images = labelled_images(dataset, one.name, one.image_column, one.label_column, order, TARGETS[one.task])
    if not isinstance(images, LabelledImages):
        raise DataError("a stream has no numbered rows", where=one.name, got=type(images.rows).__name__)
    return images


def _load(one: SuiteSet, images: LabelledImages, dataset: Dataset) -> LoadedSet:
    if one.task == RETRIEVAL:
        return load_texts(one, images, dataset)
    if one.task == SEVERAL_LABELS:
        return load_label_lists(one, images, dataset)
    return load_labels(one, dataset)


class _Rows(torch.utils.data.Dataset):
    """Some rows of a dataset, each with its number."""

    def __init__(self, images: LabelledImages, rows: np.ndarray) -> None:
        self.images, self.rows = images, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = int(self.rows[index])
        return {**self.images[row], ROW: row}


class _Batches:
    """Collates rows: opens images, takes their fingerprints, corrupts them."""

    def __init__(self, collator: ImageCollator, corruption: tuple[str, int] | None, seed: int) -> None:
        self.collator, self.corruption, self.seed = collator, corruption, seed

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        images = [load_rgb(row[IMAGE]) for row in rows]
        digests = torch.tensor([_digest(image.tobytes(), image.size) for image in images])  # (batch,)
        if self.corruption is not None:
            numbers = [row[ROW] for row in rows]
            images = [corrupt(image, *self.corruption, self.seed, n) for image, n in zip(images, numbers, strict=True)]
        batch = self.collator([{IMAGE: image} for image in images])
        return {**batch, ROW: torch.tensor([row[ROW] for row in rows]), DIGEST: digests}


def _digest(pixels: bytes, size: tuple[int, int]) -> int:
    digest = hashlib.blake2b(str(size).encode() + pixels, digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def evaluate_pass(
    side: TextSide,
    same: Pass,
    prepared: Mapping[str, Any],
    collator: ImageCollator,
    batch_size: int,
    workers: int,
    seed: int,
    silent: bool,
) -> dict[str, SetResult | TaskResult]:
    """Encodes the images of a pass, and returns what was found on each of its sets, by name, on every rank.

    Args:
        side: of the model, which is in eval mode.
        same: the pass.
        prepared: what images are compared with, by set.
        collator: makes batches of images.
        batch_size: images encoded at once, on every rank.
        workers: processes per rank that open and corrupt images.
        seed: of the noise in corrupted images.
        silent: without a progress bar.

    Raises:
        DataError: an image cannot be used.
        NonFiniteError: the model gives NaN or infinite values.
    """
    state = PartialState()
    wanted = np.flatnonzero(np.any([one.wanted for one in same.sets], axis=0))
    mine = wanted[np.arange(len(wanted)) // batch_size % state.num_processes == state.process_index]
    silent = silent or not state.is_main_process
    title = None if silent else "Evaluating " + ", ".join(one.suite_set.name for one in same.sets)
    collate = _Batches(collator, same.sets[0].suite_set.corruption, seed)
    device = base_model(side.encoder).device
    batches = batches_in_order(_Rows(same.images, mine), collate, batch_size, workers, device, title)
    part: Found | HfRobustError
    try:
        part = _encode(side, same.sets, prepared, batches)
    except HfRobustError as error:  # raised on all ranks below, none of which waits for this one
        part = error
    return _results(same, prepared, _gather(part))


def _encode(side: TextSide, sets: Sequence[LoadedSet], prepared: Mapping[str, Any], batches: Any) -> Found:
    """Rows, digests, and by set and name what is kept, of this rank's images."""
    found: dict[tuple[str, str], list[Tensor]] = {}
    for batch in batches:
        found.setdefault(ROWS, []).append(batch.pop(ROW))
        found.setdefault(DIGESTS, []).append(batch.pop(DIGEST))
        embeds = side.embed(batch)
        for one in sets:
            name = one.suite_set.name
            for what, values in one.of_batch(embeds, prepared[name]).items():
                found.setdefault((name, what), []).append(values)
    return {key: torch.cat(parts).cpu().numpy() for key, parts in found.items()}


def _gather(part: Found | HfRobustError) -> Found:
    """What all ranks found, in the order of the rows."""
    parts = gather_object([part])
    for one in parts:
        if isinstance(one, HfRobustError):
            raise one
    parts = [one for one in parts if one]  # a rank may have had no batch
    joined = {key: np.concatenate([one[key] for one in parts]) for key in parts[0]}
    order = np.argsort(joined[ROWS])
    return {key: values[order] for key, values in joined.items()}


def _results(same: Pass, prepared: Mapping[str, Any], found: Found) -> dict[str, SetResult | TaskResult]:
    results = {}
    for one in same.sets:
        set_name = one.suite_set.name
        shown = one.wanted[found[ROWS]]  # another set of the pass may have wanted the row
        rows = found[ROWS][shown]
        kept = {what: values[shown] for (name, what), values in found.items() if name == set_name}
        digest = hashlib.sha256(found[DIGESTS][shown].astype("<i8").tobytes() + one.right_answers(rows))
        results[set_name] = one.result(rows, kept, prepared[set_name], digest.hexdigest()[:32], same.skipped)
    return results
