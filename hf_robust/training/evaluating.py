# SPDX-License-Identifier: Apache-2.0
"""How a trainer evaluates: every set among its own classes, from training to α-sweeps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import datasets
import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import ProgressCallback
from transformers.trainer_utils import PredictionOutput

from ..data.collator import ImageCollator
from ..data.draws import Draws
from ..data.readable import readable_rows
from ..data.rows import LabelledImages, labelled_images
from ..errors import ConfigError, DataError, NonFiniteError
from ..interpolation.sweep import AlphaSweep, alpha_sweep
from ..interpolation.tpgm import ProjectionTable, tpgm
from .noting import NotingTrainer
from .preflight import check_rows, lacks_targets
from .repeatable import Rows
from .replaced import replaced

TENTHS = tuple(step / 10 for step in range(11))
SPEEDS = ("_runtime", "_per_second", "epoch")  # what Trainer adds to the metrics
Metrics = dict[str, float]


class EvaluatingTrainer(NotingTrainer):
    """Evaluation, prediction and α-sweeps of a task; the base of `RobustTrainer`.

    Every set comes in through `_rows`, and is answered in `Task.answering`, among its own classes. What `Task.measure`
    computes of it needs no logits of a whole set; `predict` returns all of them.
    """

    eval_dataset: Any
    zero_shot: dict[str, Tensor] | None

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Metrics:
        """Evaluates one or several sets, each among its own classes, see `ZeroShotClassifier.classes`.

        What is found is shown by the cards of models that are saved, but for sets named `validation` or `train` and
        for one that is given without a name.

        Args:
            eval_dataset: a set, or sets by name, or a name among those given at construction (default: all of these).
            ignore_keys: outputs of the classifier to leave out; by default all but the logits.
            metric_key_prefix: first part of every metric's name.

        Returns:
            Metrics by name, `eval_<name>_accuracy` among them.

        Raises:
            ConfigError: there is no set.
            DataError: a set is empty, lacks a column, or has a label outside its class names.
            NonFiniteError: a logit is NaN or infinite.
        """
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if given is None:
            remedy = "Pass eval_dataset, here or to RobustTrainer."
            raise ConfigError("no set to evaluate on", where="eval_dataset", remedy=remedy)
        if isinstance(given, Mapping):
            sets: Any = self._sets(given)
            return super().evaluate(
                None if eval_dataset is None else sets, ignore_keys, metric_key_prefix
            )  # calls this method for each
        rows: Any = self._evaluated(self._named(given) if isinstance(given, str) else given, metric_key_prefix)
        with self.whole_model(), self._answering(rows, whole=False):
            metrics = super().evaluate(rows, ignore_keys, metric_key_prefix)
        if rows.skipped:
            metrics[f"{metric_key_prefix}_skipped_images"] = len(rows.skipped)
        if not math.isfinite(metrics.get(f"{metric_key_prefix}_loss", 0.0)):  # of which there may be none
            raise NonFiniteError("logits are not finite", where=metric_key_prefix)
        plain = {name.removeprefix(f"{metric_key_prefix}_"): value for name, value in metrics.items()}
        self.note(_name(eval_dataset, metric_key_prefix), rows, plain)
        return metrics

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Returns the logits for a set, with labels or without, and metrics where it has labels.

        Args:
            test_dataset: the set.
            ignore_keys: as in `evaluate`.
            metric_key_prefix: as in `evaluate`.

        Returns:
            `predictions` `(images, classes)`: the set's classes in the order of its labels, then those of the training
            set that it lacks, if all of its classes are among these; the set's alone otherwise. `label_ids`
            `(images,)`, and `metrics`, the same as `evaluate` gives.

        Raises:
            DataError: a set is empty, lacks images, or has a label outside its class names.
            NonFiniteError: a logit is NaN or infinite.
        """
        rows: Any = self._rows(test_dataset, metric_key_prefix, labels=False)
        with self.whole_model(), self._answering(rows, whole=True):
            output = super().predict(rows, ignore_keys, metric_key_prefix)
        predictions = output.predictions if isinstance(output.predictions, list) else [output.predictions]
        if not all(np.isfinite(logits).all() for logits in predictions if logits is not None):
            raise NonFiniteError("logits are not finite", where=metric_key_prefix)
        if rows.skipped and output.metrics is not None:
            output.metrics[f"{metric_key_prefix}_skipped_images"] = len(rows.skipped)
        return output

    def wise_ft_sweep(
        self,
        validation_dataset: Any = None,
        alphas: Sequence[float] = TENTHS,
        metric: str | None = None,
        greater_is_better: bool = True,
        tolerance: float = 0.0,
    ) -> AlphaSweep:
        """Evaluates the trained model at θ₀ + α Δ, and leaves it at the α that is best on validation data.

        Args:
            validation_dataset: what α is chosen on; by default the evaluation set named `validation`. The other
                evaluation sets are evaluated beside it and have no say.
            alphas: the α to evaluate, fractions in [0, 1].
            metric: what to choose by, of what the task measures or `compute_metrics` returns; by default what the task
                names first, the accuracy of class names.
            greater_is_better: False where that is a loss.
            tolerance: as in `alpha_sweep`: 0.02 takes the smallest α within 2 points of the best accuracy.

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
        sets = self._sets(sets)
        bar = tqdm(total=len(alphas), desc="Evaluating over alpha", leave=False, disable=self._is_silent())

        def evaluate(model: nn.Module) -> Metrics:
            found = self.evaluate(sets)
            bar.update()
            return {key.removeprefix("eval_"): found[key] for key in found if not key.endswith(SPEEDS)}

        bars_of_sets = self.pop_callback(ProgressCallback)
        try:
            how = f"validation_{metric or self.model.metrics[0]}", self.zero_shot, greater_is_better, tolerance
            with replaced(self, notes=False):
                found = alpha_sweep(self.model, alphas, evaluate, *how)
            self.note_sweep(sets, found)
            return found
        finally:
            bar.close()
            if bars_of_sets is not None:
                self.add_callback(bars_of_sets)

    def tpgm_sweep(
        self, validation_dataset: Any = None, steps: int = 200, learning_rate: float = 1e-2
    ) -> ProjectionTable:
        """Sets every trained tensor to θ₀ + ρ Δ, with a ρ of its own that is learned on validation data: see `tpgm`.

        Args:
            validation_dataset: what ρ is learned on; by default the evaluation set named `validation`.
            steps: batches of `per_device_eval_batch_size` images (64 in the released code), in an order of the seed.
            learning_rate: as in `tpgm`.

        Returns:
            ρ by tensor. `wise_ft(trainer.model, 1, trainer.zero_shot)` sets the trained model again.

        Raises:
            ConfigError: there is no validation set, there are several processes, or what `tpgm` raises.
            DataError: the set is a stream, or as `evaluate`.
        """
        if self.accelerator.num_processes > 1:
            raise ConfigError("radii are learned in one process", got=self.accelerator.num_processes, allowed="1")
        given = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        given = given if validation_dataset is None else {"validation": validation_dataset}
        if "validation" not in given:
            raise ConfigError("radii are learned on validation data", where="validation_dataset", got=sorted(given))
        rows: Any = self._evaluated(given["validation"], "validation")
        if not isinstance(rows, LabelledImages):
            raise DataError("a stream has no numbered rows", where="validation")
        order = np.random.default_rng(self.args.seed).permutation(len(rows))  # else it may be class by class
        loader = self.get_eval_dataloader(replace(rows, numbers=rows.numbers[order]))

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            return model(**self._prepare_inputs(batch)).loss

        self.forget_model()
        with self._answering(rows, whole=False):
            return tpgm(self.model, loader, loss_fn, self.zero_shot, steps, learning_rate)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns loss, logits and labels of a batch."""
        names = [field.name for field in fields(self.model.output_type)]
        ignore_keys = [n for n in names if n not in self.model.kept_outputs] if ignore_keys is None else ignore_keys
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Returns batches of all images as they are, without the collator's augmentation.

        Args:
            eval_dataset: as in `Trainer`.
        """
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        rows: Any = self._rows(self._named(given) if isinstance(given, str) else given, "eval")
        vars(self).pop("_eval_dataloaders", None)  # with persistent workers the loader of one set was kept for others
        with self._showing_all(rows) as shown:
            return self.spared(super().get_eval_dataloader(shown))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Returns batches of all images as they are, without the collator's augmentation.

        Args:
            test_dataset: as in `Trainer`.
        """
        rows: Any = self._rows(test_dataset, "test", labels=False)
        with self._showing_all(rows) as shown:
            return self.spared(super().get_test_dataloader(shown))

    # --- what comes in ---

    def _rows(self, dataset: Any, name: str, labels: bool = True) -> Rows:
        """What every entrance makes of a set before anything is computed with it."""
        rows = labelled_images(dataset, name, target=self.model.target)
        check_rows(rows, self.model, labels)
        if self.args.on_bad_image == "skip":
            return readable_rows(rows, self.args.dataloader_num_workers, self._is_silent())
        return rows

    def _sets(self, given: Mapping[str, Any]) -> dict[str, Rows]:
        if isinstance(given, datasets.DatasetDict | datasets.IterableDatasetDict):
            labelled_images(given, "eval_dataset")  # refuses it: the training images would be among the sets
        return {name: self._evaluated(dataset, name) for name, dataset in given.items()}

    def _evaluated(self, dataset: Any, name: str) -> Rows:
        rows = self._rows(dataset, name)
        self.model.check_evaluation(rows)
        return rows

    def _named(self, name: str) -> Any:
        if not isinstance(self.eval_dataset, dict) or name not in self.eval_dataset:
            known = sorted(self.eval_dataset) if isinstance(self.eval_dataset, dict) else []
            raise ConfigError("no evaluation set of this name", got=name, allowed=", ".join(known) or "none")
        return self.eval_dataset[name]

    @contextmanager
    def _answering(self, rows: Rows, whole: bool) -> Iterator[None]:
        with self.model.answering(rows):
            if self.own_metrics:
                yield
                return
            if lacks_targets(rows):  # to be predicted, without metrics
                with replaced(self, compute_metrics=None, preprocess_logits_for_metrics=None):
                    yield
                return
            measure = self.model.measure(rows, whole)  # a new one: one that an error stopped has counted images
            with replaced(self, compute_metrics=measure, preprocess_logits_for_metrics=measure.of_batch):
                yield

    def _plain_collator(self) -> Any:
        """The collator without augmentation."""
        collator = self.data_collator
        return collator.without_transform() if isinstance(collator, ImageCollator) else collator

    @contextmanager
    def _showing_all(self, rows: Rows) -> Iterator[Any]:
        """For loaders of evaluation: images as they are, and all of them, also where training drops some."""
        shown, collator = self.drawing_by_row(rows, self._plain_collator(), Draws(self.data_seed))
        with replaced(self, data_collator=collator), replaced(self.args, dataloader_drop_last=False):
            yield shown

    def _is_silent(self) -> bool:
        return self.args.disable_tqdm or not self.is_local_process_zero()


def _name(given: Any, prefix: str) -> str | None:
    """What a card calls a set: its name among the trainer's or those given, or the prefix of its metrics."""
    if isinstance(given, str):
        return given
    if prefix == "eval":
        return "evaluation" if given is None else None
    return prefix.removeprefix("eval_")
