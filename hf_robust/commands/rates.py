# SPDX-License-Identifier: Apache-2.0
"""`--learning_rate auto`: the search of `hf-robust compare`, for one method."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

from rich.console import Console
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..comparison.runs import Run
from ..comparison.search import GRID, find_learning_rate
from ..comparison.task import validate
from ..data.rows import LabelledImages
from ..errors import ConfigError, NonFiniteError
from ..scripting.progress import is_silent
from ..training.arguments import RobustTrainingArguments
from ..training.trainer import RobustTrainer

Arguments = TypeVar("Arguments", bound=RobustTrainingArguments)


def search_rate(
    make_trainer: Callable[[Arguments], RobustTrainer], training_args: Arguments, validation: LabelledImages | None
) -> float:
    """Returns the learning rate that `find_learning_rate` finds on the validation data, among `GRID`.

    Args:
        make_trainer: makes a trainer of a new model.
        training_args: of every training but for its rate; nothing is saved or evaluated in one.
        validation: the validation set.

    Raises:
        ConfigError: there is no validation set, the task has no classes, or no training ended.
    """
    if validation is None:
        remedy = "Set --validation_data or --validation_share."
        raise ConfigError("a learning rate is searched on validation data", where="learning_rate", remedy=remedy)
    settings = copy.copy(training_args)
    settings.eval_strategy, settings.save_strategy = IntervalStrategy.NO, SaveStrategy.NO
    settings.load_best_model_at_end = False

    def trainer_at(rate: float) -> RobustTrainer:
        one = copy.copy(settings)
        one.learning_rate = rate
        return make_trainer(one)

    def tried(rate: float) -> Run:
        trainer = trainer_at(rate)
        try:
            trainer.train()
            found: Run = {"learning_rate": rate, **validate(trainer, validation)}
        except NonFiniteError as error:
            found = {"learning_rate": rate, "stopped": str(error)}
        if not is_silent(trainer.args):
            what = "stopped" if "stopped" in found else f"{100 * found['accuracy']:.1f} % on validation data"
            Console().print(f"Learning rate {rate:g}: {what}", highlight=False)
        return found

    start = trainer_at(0.0)
    if start.model.metrics[0] != "accuracy":
        got, allowed = start.model.name, "class_names, flyp"
        raise ConfigError("no search for this task", where="learning_rate auto", got=got, allowed=allowed)
    rate = find_learning_rate(GRID, tried, validate(start, validation))
    if not is_silent(start.args):
        rule = "of those within a standard error of the most accurate the one with the lowest loss"
        Console().print(f"Learning rate {rate:g} is taken: {rule}.", highlight=False)
    return rate
