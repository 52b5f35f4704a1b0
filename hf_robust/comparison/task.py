# SPDX-License-Identifier: Apache-2.0
"""What all trainings of a comparison share, and the trainer that each gets."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Dataset
from peft import get_peft_model
from torch import nn
from transformers import ProcessorMixin, set_seed

from ..data.embeds_cache import with_image_embeds
from ..data.rows import LabelledImages
from ..data.sources import load_source
from ..encoders.context import context_prompt
from ..encoders.image_size import with_image_size
from ..encoders.templates import check_templates
from ..evaluation import RobustnessSuite, evaluate_suite, few_shot, standard_error
from ..evaluation.answers import load_labels
from ..losses.term import Term
from ..ogen import OGENConfig, OGENLoss
from ..scripting.loading import load_model
from ..scripting.progress import is_silent, show_progress
from ..tasks.class_names import ZeroShotClassifier
from ..training.arguments import RobustTrainingArguments
from ..training.losses import TERMS, settings_of
from ..training.trainer import RobustTrainer
from .methods import AFTER, CACHEABLE, LOSSES, Chosen, Method

SEARCH_SEED = 0  # of the trainings that choose learning rates and weights


@dataclass(frozen=True)
class Comparison:
    """What all trainings share.

    Args:
        model: folder or id of the model.
        dtype: of its weights.
        processor: the model's.
        training_args: of every training, but for what its method says; their `losses` hold the settings of the terms
            that methods add.
        train: labelled images to train on.
        validation: rates, weights and α are chosen on these.
        suite: what is evaluated.
        shots: training images per class, drawn by the seed; None for all.
        alphas: of WiSE-FT, to choose from.
        after: what is done with trained models, of what their methods have.
        new_class_names: what OGEN is told.
        other_validation: images of other tasks by name, which together have as much of a say as `validation`.
    """

    model: str
    dtype: str
    processor: ProcessorMixin
    training_args: RobustTrainingArguments
    train: Dataset
    validation: LabelledImages
    suite: RobustnessSuite
    shots: int | None
    alphas: Sequence[float]
    after: Sequence[str] = AFTER
    new_class_names: Sequence[str] | None = None
    other_validation: Mapping[str, LabelledImages] = field(default_factory=dict)


def make_trainer(comparison: Comparison, method: Method, chosen: Chosen, seed: int) -> RobustTrainer:
    """Makes a trainer of one method on a fresh model; everything but what the method says is the same for all.

    Args:
        comparison: what all share.
        method: the method.
        chosen: its learning rate and the weight of its loss.
        seed: of the shots and the training.
    """
    settings = copy.copy(comparison.training_args)
    settings.learning_rate, settings.seed = chosen.learning_rate, seed
    for name, value in method.settings.items():
        setattr(settings, name, value)
    losses = _terms(comparison, method, chosen.weight)
    settings.losses = None
    settings.cache_reference_embeddings &= method.loss in CACHEABLE
    set_seed(seed)  # LoRA's matrices are drawn from the global generator
    model = load_model(comparison.model, comparison.dtype)
    train = comparison.train if comparison.shots is None else few_shot(comparison.train, comparison.shots, seed)
    if method.config is not None:
        model = get_peft_model(model, replace(method.config))
    if method.probe:
        train = _embedded(comparison, model, settings, train)
        settings.head = "trainable"
    if method.head_first:
        settings.head, settings.head_first_epochs = "trainable", math.ceil(settings.num_train_epochs)
        settings.head_first_learning_rate = chosen.head_learning_rate
    if method.ogen:
        model, settings.templates = _with_context(comparison, model)
    trainer = RobustTrainer(
        model,
        settings,
        train_dataset=train,
        eval_dataset={"validation": comparison.validation},
        processing_class=comparison.processor,
        losses=losses,
    )
    show_progress(trainer)
    return trainer


def _terms(comparison: Comparison, method: Method, weight: float) -> list[Term]:
    if method.ogen:
        return [OGENLoss(OGENConfig(new_class_names=list(comparison.new_class_names or [])))]
    if method.loss is None:
        return []
    given = settings_of(comparison.training_args.losses) or {}
    term = TERMS[method.loss].from_settings({**LOSSES[method.loss], **given.get(method.loss, {})})
    term.weight *= weight
    return [term]


def _embedded(comparison: Comparison, model: Any, settings: RobustTrainingArguments, train: Dataset) -> Any:
    """The training images embedded, by a model that is frozen from then on."""
    model.requires_grad_(False).to(settings.device)
    how = settings.per_device_eval_batch_size, settings.dataloader_num_workers, is_silent(settings)
    processor = with_image_size(comparison.processor, settings.image_size, model)
    with settings.main_process_first(desc="embedding the training images"):
        return with_image_embeds(train, model, processor, *how)


def _with_context(comparison: Comparison, model: Any) -> tuple[Any, str]:
    """The model with a learned context that starts as the words before the class name, and the template for it."""
    words = check_templates(comparison.training_args.templates)[0].partition("{}")[0].strip()
    sets = [load_labels(one, load_source(one.source, one.name)) for one in comparison.suite.sets]
    names = [*(comparison.new_class_names or []), *(comparison.validation.class_names or [])]
    names += [name for one in sets for name in one.class_names]  # which the words for the context must not be among
    tokens = len(comparison.processor.tokenizer(words, add_special_tokens=False).input_ids)
    return context_prompt(model, comparison.processor, tokens, words, names)


# --- what a model does ---


def evaluate(comparison: Comparison, model: nn.Module, task: ZeroShotClassifier) -> dict[str, Any]:
    """Returns the mean accuracy by role, and the figures of every set.

    Args:
        comparison: what all share.
        model: what `evaluate_suite` takes.
        task: the model itself, or the one that an ensemble is made of.
    """
    how, suite = comparison.training_args, comparison.suite
    size, workers = how.per_device_eval_batch_size, how.dataloader_num_workers
    if task.templates != check_templates(how.templates):  # a learned context
        suite = RobustnessSuite([replace(one, templates=task.templates) for one in suite.sets])
    report = evaluate_suite(model, task.processor, suite, size, workers, silent=is_silent(how))
    sets = {name: {"role": one.role, "images": len(one.rows), **one.metrics} for name, one in report.sets.items()}
    return {"means": report.means, "sets": sets}


def validated_by(comparison: Comparison, trainer: RobustTrainer) -> dict[str, float]:
    """Returns what `validate` does, on the sets of a comparison.

    Args:
        comparison: what all share.
        trainer: its model as it is now.
    """
    return validate(trainer, comparison.validation, comparison.other_validation)


def validate(
    trainer: RobustTrainer, validation: LabelledImages, others: Mapping[str, LabelledImages] | None = None
) -> dict[str, float]:
    """Returns what settings are chosen by: accuracy, its standard error, and loss on validation data.

    Where other tasks have a say, each is the mean of what it is on the validation data and of the mean of theirs.

    Args:
        trainer: its model as it is now.
        validation: of its task.
        others: of other tasks, by name.
    """
    others = others or {}
    metrics = trainer.evaluate({"id": validation, **others})
    accuracy, loss = (
        {name: metrics[f"eval_{name}_{what}"] for name in ("id", *others)} for what in ("accuracy", "loss")
    )
    images = {"id": len(validation), **{name: len(rows) for name, rows in others.items()}}
    share = {"id": 1.0} if not others else {"id": 0.5, **dict.fromkeys(others, 0.5 / len(others))}
    errors = [share[name] * standard_error(accuracy[name], images[name]) for name in share]
    means = {"accuracy": _weighted(share, accuracy), "loss": _weighted(share, loss), "error": math.hypot(*errors)}
    return {**means, **{f"{name}_accuracy": value for name, value in accuracy.items() if others}}


def _weighted(share: Mapping[str, float], values: Mapping[str, float]) -> float:
    return sum(share[name] * values[name] for name in share)
