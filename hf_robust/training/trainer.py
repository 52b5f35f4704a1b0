# SPDX-License-Identifier: Apache-2.0
"""`transformers.Trainer` for zero-shot classifiers: images and class names in, a fine-tuned dual encoder out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import EvalPrediction, ProcessorMixin, TrainerCallback
from transformers.trainer_utils import TrainOutput

from ..data.class_spaces import class_space
from ..data.collator import ImageCollator, OpeningCollator, batches_in_order, n_images
from ..data.columns import REFERENCE_EMBEDS
from ..data.embeds_cache import is_cacheable, pretrained_image_embeds, with_image_embeds, with_reference_embeds
from ..data.rows import LabelledStream, labelled_images
from ..errors import ConfigError, NonFiniteError
from ..interpolation.adapters import zero_shot_copy
from ..losses.log import LossLog
from ..losses.reference import Reference
from ..ogen import OGENClassifier, OGENConfig, Prototypes, class_prototypes
from ..ogen.training import OGENTraining
from ..tasks.class_names import ZeroShotClassifier
from ..tuners.saft import mask_summary, saft_unselected, select_saft
from ..tuners.saft.selection import scores_single_images
from .accuracy import accuracy_and_loss
from .arguments import RobustTrainingArguments
from .evaluating import EvaluatingTrainer, Metrics, Rows
from .image_size import processor_of_size
from .preflight import check_arguments, check_best_metric, check_training

logger = logging.getLogger(__name__)
ClassNames = Sequence[str] | Mapping[str | int, str]


class RobustTrainer(EvaluatingTrainer):
    """Fine-tunes a dual encoder as a zero-shot classifier, whole or through any PEFT method.

    Datasets are what `labelled_images` takes. An evaluation set with the classes of the training set, or some of them,
    is answered by the same head, one with any other class by a zero-shot head from the current text tower, see
    `ZeroShotClassifier.classes`. Every evaluation set gives `eval_<name>_accuracy` and `eval_<name>_loss` (a fraction
    and nats). A SAFT adapter without entries gets them, from the training set, when training starts. With a
    `similarity_weight` the embeddings are held near those of the pre-trained model: the one given here, without its
    adapters. Every term of the loss is logged as `loss_<term>`.

    With `ogen`, features of classes without images are generated in training, see `OGENConfig`. The vision tower is
    not trained then, so the training images are embedded once, unless they may look different every time.

    Of a model that is trained whole it keeps the zero-shot weights in CPU memory, for WiSE-FT.

    A saved model is the adapter's folder (without adapter, the whole model's) with the processor, the class names, the
    classifier's own weights and a card beside it; the card shows the results of `wise_ft_sweep`.

    Args:
        model: a `ZeroShotClassifier`, or a dual encoder, plain or `PeftModel`, that one is then built around with
            `args.templates` and `args.head`.
        args: the training arguments.
        train_dataset: images with labels.
        eval_dataset: one evaluation set, or several by name.
        processing_class: the model's processor; with `args.image_size` a copy of it is used.
        class_names: words for the prompts, in label order, or by the names that the training set has for its classes,
            see `class_space`; by default these names, with underscores read as blanks.
        ogen: settings of OGEN, see `OGENConfig`; None for training without it.
        data_collator: by default an `ImageCollator`; its `transform` is used in training alone. Another collator gets
            rows whose images are opened.
        compute_metrics: as in `Trainer`, gets logits and labels; by default accuracy and cross-entropy.
        callbacks: as in `Trainer`.
        optimizers: as in `Trainer`.
        preprocess_logits_for_metrics: as in `Trainer`.

    Raises:
        ConfigError: the model is no dual encoder, a setting is wrong, or class names are missing.
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
        model: nn.Module,
        args: RobustTrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        class_names: ClassNames | None = None,
        ogen: OGENConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Tensor]] | None = None,
        compute_metrics: Callable[[EvalPrediction], Metrics] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        check_arguments(args, processing_class)
        processing_class = processor_of_size(args.image_size, processing_class, model, data_collator)
        order = class_names if isinstance(class_names, Sequence) else None
        train_rows = None if train_dataset is None else labelled_images(train_dataset, "train_dataset", order=order)
        if not isinstance(model, ZeroShotClassifier):
            model = _classifier(model, processing_class, train_rows, class_names, args, ogen)
        else:
            _check_brings_its_own(model, train_rows, ogen=ogen, class_names=class_names)
        model.processor = processing_class  # its card shows how images are prepared
        super().__init__(
            model=model,
            args=args,
            data_collator=_collator(data_collator, processing_class),
            train_dataset=train_rows,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics or accuracy_and_loss,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.label_names = ["labels"]  # found by signature, which a subclass of the classifier may have changed
        self.can_return_loss = True
        self.loss_log = LossLog()
        self._take_datasets()
        check_best_metric(args, self.eval_dataset, own_metrics=compute_metrics is not None)
        self.zero_shot = zero_shot_copy(self.model)
        self.reference = self._make_reference() if args.similarity_weight > 0 else None

    def _take_datasets(self) -> None:
        if self.train_dataset is not None:
            self.train_dataset = self._rows(self.train_dataset, "train_dataset")
        if isinstance(self.eval_dataset, Mapping):
            self.eval_dataset = self._sets(self.eval_dataset)
        elif self.eval_dataset is not None:
            self.eval_dataset = self._rows(self.eval_dataset, "eval_dataset")

    def _make_reference(self) -> Reference:
        """Keeps of θ₀ what training will need, before a checkpoint to resume from replaces its weights."""
        args, cached = self.args, self.args.cache_reference_embeddings
        with self.accelerator.autocast():  # as in training
            reference = Reference.of(self.model, args.similarity_loss(), cached)
            if cached and self.train_dataset is not None:
                how = self.data_collator, args.eval_batch_size, args.dataloader_num_workers, self._is_silent()
                with args.main_process_first(desc="embedding the training set"):
                    embedded = with_reference_embeds(self.train_dataset, self.model.model, *how)
                self.train_dataset = labelled_images(embedded, "train_dataset")
        return reference

    # --- training ---

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trains; a SAFT adapter without entries gets them first, unless a checkpoint to resume from brings them.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the last one in `args.output_dir`.
            trial: as in `Trainer.train`.
            ignore_keys_for_eval: as in `Trainer.train`.
        """
        if self.train_dataset is None:
            raise ConfigError("no set to train on", where="train_dataset")
        self.train_dataset = self._rows(self.train_dataset, "train_dataset")
        self._unprepare()
        self.sweep = None
        if isinstance(self.model, OGENClassifier):
            self._embed_training_set()
            self.ogen = OGENTraining(self.model)
            self.model.set_prototypes(self._compute_prototypes())
        if not resume_from_checkpoint and saft_unselected(self.model):
            self.select_entries()
        check_training(self.model, self.train_dataset)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _unprepare(self) -> None:
        """Takes back what `evaluate` did to the model.

        Accelerate takes a model that was prepared for evaluation for one prepared for training: it would not be
        wrapped in DistributedDataParallel, and every rank would train its own. Entries are ranked without autocast.
        """
        if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            self.model = self.model_wrapped = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.model._is_accelerate_prepared = False

    def select_entries(self) -> None:
        """Selects the entries of the active SAFT adapter by the cross-entropy of the training set."""
        self._unprepare()
        select_saft(self.model, self._selection_batches(), lambda model, batch: model(**batch).loss)
        if self.is_world_process_zero():
            logger.info(mask_summary(self.model))

    def _selection_batches(self) -> Iterator[dict[str, Tensor]]:
        size = 1 if scores_single_images(self.model) else self.args.selection_batch_size
        for batch in self._own_share(self.train_dataset, size, "Selecting entries"):
            yield {name: tensor for name, tensor in batch.items() if name != REFERENCE_EMBEDS}

    def _embed_training_set(self) -> None:
        """Images that are the same every time are embedded once, as OGEN's vision tower is not trained."""
        if is_cacheable(self.train_dataset, self.data_collator):
            image_processor, size = self.data_collator.image_processor, self.args.eval_batch_size
            how = image_processor, size, self.args.dataloader_num_workers, self._is_silent()
            with self.args.main_process_first(desc="embedding the training set"), self.accelerator.autocast():
                embedded = with_image_embeds(self.train_dataset, self.model.model, *how)
            self.train_dataset = labelled_images(embedded, "train_dataset")

    def _compute_prototypes(self) -> Prototypes:
        batches = self._own_share(self.train_dataset, self.args.eval_batch_size, "Computing prototypes")
        features = ((pretrained_image_embeds(self.model.model, batch), batch["labels"]) for batch in batches)
        with self.accelerator.autocast():
            return class_prototypes(features, self.model.class_names)

    def _own_share(self, dataset: Any, batch_size: int, title: str) -> Iterator[dict[str, Tensor]]:
        """Yields this rank's share of a set, in order and without the copies that even batches need."""
        if isinstance(dataset, LabelledStream):
            what, allowed = f"{title}: ranks cannot share a dataset without length", "a dataset with numbered rows"
            raise ConfigError(what, where="train_dataset", got=type(dataset).__name__, allowed=allowed)
        share = range(self.accelerator.process_index, len(dataset), self.accelerator.num_processes)
        how = batch_size, self.args.dataloader_num_workers, next(self.model.parameters()).device
        title_or_none = None if self._is_silent() else title
        yield from batches_in_order(Subset(dataset, share), self._plain_collator(), *how, title_or_none)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], int | None]:
        """Returns the micro-batches of one optimizer step and their number of images."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
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
            model: the classifier, as Accelerate wrapped it.
            inputs: what the data collator returned.
            return_outputs: also return the classifier's output.
            num_items_in_batch: images of all micro-batches of this optimizer step; None in evaluation.
        """
        if self.ogen is not None and self.model.training:
            with self.accelerator.autocast():
                self.ogen.start_epoch(int(self.state.epoch), self.state.num_train_epochs)
        outputs = model(**{name: tensor for name, tensor in inputs.items() if name != REFERENCE_EMBEDS})
        terms = self.loss_terms(outputs, inputs)
        loss = torch.stack(list(terms.values())).sum()
        if num_items_in_batch is not None:
            # the Trainer divides by the number of micro-batches, which is right where they are equally large
            loss = n_images(inputs) * self.current_gradient_accumulation_steps / num_items_in_batch * loss
            self.loss_log.add(terms, share=n_images(inputs) / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def loss_terms(self, outputs: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the terms of the loss by name, each a mean over the images; override it to add your own.

        Args:
            outputs: what the classifier returned.
            inputs: what the data collator returned.
        """
        terms = {"cross_entropy": outputs.loss}
        if self.ogen is not None and self.model.training:
            terms = self.ogen.terms(outputs)
        if self.reference is not None and self.model.training:
            with self.accelerator.autocast():
                terms |= self.reference.terms(outputs, inputs, self.state.global_step / self.state.max_steps)
        return terms

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Runs forward and backward on a micro-batch; stops all ranks if the loss of one is not finite."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        for rank, value in enumerate(self.accelerator.gather(loss.reshape(1)).tolist()):
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


def _classifier(
    model: nn.Module,
    processor: ProcessorMixin,
    train_rows: Rows | None,
    class_names: ClassNames | None,
    args: RobustTrainingArguments,
    ogen: OGENConfig | None,
) -> ZeroShotClassifier:
    space = class_space(None if train_rows is None else train_rows.class_names, class_names, "class_names")
    if ogen is None:
        return ZeroShotClassifier(model, processor, space.words, args.templates, args.head, space.data_names)
    if args.head != "live":
        raise ConfigError("OGEN trains the text tower", where="head", got=args.head, allowed="'live'")
    return OGENClassifier(model, processor, space.words, ogen, args.templates, space.data_names)


def _check_brings_its_own(classifier: ZeroShotClassifier, train_rows: Rows | None, **settings: Any) -> None:
    """A classifier that the user has built has its own classes, which the training set's have to be."""
    for name, value in settings.items():
        if value is not None:
            remedy = "Pass the dual encoder itself, or leave the setting out."
            raise ConfigError("a classifier brings its own settings", where=name, got=value, remedy=remedy)
    names = None if train_rows is None else train_rows.class_names
    if names is not None and classifier.class_space.relate(names).kind != "same":
        classifier.class_space = class_space(names, classifier.class_names, "class_names")


def _collator(given: Any, processor: ProcessorMixin) -> Any:
    if given is None:
        return ImageCollator(processor)
    return given if isinstance(given, ImageCollator) else OpeningCollator(given)
