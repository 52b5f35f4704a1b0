# SPDX-License-Identifier: Apache-2.0
"""Trainings that start from a new model each: `model_init` and `hyperparameter_search`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import nn
from transformers import ProcessorMixin, enable_full_determinism, set_seed

from ..data.embeds_cache import with_reference_embeds
from ..errors import ConfigError, close_matches, needs_extra
from ..interpolation.adapters import zero_shot_copy
from ..interpolation.callback import WiSEFTCallback
from ..losses.reference import add_terms
from ..losses.term import Term
from ..tasks.choose import task_class
from ..tasks.settings import task_settings
from ..tasks.task import Rows, Task
from .arguments import RobustTrainingArguments
from .evaluating import EvaluatingTrainer
from .losses import StartingPoint, check_sharded, losses_of

ClassNames = Sequence[str] | Mapping[str | int, str]


def as_task(
    processor: ProcessorMixin,
    rows: Rows | None,
    class_names: ClassNames | None,
    args: RobustTrainingArguments,
    model: nn.Module,
) -> Task:
    """Builds the task around a dual encoder; a task stays what it is.

    Args:
        processor: the model's.
        rows: the training set.
        class_names: what the user gave.
        args: the training's.
        model: the dual encoder, plain or wrapped by PEFT, or a task.

    Raises:
        ConfigError: there are no class names.
        DataError: the class names are not those of the training set.
    """
    if isinstance(model, Task):
        _check_brings_its_own(model, rows, {"class_names": class_names, "task": args.task})
        model.processor = processor  # its card shows how images are prepared
        return model
    try:
        return task_class(args.task, rows).build(model, processor, rows, class_names, args)
    except TypeError as error:  # a number that is text, say, in a config file
        if task_settings(args.task):
            raise ConfigError(f"a setting has another type ({error})", where="task", got=args.task) from error
        raise


def _check_brings_its_own(task: Task, rows: Rows | None, settings: dict[str, Any]) -> None:
    """A task that the user has built has its own settings, to which the training set has to fit."""
    for name, value in settings.items():
        if value is not None:
            remedy = "Pass the dual encoder itself, or leave the setting out."
            raise ConfigError("a task brings its own settings", where=name, got=value, remedy=remedy)
    if rows is not None:
        task.take_names(rows)


def model_or_first(
    model: nn.Module | None,
    model_init: Callable[..., nn.Module] | None,
    args: RobustTrainingArguments,
    optimizers: tuple[Any, Any],
) -> nn.Module:
    """Returns the model given, or the first that a function makes.

    Args:
        model: the model given.
        model_init: the function given.
        args: what sets the seed.
        optimizers: an optimizer and a schedule given, or None.

    Raises:
        ConfigError: there are a model and a function, or neither, or an optimizer, which knows one model.
    """
    if (model is None) == (model_init is None):
        got = "neither" if model is None else "both"
        raise ConfigError("a trainer takes a model, or a function that makes one", where="model, model_init", got=got)
    if model is not None:
        return model
    if any(part is not None for part in optimizers):
        remedy = "Pass optimizer_cls_and_kwargs."
        raise ConfigError("an optimizer is for one model, model_init makes several", where="optimizers", remedy=remedy)
    return _made(model_init, args)


def _made(model_init: Any, args: RobustTrainingArguments, trial: Any = None) -> nn.Module:
    seed = enable_full_determinism if args.full_determinism else set_seed
    seed(args.seed)
    return model_init(trial) if inspect.signature(model_init).parameters else model_init()


class ModelInitTrainer(EvaluatingTrainer):
    """`model_init` and `hyperparameter_search` of `RobustTrainer`.

    What `model_init` returns, a dual encoder or a task, is built into a task at every call, and all that
    is kept of the pre-trained model is taken from it anew.
    """

    as_task: Callable[[nn.Module], Task]
    losses: Sequence[Term] | None  # given beside those of the arguments
    arguments_given: dict[str, Any]  # before a search, by name
    train_images: Any = None  # the training set before it was embedded

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Returns the task that `start_anew` has made for a training; `Trainer.train` asks for it.

        Args:
            trial: of a search.
        """
        return self.model

    def keep_start(self) -> None:
        """Takes from a new model what the training needs of it."""
        self.train_dataset = self.images_to_train_on  # those embedded are so by the model before
        self.make_task_loss()
        self.zero_shot = zero_shot_copy(self.model)
        self._add_terms()
        self.forget_model()
        self.has_trained, self.is_pretrained = False, None

    @property
    def images_to_train_on(self) -> Any:
        """The training set, as it was before its images were embedded."""
        is_embedded = self.train_images is not None and self.train_dataset is self.embedded
        return self.train_images if is_embedded else self.train_dataset

    def make_task_loss(self) -> None:
        """Takes from the training set what the loss needs of it."""
        self.task_loss = self.model.training_loss(self.train_dataset, self.args, self.compute_loss_func)

    def _train_on_embedded(self, embedded: Any) -> None:
        self.train_images, self.embedded = self.train_dataset, self._rows(embedded, "train_dataset")
        self.train_dataset = self.embedded

    def _add_terms(self) -> None:
        """Keeps of θ₀ what training will need, before a checkpoint to resume from replaces its weights."""
        args, cached = self.args, self.args.cache_reference_embeddings
        with self.accelerator.autocast():  # as in training
            add_terms(self.model, losses_of(args.losses, self.losses), cached, StartingPoint(self.zero_shot))
            check_sharded(self.accelerator, self.model)
            if cached and self.train_dataset is not None:
                how = self.data_collator, args.eval_batch_size, args.dataloader_num_workers, self._is_silent()
                with args.main_process_first(desc="embedding the training set"):
                    embedded = with_reference_embeds(self.train_dataset, self.model.model, *how)
                self._train_on_embedded(embedded)

    def start_anew(self, trial: Any = None) -> None:
        """Makes a new model, by the settings of a trial where there is one.

        Args:
            trial: of a search.
        """
        if trial is not None:  # the settings first, as the task may be built by some of them
            vars(self.args).update({**self.arguments_given, **self.hp_space(trial)})
            self.args.__post_init__()  # checks them, and what follows from them
            self._hp_search_setup(trial)
        self.model = self.model_wrapped = self.as_task(_made(self.model_init, self.args, trial))
        self.callback_handler.model = self.model
        if self.place_model_on_device:
            self._move_model_to_device(self.model, self.args.device)
        self.keep_start()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, WiSEFTCallback):
                callback.zero_shot = self.zero_shot

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] = "minimize",
        backend: str | None = None,
        hp_name: Callable[[Any], str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Trains with several settings, each from a new model, and returns the best settings; by Optuna.

        Afterwards the trainer has the settings and the untrained model it had before.

        Args:
            hp_space: takes a trial and returns values by the names of `RobustTrainingArguments`.
            compute_objective: takes the metrics; by default the loss on the evaluation set, or of several sets on the
                one named `validation`.
            n_trials: number of trainings.
            direction: `"minimize"` or `"maximize"` the objective.
            backend: `"optuna"`.
            hp_name: takes a trial and returns the name of its folder; by default `run-<number>`.
            kwargs: passed on to `optuna.create_study`, as in `Trainer`.

        Raises:
            ConfigError: there is no `model_init` or no validation set, the backend is another one or is not installed,
                or a name is none of an argument.

        Example:
            >>> def space(trial):
            ...     return {"learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-3, log=True)}
            >>> trainer = RobustTrainer(model_init=lambda: get_peft_model(load_clip(), SAFTConfig()), ...)
            >>> trainer.hyperparameter_search(space, n_trials=10).hyperparameters
            {'learning_rate': 0.00031}
        """
        if self.model_init is None:
            remedy = "Pass model_init, a function that returns a new model, in the place of model."
            raise ConfigError("every trial starts from a new model", where="hyperparameter_search", remedy=remedy)
        if backend not in (None, "optuna"):
            raise ConfigError("no other backend is tested", where="backend", got=backend, allowed="'optuna'")
        with needs_extra("search"):
            import optuna  # noqa: F401
        objective = compute_objective or self._validation_loss()
        space = None if hp_space is None else lambda trial: self._checked(hp_space(trial))
        self.arguments_given = dict(vars(self.args))
        try:
            return super().hyperparameter_search(
                space, objective, n_trials, direction, backend="optuna", hp_name=hp_name, **kwargs
            )
        finally:
            self.hp_search_backend = None
            vars(self.args).update(self.arguments_given)
            self._train_batch_size = self.args.train_batch_size
            self.create_accelerator_and_postprocess()
            self.start_anew()

    def _validation_loss(self) -> Callable[[dict[str, float]], float]:
        several = isinstance(self.eval_dataset, dict)
        if self.eval_dataset is None or (several and "validation" not in self.eval_dataset):
            what, got = "settings are chosen on validation data", sorted(self.eval_dataset or {})
            remedy = "Name an evaluation set 'validation', or pass compute_objective."
            raise ConfigError(what, where="eval_dataset", got=got, remedy=remedy)
        if self.own_metrics and not self.model.batch_loss:
            what, remedy = "with compute_metrics the task has no loss of a set", "Pass compute_objective."
            raise ConfigError(what, where="compute_metrics", remedy=remedy)
        name = "eval_validation_loss" if several else "eval_loss"
        return lambda metrics: metrics[name]

    def _checked(self, values: dict[str, Any]) -> dict[str, Any]:
        if "image_size" in values:
            what, remedy = "the processor is made once, for one size of images", "Use a trainer for each size."
            raise ConfigError(what, where="hp_space", got="image_size", remedy=remedy)
        known = [field.name for field in fields(self.args)]
        for name in values:
            if name not in known:
                remedy = close_matches(name, known)
                raise ConfigError("no such argument to search over", where="hp_space", got=name, remedy=remedy)
        return values
