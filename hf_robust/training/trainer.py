# SPDX-License-Identifier: Apache-2.0
"""`transformers.Trainer` for dual encoders: images with labels, texts or identities in, a fine-tuned model out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from ..cards.found import Found
from ..data.collator import ImageCollator, OpeningCollator, n_images
from ..data.rows import labelled_images
from ..errors import ConfigError, DataError, NonFiniteError
from ..losses.log import LossLog
from ..losses.term import Term
from ..tasks.choose import target_of
from ..tasks.task import Progress
from ..tuners.saft.edits import show_values
from .after_step import AfterStep
from .arguments import RobustTrainingArguments
from .checkpoint import check_not_base
from .evaluating import Metrics
from .image_size import processor_of_size
from .learning_rates import with_learning_rate
from .model_init import ClassNames, as_task, model_or_first
from .preflight import check_arguments, check_best_metric, check_length, check_metrics, check_targets, check_trained
from .ranks import raise_on_all
from .replaced import replaced
from .starting import StartingTrainer
from .stopping import StopAtSignal
from .unsupported import check_accelerator, check_optimizer, check_options, check_sharding


class RobustTrainer(StartingTrainer):
    """Fine-tunes a dual encoder, whole or through any PEFT method, on the task that its training set is of.

    Datasets are what `labelled_images` takes. What rows have beside their images says the task, see
    `hf_robust.tasks.choose`, unless `args.task` does. Every evaluation set gives the metrics of the task, as
    `eval_<name>_accuracy` and `eval_<name>_loss` (a fraction and nats) of class names. There a set with the classes of
    the training set, or some of them, is answered by the same head, one with any other class by a zero-shot head from
    the current text tower, see `ZeroShotClassifier.classes`. A SAFT adapter without entries gets them, from the
    training set, when training starts.

    Terms are added to the loss by `losses`, here or in the arguments. What they compare with is the pre-trained model:
    the one given here, without its adapters. Each is logged as `loss_<term>`. For a term that needs the vision tower
    as it is, the training images are embedded once, unless they may look different every time.

    Of a model that is trained whole it keeps the zero-shot weights in CPU memory, for WiSE-FT.

    A saved model is the adapter's folder (without adapter, the whole model's) with the task's settings, its
    own tensors and a card beside it, which shows what `evaluate` and `wise_ft_sweep` found. The processor lies beside
    a whole model, and in an adapter's folder in the subfolder `processor`.

    Args:
        model: a `Task`, or a dual encoder, plain or `PeftModel`, that one is then built around with the settings of
            `args`.
        args: the training arguments; without a learning rate in them it is that of the method, see `method_rate`.
        data_collator: by default an `ImageCollator`; its `transform` is used in training alone. Another collator gets
            rows whose images are opened.
        train_dataset: images with labels, texts or identities.
        eval_dataset: one evaluation set, or several by name.
        processing_class: the model's processor; with `args.image_size` a copy of it is used.
        model_init: in the place of `model`, a function that returns one, without argument or with the trial of a
            search. Every training then starts from a new model; for `hyperparameter_search`.
        compute_loss_func: takes the place of the task's loss in training, see `TaskLoss`; the other terms are added.
            Evaluation is by the task's own.
        compute_metrics: as in `Trainer`, gets logits (for pairs and identities embeddings) and labels; by default what
            the task measures.
        callbacks: as in `Trainer`.
        optimizers: as in `Trainer`.
        optimizer_cls_and_kwargs: as in `Trainer`.
        preprocess_logits_for_metrics: as in `Trainer`, for a `compute_metrics`.
        class_names: words for the prompts, in label order, or by the names that the training set has for its classes,
            see `class_space`; by default these names, with underscores read as blanks.
        losses: terms that are added to the loss, see `Term`: `SimilarityLoss`, `OGENLoss` or your own, beside those of
            `args.losses`. The trainer uses copies, which are `trainer.model.terms`.

    Raises:
        ConfigError: the model is no dual encoder, a setting is wrong or not served, or class names are missing.
        DataError: a dataset is empty, lacks a column, or has a label outside its class names.

    Example:
        >>> model = get_peft_model(clip, SAFTConfig(density=0.001))
        >>> trainer = RobustTrainer(
        ...     model=model,
        ...     args=RobustTrainingArguments("runs/saft", templates="a drawing of a {}.", learning_rate=1e-3),
        ...     train_dataset=train,
        ...     eval_dataset={"id": drawings, "ood_line": line_art},
        ...     processing_class=processor,
        ... )
        >>> zero_shot = trainer.evaluate()
        >>> trainer.train()
        >>> trainer.evaluate()["eval_ood_line_accuracy"]
    """

    loss_is_scaled_for_ga = False  # `compute_loss` returns the mean over a micro-batch

    def __init__(
        self,
        model: nn.Module | None = None,
        args: RobustTrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Tensor]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., nn.Module] | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[..., Metrics] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        class_names: ClassNames | None = None,
        losses: Sequence[Term] | None = None,
    ) -> None:
        args = RobustTrainingArguments() if args is None else args
        check_arguments(args, processing_class)
        check_options(args)  # they may have been changed since
        check_metrics(compute_metrics, preprocess_logits_for_metrics)
        encoder = model_or_first(model, model_init, args, optimizers)
        args = with_learning_rate(args, encoder)
        processing_class = processor_of_size(args.image_size, processing_class, encoder, data_collator)
        order = class_names if isinstance(class_names, Sequence) else None
        target = target_of(args.task, encoder)
        train_rows = None
        if train_dataset is not None:
            train_rows = labelled_images(train_dataset, "train_dataset", order=order, target=target)
            check_targets(train_rows)
            check_length(train_rows, args)
        self.as_task = partial(as_task, processing_class, train_rows, class_names, args)
        with replaced(args, label_smoothing_factor=0.0):  # `Trainer` would look for the config of a language model
            super().__init__(
                model=self.as_task(encoder),
                args=args,
                data_collator=_collator(data_collator, processing_class),
                train_dataset=train_rows,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_loss_func=compute_loss_func,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            )
        self.model_init = model_init  # type: ignore[assignment]  # of any module, not of a PreTrainedModel alone
        check_accelerator(self.accelerator, args)
        check_sharding(self.accelerator, self.model, optimizers)
        check_optimizer(self.optimizer, self.model)
        self.losses, self.target = losses, self.model.target  # a search takes the model away between its trials
        self.own_metrics = compute_metrics is not None
        self.label_names = list(self.model.label_names)
        self.can_return_loss = True
        self.loss_log, self.found = LossLog(), Found(self.model.metrics)
        self.optimizers_given = [type(one).__name__ for one in optimizers if one is not None]
        self.stop = StopAtSignal()
        self.add_callback(self.stop)
        self.add_callback(AfterStep())
        self._take_datasets()
        check_best_metric(args, self.eval_dataset, self.model, self.own_metrics)
        self.keep_start()

    def _take_datasets(self) -> None:
        if self.train_dataset is not None:
            self.train_dataset = self._rows(self.train_dataset, "train_dataset")
        if isinstance(self.eval_dataset, Mapping):
            self.eval_dataset = self._sets(self.eval_dataset)
        elif self.eval_dataset is not None:
            self.eval_dataset = self._evaluated(self.eval_dataset, "eval_dataset")

    # --- training ---

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trains; a SAFT adapter without entries gets them first, unless a checkpoint to resume from brings them.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the last whole one in `args.output_dir`.
            trial: as in `Trainer.train`.
            ignore_keys_for_eval: as in `Trainer.train`.

        Raises:
            CheckpointError: there is no checkpoint to resume from, it is damaged or of another run, or one cannot be
                saved.
            NonFiniteError: a loss or gradient is NaN or infinite.
            RankMismatchError: ranks train different models or on different data, or one has stopped.
            SystemExit: a signal has come, see `StopAtSignal`; a checkpoint has been saved.
        """
        if self.train_dataset is None:
            raise ConfigError("no set to train on", where="train_dataset")
        self.train_dataset = labelled_images(self.train_dataset, "train_dataset", target=self.target)
        with self.guarded(trial):
            resumes = resume_from_checkpoint is not None and resume_from_checkpoint is not False
            folder = self._checkpoint(resume_from_checkpoint, trial) if resumes else None
            return self._train(folder, trial, ignore_keys_for_eval)

    def _train(self, checkpoint: str | None, trial: Any, ignore_keys_for_eval: list[str] | None) -> TrainOutput:
        if self.model_init is None:
            self._unprepare()
        else:
            self.start_anew(trial)
        self.train_dataset = self._rows(self.train_dataset, "train_dataset")
        self.make_task_loss()  # the set may have been changed
        self.forget_model()
        self.loss_log = LossLog()
        check_not_base(self.model, Path(str(self.args.output_dir)))
        self._describe_run(checkpoint)
        self.model.progress, self.epoch_begun = Progress(seed=self.args.seed), -1
        self.model.check_training(self.train_dataset)  # before anything is computed of it
        self.begin(resumed=checkpoint is not None)
        check_trained(self.model)
        starts = self.args.eval_on_start and checkpoint is None
        try:
            with self._whole_batches(), replaced(self.args, eval_on_start=starts):  # a resumed run has had it
                return super().train(checkpoint, trial, ignore_keys_for_eval)
        except NonFiniteError:  # on all ranks at once, which gathering needs
            self.gather_shards()
            raise
        finally:
            self.is_in_train = False  # it would stay so after an error
            self.drop_shards()
            show_values(self.model)

    @contextmanager
    def _whole_batches(self) -> Iterator[None]:
        """Where the loss is over a whole batch, that of an optimizer step is one; its task computes it in chunks."""
        steps, rows = self.args.gradient_accumulation_steps, self._train_batch_size
        if not self.model.whole_batch or steps == 1:
            yield
            return
        with replaced(self.args, gradient_accumulation_steps=1), replaced(self, _train_batch_size=steps * rows):
            with replaced(self.model, rows_at_once=rows):
                yield

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], int | None]:
        """Returns the micro-batches of one optimizer step and their number of images."""
        batches: list[dict[str, Tensor]] = []
        problem = None
        try:
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
            if not batches and self.state.global_step == 0:  # of a stream, which has no length to be known by
                raise DataError("dataset is empty", where="train_dataset")
        except Exception as error:
            problem = error
        raise_on_all(problem, self.accelerator)
        return batches, sum(map(n_images, batches))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Returns the sum of the loss terms, weighted so that accumulated micro-batches equal one big batch.

        Args:
            model: the task, as Accelerate wrapped it.
            inputs: what the data collator returned.
            return_outputs: also return the task's output.
            num_items_in_batch: images of all micro-batches of this optimizer step on this rank; unused in evaluation.
        """
        if self.model.training:
            self._note_progress()
        with self.accelerator.autocast():  # which Accelerate puts around the forward, but not with FSDP2
            outputs = model(**inputs)
        if not self.model.training:  # evaluation is by the task's own loss
            num_items_in_batch = None  # `Trainer` counts them here, too, for a compute_loss_func
            if outputs.loss is None:  # of a task that has none for this set; its measure says how good it is
                outputs.loss = torch.zeros((), device=self.args.device)
        else:
            ranks = self.accelerator.num_processes  # which have equally many images
            images = n_images(inputs) if num_items_in_batch is None else num_items_in_batch * ranks
            targets = inputs.get(self.model.label_names[0])
            outputs.loss = self.task_loss(outputs, targets, images, n_images(inputs))
        terms = self.loss_terms(outputs, inputs)
        loss = torch.stack(list(terms.values())).sum()
        if num_items_in_batch is not None:
            # the Trainer divides by the number of micro-batches, which is right where they are equally large
            loss = n_images(inputs) * self.current_gradient_accumulation_steps / num_items_in_batch * loss
            self.loss_log.add(terms, share=n_images(inputs) / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _note_progress(self) -> None:
        state: Any = self.state
        progress = Progress(
            state.global_step, state.max_steps, int(state.epoch), state.num_train_epochs, self.args.seed
        )
        self.model.progress = progress
        if progress.epoch != self.epoch_begun:
            self.epoch_begun = progress.epoch
            with self.accelerator.autocast():
                for term in self.model.terms.values():
                    term.start_epoch(self.model, progress)

    def loss_terms(self, outputs: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the terms of the loss by name, each a mean over the images.

        Args:
            outputs: what the task returned.
            inputs: what the data collator returned.
        """
        if not outputs.terms:
            return {self.model.loss_name: outputs.loss}
        weight = math.prod(term.task_weight(self.model.progress) for term in self.model.terms.values())
        return {self.model.loss_name: weight * outputs.loss, **outputs.terms}

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Returns the names of the parameters that get weight decay, as in `Trainer`, less those the task excepts."""
        return [n for n in super().get_decay_parameter_names(model) if n not in self.model.without_decay()]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        own = self.model.sampler(self.train_dataset, self._train_batch_size, self.draws)
        return super()._get_train_sampler(train_dataset) if own is None else own

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Runs forward and backward on a micro-batch; stops all ranks if the loss of one is not finite."""
        self.has_trained = True
        loss = super().training_step(model, inputs, num_items_in_batch)
        signal = torch.full_like(loss, self.stop.received)
        of_ranks = self.accelerator.gather(torch.stack([loss, signal])[None]).tolist()  # (ranks, 2)
        for rank, (value, received) in enumerate(of_ranks):
            self.stop.agreed = max(self.stop.agreed, int(received))
            if not math.isfinite(value):
                self._stop(f"loss is {value}", rank)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None and not math.isfinite(norm):  # the fp16 scaler skips such a step by itself
            self._stop(f"gradient norm is {float(norm)}", rank=None)
        return norm

    def _stop(self, what: str, rank: int | None) -> None:
        where = f"step {self.state.global_step + 1}" + ("" if rank is None else f", rank {rank}")
        remedy = "The weights are those of the step before. Lower the learning rate, or look for broken images."
        raise NonFiniteError(what, where=where, remedy=remedy)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs; beside the training loss also the mean of each of its terms over steps and ranks."""
        if "loss" in logs:
            means = self.loss_log.pop_means()
            logs |= {f"loss_{name}": self.accelerator.gather(mean.reshape(1)).mean().item() for name, mean in means}
        super().log(logs, start_time)


def _collator(given: Any, processor: Any) -> Any:
    if given is None:
        return ImageCollator(processor)
    return given if isinstance(given, ImageCollator) else OpeningCollator(given)
