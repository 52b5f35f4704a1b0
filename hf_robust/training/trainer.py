# SPDX-License-Identifier: Apache-2.0
"""`transformers.Trainer` for zero-shot classifiers: images and class names in, a fine-tuned dual encoder out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm
from transformers import EvalPrediction, ProcessorMixin, ProgressCallback, TrainerCallback
from transformers.trainer_utils import TrainOutput

from ..cards.results import CardResults, results_from_sweep, role_of
from ..data.collator import (
    IMAGE_EMBEDS,
    REFERENCE_EMBEDS,
    ImageCollator,
    batches_in_order,
    check_dataset,
    feature_class_names,
    n_images,
)
from ..data.embeds_cache import is_cacheable, pretrained_image_embeds, with_image_embeds, with_reference_embeds
from ..encoders.pretrained import check_vision_is_pretrained
from ..errors import ConfigError, NonFiniteError
from ..interpolation.adapters import zero_shot_copy
from ..interpolation.sweep import AlphaSweep, alpha_sweep
from ..losses.log import LossLog
from ..losses.reference import Reference
from ..ogen import OGENClassifier, OGENConfig, Prototypes, class_prototypes
from ..ogen.training import OGENTraining
from ..tasks.class_names import ZeroShotClassifier
from ..tuners.saft import mask_summary, saft_unselected, select_saft
from ..tuners.saft.selection import scores_single_images
from .accuracy import accuracy_and_loss
from .arguments import RobustTrainingArguments
from .image_size import processor_of_size
from .saving import SavingTrainer

TENTHS = tuple(step / 10 for step in range(11))
SPEEDS = ("_runtime", "_per_second", "epoch", "_preparation_time")  # what Trainer adds to the metrics
Metrics = dict[str, float]


class RobustTrainer(SavingTrainer):
    """Fine-tunes a dual encoder as a zero-shot classifier, whole or through any PEFT method.

    Datasets have the columns `image` and `label`. An evaluation set whose `label` feature has other class names than
    the training set is classified among its own, by a zero-shot head from the current text tower. Every evaluation
    set gives `eval_<name>_accuracy` and `eval_<name>_loss` (a fraction and nats). A SAFT adapter without entries gets
    them, from the training set, when training starts. With a `similarity_weight` the embeddings are held near those of
    the pre-trained model: the one given here, without its adapters. Every term of the loss is logged as `loss_<term>`.

    With `ogen`, features of classes without images are generated in training, see `OGENConfig`. The vision tower is
    not trained then, so the training images are embedded once, unless they may look different every time.

    Of a model that is trained whole it keeps the zero-shot weights in CPU memory, for WiSE-FT.

    A saved model is the adapter's folder (without adapter, the whole model's) with the processor, the class names, the
    classifier's own weights and a card beside it; the card shows the results of `wise_ft_sweep`.

    Args:
        model: a `ZeroShotClassifier`, or a dual encoder, plain or `PeftModel`, that one is then built around with
            `args.templates` and `args.head`.
        args: the training arguments.
        train_dataset: rows of `{"image", "label"}`; see `ImageCollator` for what an image may be.
        eval_dataset: one evaluation set, or several by name.
        processing_class: the model's processor; with `args.image_size` a copy of it is used.
        class_names: names in label order; by default those of the training set's `label` feature.
        ogen: settings of OGEN, see `OGENConfig`; None for training without it.
        data_collator: by default an `ImageCollator`.
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
    eval_dataset: Any
    data_collator: Any
    sweep: AlphaSweep | None = None

    def __init__(
        self,
        model: nn.Module,
        args: RobustTrainingArguments,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: ProcessorMixin | None = None,
        class_names: list[str] | None = None,
        ogen: OGENConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Tensor]] | None = None,
        compute_metrics: Callable[[EvalPrediction], Metrics] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        if processing_class is None:
            raise ConfigError("RobustTrainer needs the model's processor", where="processing_class")
        processing_class = processor_of_size(args.image_size, processing_class, model, data_collator)
        if not isinstance(model, ZeroShotClassifier):
            class_names = class_names or feature_class_names(train_dataset)
            if class_names is None:
                remedy = "Pass class_names, or make the dataset's label column a ClassLabel."
                raise ConfigError("class names are missing", where="class_names", remedy=remedy)
            model = _classifier(model, processing_class, class_names, args, ogen)
        elif ogen is not None:
            remedy = "Pass the dual encoder itself, or an OGENClassifier."
            raise ConfigError("a classifier brings its own settings", where="ogen", got=ogen, remedy=remedy)
        model.processor = processing_class  # its card shows how images are prepared
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or ImageCollator(processing_class),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics or accuracy_and_loss,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        if args.n_gpu > 1:
            remedy = "Start the script with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one."
            raise ConfigError("one process cannot train on several GPUs", got=args.n_gpu, allowed="1", remedy=remedy)
        self.label_names = ["labels"]  # found by signature, which a subclass of the classifier may have changed
        self.can_return_loss = True
        self.loss_log = LossLog()
        self._check_datasets()
        self.zero_shot = zero_shot_copy(self.model)
        self.reference = self._make_reference() if args.similarity_weight > 0 else None

    def _make_reference(self) -> Reference:
        """Keeps of θ₀ what training will need, before a checkpoint to resume from replaces its weights."""
        args, cached = self.args, self.args.cache_reference_embeddings
        with self.accelerator.autocast():  # as in training
            reference = Reference.of(self.model, args.similarity_loss(), cached)
            if cached and self.train_dataset is not None:
                how = self.data_collator, args.eval_batch_size, args.dataloader_num_workers, self._is_silent()
                with args.main_process_first(desc="embedding the training set"):
                    self.train_dataset = with_reference_embeds(self.train_dataset, self.model.model, *how)
        return reference

    def _check_datasets(self) -> None:
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval_dataset": self.eval_dataset}
        for name, dataset in {"train_dataset": self.train_dataset, **sets}.items():
            if dataset is not None:
                self._check_dataset(dataset, name)

    def _check_dataset(self, dataset: Dataset, where: str) -> None:
        check_dataset(dataset, len(self._class_names(dataset) or self.model.class_names), where)
        if isinstance(dataset, datasets.Dataset) and IMAGE_EMBEDS in dataset.column_names:
            check_vision_is_pretrained(self.model.model, f"{where} has image embeddings in the place of images")

    def _class_names(self, dataset: Dataset) -> list[str] | None:
        """Returns the class names of a dataset if it needs another head than the training set, else None."""
        names = feature_class_names(dataset)
        known = (None, list(self.model.class_names), feature_class_names(self.train_dataset))
        return None if names in known else names

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
        self._unprepare()
        self.sweep = None
        if isinstance(self.model, OGENClassifier):
            self._embed_training_set()
            self.ogen = OGENTraining(self.model)
            self.model.set_prototypes(self._compute_prototypes())
        if not resume_from_checkpoint and saft_unselected(self.model):
            self.select_entries()
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
            print(mask_summary(self.model))

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
                self.train_dataset = with_image_embeds(self.train_dataset, self.model.model, *how)

    def _compute_prototypes(self) -> Prototypes:
        batches = self._own_share(self.train_dataset, self.args.eval_batch_size, "Computing prototypes")
        features = ((pretrained_image_embeds(self.model.model, batch), batch["labels"]) for batch in batches)
        with self.accelerator.autocast():
            return class_prototypes(features, self.model.class_names)

    def _own_share(self, dataset: Any, batch_size: int, title: str) -> Iterator[dict[str, Tensor]]:
        """Yields this rank's share of a set, in order and without the copies that even batches need."""
        if isinstance(dataset, datasets.IterableDataset | torch.utils.data.IterableDataset):
            what, allowed = f"{title}: ranks cannot share a dataset without length", "a dataset with numbered rows"
            raise ConfigError(what, where="train_dataset", got=type(dataset).__name__, allowed=allowed)
        share = range(self.accelerator.process_index, len(dataset), self.accelerator.num_processes)
        how = batch_size, self.args.dataloader_num_workers, next(self.model.parameters()).device
        title_or_none = None if self._is_silent() else title
        yield from batches_in_order(Subset(dataset, share), self.data_collator, *how, title_or_none)

    def _is_silent(self) -> bool:
        return self.args.disable_tqdm or not self.is_local_process_zero()

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

    # --- evaluation ---

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Metrics:
        """Evaluates one or several sets, each with the head for its class names.

        Args:
            eval_dataset: a set, or sets by name, or a name among those given at construction (default: all of these).
            ignore_keys: outputs of the classifier to leave out; by default all but the logits.
            metric_key_prefix: first part of every metric's name.

        Returns:
            Metrics by name, `eval_<name>_accuracy` among them.

        Raises:
            DataError: a set is empty, lacks a column, or has a label outside its class names.
            NonFiniteError: a logit is NaN or infinite.
        """
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(given, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # calls this method for each
        dataset = self.eval_dataset[given] if isinstance(given, str) else given
        with self._head_for(dataset, metric_key_prefix):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if not math.isfinite(metrics[f"{metric_key_prefix}_loss"]):
            raise NonFiniteError("logits are not finite", where=metric_key_prefix)
        return metrics

    def wise_ft_sweep(
        self,
        validation_dataset: Dataset | None = None,
        alphas: Sequence[float] = TENTHS,
        metric: str = "accuracy",
        greater_is_better: bool = True,
    ) -> AlphaSweep:
        """Evaluates the trained model at θ₀ + α Δ, and leaves it at the α that is best on validation data.

        Args:
            validation_dataset: what α is chosen on; by default the evaluation set named `validation`. The other
                evaluation sets are evaluated beside it and have no say.
            alphas: the α to evaluate, fractions in [0, 1].
            metric: what to choose by, `"accuracy"` or what `compute_metrics` returns.
            greater_is_better: False where that is a loss.

        Returns:
            For every α the metrics `<set>_accuracy`, `<set>_loss`, …, and the chosen α. `wise_ft(trainer.model, alpha,
            trainer.zero_shot)` sets another.

        Raises:
            ConfigError: there is no validation set, or what `alpha_sweep` raises.
        """
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        sets = {name: dataset for name, dataset in sets.items() if dataset is not None}
        if validation_dataset is not None:
            sets = {"validation": validation_dataset, **{n: d for n, d in sets.items() if n != "validation"}}
        if "validation" not in sets:
            raise ConfigError("alpha is chosen on validation data", where="validation_dataset", got=sorted(sets))

        bar = tqdm(total=len(alphas), desc="Evaluating over alpha", disable=self._is_silent())

        def evaluate(model: nn.Module) -> Metrics:
            found = self.evaluate(sets)
            bar.update()
            return {key.removeprefix("eval_"): found[key] for key in found if not key.endswith(SPEEDS)}

        bars_of_sets = self.pop_callback(ProgressCallback)
        try:
            how = f"validation_{metric}", self.zero_shot, greater_is_better
            self.sweep = alpha_sweep(self.model, alphas, evaluate, *how)
            return self.sweep
        finally:
            bar.close()
            if bars_of_sets is not None:
                self.add_callback(bars_of_sets)

    def card_results(self) -> CardResults | None:
        """Returns what `wise_ft_sweep` found on the evaluation sets that α was not chosen on; None without a sweep."""
        sets: dict[str, Any] = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        shown = [name for name, dataset in sets.items() if name != "validation" and isinstance(dataset, Sized)]
        if self.sweep is None or not shown:
            return None
        roles = {name: role_of(name, self._class_names(sets[name]) is not None) for name in shown}
        return results_from_sweep(self.sweep, {name: (role, len(sets[name])) for name, role in roles.items()})

    def _head_for(self, dataset: Dataset, where: str) -> AbstractContextManager:
        names = self._class_names(dataset)
        self._check_dataset(dataset, where)
        return nullcontext() if names is None else self.model.classes(names)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns loss, logits and labels of a batch."""
        ignore_keys = ["image_embeds", "class_embeds"] if ignore_keys is None else ignore_keys
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)


def _classifier(
    model: nn.Module,
    processor: ProcessorMixin,
    class_names: list[str],
    args: RobustTrainingArguments,
    ogen: OGENConfig | None,
) -> ZeroShotClassifier:
    if ogen is None:
        return ZeroShotClassifier(model, processor, class_names, args.templates, args.head)
    if args.head != "live":
        raise ConfigError("OGEN trains the text tower", where="head", got=args.head, allowed="'live'")
    return OGENClassifier(model, processor, class_names, ogen, args.templates)
