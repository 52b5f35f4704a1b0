# SPDX-License-Identifier: Apache-2.0
"""A model on all sets of a suite: every image encoded once, every head from the text tower as it is now."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor, nn
from transformers import ProcessorMixin

from ..data.collator import ImageCollator, batches_in_order
from ..data.columns import IMAGE
from ..data.images import load_rgb
from ..data.readable import readable_rows
from ..data.rows import LabelledImages, labelled_images
from ..data.sources import load_source
from ..encoders.class_embeds import class_embeddings, evaluating
from ..encoders.dual_encoder import base_model, family, image_embeds, logit_scale
from ..encoders.templates import check_templates
from ..errors import DataError, HfRobustError, NonFiniteError
from ..tasks.class_names import ZeroShotClassifier
from .answers import LEFT_OUT, LoadedSet, among_known, load_labels, with_rows
from .corruptions import corrupt
from .report import SetResult, SuiteReport
from .suite import RobustnessSuite, SuiteSet

VERSIONS_OF = ("hf_robust", "torch", "transformers", "peft", "accelerate", "datasets", "numpy", "pillow")
ROW, DIGEST = "row", "digest"  # what stands in a batch beside the model's inputs


def evaluate_suite(
    model: nn.Module,
    processor: ProcessorMixin,
    suite: RobustnessSuite,
    batch_size: int = 64,
    workers: int = 0,
    seed: int = 0,
    silent: bool = False,
    on_bad_image: Literal["raise", "skip"] = "raise",
) -> SuiteReport:
    """Classifies the images of every set among its own classes.

    The heads are made of class names, by the text tower as it is now: where fine-tuning has changed it, that shows on
    all sets, on other tasks too. Sets with the same images (source, column and corruption) share one pass over them.
    Labels are read, and settings checked against them, before the first image is opened.

    On several ranks (`accelerate launch`) call it on each, with the model on the rank's device. The ranks share the
    batches; every image counts once, and every rank returns the whole report.

    Args:
        model: a dual encoder, plain or wrapped by PEFT, or a `ZeroShotClassifier`. Where all classes of a set are
            among those of a classifier, its other classes remain possible answers, as in `RobustTrainer.evaluate`, and
            a head that was trained answers.
        processor: its processor.
        suite: what to evaluate it on.
        batch_size: images encoded at once, on every rank.
        workers: processes per rank that open and corrupt images.
        seed: of the noise in corrupted images, from 0.
        silent: without a progress bar.
        on_bad_image: `"raise"` stops at an image that cannot be used. `"skip"` opens every image once beforehand and
            leaves those out; they are logged and listed in the report.

    Returns:
        Figures and the answer to every image, the same for every batch size, number of workers and number of ranks but
        for rounding in the embeddings.

    Raises:
        ConfigError: the model is no supported dual encoder, or the suite does not fit its data.
        DataError: a source cannot be loaded, or its labels or an image cannot be used.
        NonFiniteError: the model gives NaN or infinite logits.

    Example:
        >>> suite = RobustnessSuite([SuiteSet("photos", "id", photos), SuiteSet("sketches", "ood", sketches)])
        >>> report = evaluate_suite(model, processor, suite)
        >>> report.means
        {'id': 0.75, 'ood': 0.5}
    """
    encoder = model.model if isinstance(model, ZeroShotClassifier) else model
    family(encoder)  # refuses what is no dual encoder
    _state(encoder)  # joins the ranks
    look_through = partial(readable_rows, workers=workers, silent=silent) if on_bad_image == "skip" else None
    passes = _load_passes(suite, look_through)
    if isinstance(model, ZeroShotClassifier):
        passes = [replace(same, sets=[among_known(one, model.class_space) for one in same.sets]) for same in passes]
    collator = ImageCollator(processor)
    results: dict[str, SetResult] = {}
    with torch.no_grad(), evaluating(encoder):
        heads = _heads(model, encoder, processor, [one for same in passes for one in same.sets])
        for same in passes:
            batches = _Batches(collator, same.sets[0].suite_set.corruption, seed)
            results |= _evaluate_pass(encoder, same, heads, batches, batch_size, workers, silent)
    config = {
        "suite": suite.to_dict(),
        "model": _describe(encoder),
        "batch_size": batch_size,
        "seed": seed,
        "ranks": _state(encoder).num_processes,
    }
    versions = {package: version(package) for package in VERSIONS_OF}
    return SuiteReport({one.name: results[one.name] for one in suite.sets}, config, versions)


def _state(encoder: nn.Module) -> PartialState:
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1  # on CPUs accelerate joins ranks only when asked
    return PartialState(cpu=several and base_model(encoder).device.type == "cpu")


def _describe(encoder: Any) -> dict[str, Any]:
    base, adapters = base_model(encoder), encoder.active_adapters if isinstance(encoder, PeftModel) else []
    methods = [encoder.peft_config[name].peft_type.value for name in adapters]
    return {"type": base.config.model_type, "dtype": str(base.dtype), "adapters": methods}


# --- what is loaded ---


@dataclass(frozen=True)
class _Pass:
    """Images that several sets may share: the dataset's column of images, and the sets."""

    images: LabelledImages
    sets: list[LoadedSet]
    skipped: list[str]


def _load_passes(suite: RobustnessSuite, look_through: Callable[[Any], LabelledImages] | None) -> list[_Pass]:
    sources: dict[Any, Any] = {}
    readable: dict[Any, LabelledImages] = {}
    passes: dict[Any, _Pass] = {}
    for one in suite.sets:
        source = _source_key(one)
        if source not in sources:
            sources[source] = load_source(one.source, one.name)
        images = labelled_images(sources[source], one.name, one.image_column, one.label_column)
        if not isinstance(images, LabelledImages):
            raise DataError("a stream has no numbered rows", where=one.name, got=type(images.rows).__name__)
        column = (source, one.image_column)
        if look_through is not None and column not in readable:
            readable[column] = look_through(images)
        key = (*column, None if one.corruption is None else tuple(one.corruption))
        if key not in passes:
            skipped = readable[column].skipped if column in readable else None
            passes[key] = _Pass(images, [], skipped or [])
        kept = readable[column].numbers if column in readable else images.numbers
        passes[key].sets.append(with_rows(load_labels(one, sources[source]), kept))
    return list(passes.values())


def _source_key(suite_set: SuiteSet) -> Any:
    return suite_set.source if isinstance(suite_set.source, str) else id(suite_set.source)


def _head_key(one: LoadedSet) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(one.class_names), check_templates(one.suite_set.templates)


def _heads(
    model: nn.Module, encoder: nn.Module, processor: ProcessorMixin, sets: Sequence[LoadedSet]
) -> dict[Any, tuple[Tensor, Tensor]]:
    """By key weight `(classes, dim)` and bias `(classes,)` or 0-dim."""
    heads = {}
    for names, templates in dict.fromkeys(_head_key(one) for one in sets):
        rows = _trained_rows(model, names)
        if rows is None:  # SigLIP's bias is the same for all answers and changes none
            weight = logit_scale(encoder) * class_embeddings(encoder, processor, names, templates)
            rows = weight, weight.new_zeros(())
        heads[names, templates] = rows
    return heads


def _trained_rows(model: nn.Module, names: Sequence[str]) -> tuple[Tensor, Tensor] | None:
    if not isinstance(model, ZeroShotClassifier) or model.head != "trainable":
        return None
    order = model.class_space.relate(names).order
    weight, bias = model.trained_head()
    return None if order is None else (weight[order], bias[order])


# --- what is computed ---


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


def _evaluate_pass(
    encoder: nn.Module,
    same: _Pass,
    heads: dict[Any, tuple[Tensor, Tensor]],
    collate: _Batches,
    batch_size: int,
    workers: int,
    silent: bool,
) -> dict[str, SetResult]:
    state = _state(encoder)
    wanted = np.flatnonzero(np.any([one.targets != LEFT_OUT for one in same.sets], axis=0))
    mine = wanted[np.arange(len(wanted)) // batch_size % state.num_processes == state.process_index]
    silent = silent or not state.is_main_process
    title = None if silent else "Evaluating " + ", ".join(one.suite_set.name for one in same.sets)
    device = base_model(encoder).device
    batches = batches_in_order(_Rows(same.images, mine), collate, batch_size, workers, device, title)
    part: dict[str, np.ndarray] | HfRobustError
    try:
        part = _answer(encoder, same.sets, heads, batches)
    except HfRobustError as error:  # raised on all ranks below, none of which waits for this one
        part = error
    return _results(same, _gather(part))


def _answer(
    encoder: nn.Module, sets: Sequence[LoadedSet], heads: dict[Any, tuple[Tensor, Tensor]], batches: Any
) -> dict[str, np.ndarray]:
    """Rows, digests, and for every set predictions and confidences, of this rank's images."""
    columns = [_columns(one.answers).to(base_model(encoder).device) for one in sets]
    layers = [heads[_head_key(one)] for one in sets]
    found: dict[str, list[Tensor]] = {}
    for batch in batches:
        found.setdefault(ROW, []).append(batch.pop(ROW))
        found.setdefault(DIGEST, []).append(batch.pop(DIGEST))
        embeds = image_embeds(encoder, **batch)  # (batch, dim)
        for one, index, (weight, bias) in zip(sets, columns, layers, strict=True):
            name = one.suite_set.name
            with torch.autocast(embeds.device.type, enabled=False):  # logits differ by less than bfloat16 resolves
                logits = embeds @ weight.T + bias  # (batch, classes)
            logits = logits[:, index].amax(dim=-1)  # (batch, answers)
            if not logits.isfinite().all():
                raise NonFiniteError("logits are NaN or infinite", where=name)
            best = logits.softmax(dim=-1).max(dim=-1)
            found.setdefault(f"{name} predictions", []).append(logits.argmax(dim=-1))
            found.setdefault(f"{name} confidences", []).append(best.values)
    return {name: torch.cat(parts).cpu().numpy() for name, parts in found.items()}


def _columns(answers: Mapping[str, list[int]]) -> Tensor:
    """`(answers, most classes of an answer)`: the classes of every answer, the first repeated to equal lengths."""
    longest = max(map(len, answers.values()))
    return torch.tensor([classes + classes[:1] * (longest - len(classes)) for classes in answers.values()])


def _gather(part: dict[str, np.ndarray] | HfRobustError) -> dict[str, np.ndarray]:
    """What all ranks found, in the order of the rows."""
    parts = gather_object([part])
    for one in parts:
        if isinstance(one, HfRobustError):
            raise one
    parts = [one for one in parts if one]  # a rank may have had no batch
    joined = {name: np.concatenate([one[name] for one in parts]) for name in parts[0]}
    order = np.argsort(joined[ROW])
    return {name: values[order] for name, values in joined.items()}


def _results(same: _Pass, found: dict[str, np.ndarray]) -> dict[str, SetResult]:
    results = {}
    for one in same.sets:
        name, targets = one.suite_set.name, one.targets[found[ROW]]
        kept = targets != LEFT_OUT  # another set of the pass may have wanted the row
        digest = hashlib.sha256(found[DIGEST][kept].astype("<i8").tobytes() + targets[kept].astype("<i8").tobytes())
        results[name] = SetResult(
            name=name,
            role=one.suite_set.role,
            answers=list(one.answers),
            rows=found[ROW][kept],
            targets=targets[kept],
            predictions=found[f"{name} predictions"][kept],
            confidences=found[f"{name} confidences"][kept],
            fingerprint=digest.hexdigest()[:32],
            skipped=same.skipped,
        )
    return results
