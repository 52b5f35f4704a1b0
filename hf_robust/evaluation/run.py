# SPDX-License-Identifier: Apache-2.0
"""A model on all sets of a suite: every image encoded once, every head from the text tower as it is now."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any, Literal

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from transformers import ProcessorMixin

from ..data.collator import ImageCollator
from ..data.readable import readable_rows
from ..encoders.class_embeds import evaluating
from ..encoders.dual_encoder import base_model, family
from ..tasks.class_names import ZeroShotClassifier
from ..tasks.ensemble import Ensemble
from .ensemble_side import EnsembleSide
from .passes import Pass, evaluate_pass, load_passes
from .report import SetResult, SuiteReport, TaskResult
from .suite import TARGETS, RobustnessSuite
from .text_side import TextSide

VERSIONS_OF = ("hf_robust", "torch", "transformers", "peft", "accelerate", "datasets", "numpy", "pillow")


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
    """Does on every set what its task asks: classification among its own classes, retrieval, or several labels.

    The heads are made of class names, by the text tower as it is now: where fine-tuning has changed it, that shows on
    all sets, on other tasks too. It encodes texts as well, each once. Sets with the same images (source, column and
    corruption) share one pass over them. Labels and texts are read, and settings checked against them, before the
    first image is encoded.

    On several ranks (`accelerate launch`) call it on each, with the model on the rank's device. The ranks share the
    batches; every image counts once, and every rank returns the whole report.

    Args:
        model: a dual encoder, plain or wrapped by PEFT, or a `Task` around one. Where all classes of a set are among
            those of a `ZeroShotClassifier`, its other classes remain possible answers, as in `RobustTrainer.evaluate`,
            and a head that was trained answers; a classifier of several labels does so on sets of several labels, and
            there the set's own classes alone are asked for. In everything else the encoder counts, not the task. Or,
            for classification alone, a `PerImageEnsemble`, both models of which encode every image once.
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
        DataError: a source cannot be loaded, or its labels, its texts or an image cannot be used.
        NonFiniteError: the model gives NaN or infinite embeddings or logits.

    Example:
        >>> suite = RobustnessSuite([SuiteSet("photos", "id", photos), SuiteSet("sketches", "ood", sketches)])
        >>> report = evaluate_suite(model, processor, suite)
        >>> report.means
        {'id': 0.75, 'ood': 0.5}
        >>> suite = RobustnessSuite([SuiteSet("captions", "id", captioned, task="retrieval")])
        >>> evaluate_suite(model, processor, suite).sets["captions"].metrics["image_to_text_recall@1"]
        0.625
    """
    side = EnsembleSide(model, processor, suite) if isinstance(model, Ensemble) else TextSide(model, processor)
    encoder = side.encoder
    family(encoder)  # refuses what is no dual encoder
    _state(encoder)  # joins the ranks
    look_through = partial(readable_rows, workers=workers, silent=silent) if on_bad_image == "skip" else None
    passes = [_as_known(same, side.model) for same in load_passes(suite, look_through)]
    collator = ImageCollator(processor)
    results: dict[str, SetResult | TaskResult] = {}
    with torch.no_grad(), evaluating(model):
        prepared = {one.suite_set.name: one.prepare(side) for same in passes for one in same.sets}
        for same in passes:
            results |= evaluate_pass(side, same, prepared, collator, batch_size, workers, seed, silent)
    config = {
        "suite": suite.to_dict(),
        "model": _describe(model, encoder),
        "batch_size": batch_size,
        "seed": seed,
        "ranks": _state(encoder).num_processes,
    }
    versions = {package: version(package) for package in VERSIONS_OF}
    return SuiteReport({one.name: results[one.name] for one in suite.sets}, config, versions)


def _state(encoder: nn.Module) -> PartialState:
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1  # on CPUs accelerate joins ranks only when asked
    return PartialState(cpu=several and base_model(encoder).device.type == "cpu")


def _as_known(same: Pass, model: nn.Module) -> Pass:
    """The sets of a classifier's task as it answers them."""
    if not isinstance(model, ZeroShotClassifier):
        return same
    own = [TARGETS[one.suite_set.task] == model.target for one in same.sets]
    sets = [one.among_known(model.class_space) if is_own else one for one, is_own in zip(same.sets, own, strict=True)]
    return replace(same, sets=sets)


def _describe(model: nn.Module, encoder: Any) -> dict[str, Any]:
    base, adapters = base_model(encoder), encoder.active_adapters if isinstance(encoder, PeftModel) else []
    methods = [encoder.peft_config[name].peft_type.value for name in adapters]
    described = {"type": base.config.model_type, "dtype": str(base.dtype), "adapters": methods}
    return {**described, "ensemble": model.settings()} if isinstance(model, Ensemble) else described
