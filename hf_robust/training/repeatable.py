# SPDX-License-Identifier: Apache-2.0
"""Order and augmentation: by seed, epoch and row alone, wherever a run is resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader
from transformers.trainer_utils import SaveStrategy

from ..data.collator import ImageCollator
from ..data.draws import DrawingCollator, Draws
from ..data.rows import LabelledImages, LabelledStream, labelled_images
from ..data.target_collators import TargetCollator, TextCollator
from .evaluation_loop import EvaluationLoopTrainer
from .preflight import lacks_targets
from .replaced import replaced
from .stopping import StopAtSignal, leave_signals

Rows = LabelledImages | LabelledStream


class RepeatableTrainer(EvaluationLoopTrainer):
    """Order and augmentation of the training set by seed, epoch and row; a base of `RobustTrainer`.

    Whatever ran before, however many workers or ranks there are, and wherever a run is resumed: a row of an epoch is
    augmented in the same way, see `Draws`. What draws in evaluation too, as a user's own collator, draws the same in
    every one.
    """

    data_collator: Any  # of images; the task adds the rest
    stop: StopAtSignal

    _draws: Draws | None = None

    @property
    def data_seed(self) -> int:
        """What order and augmentation hang on."""
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    @property
    def draws(self) -> Draws:
        """What the rows of the training set draw: one object, as loaders of persistent workers keep it."""
        if self._draws is None or self._draws.seed != self.data_seed:
            self._draws = Draws(self.data_seed)
        return self._draws

    def get_train_dataloader(self) -> DataLoader:
        """Returns batches of the training set, in an order and with an augmentation that hang on the seed."""
        # Accelerate would shuffle by the seed that torch was given last
        self.accelerator.dataloader_config.data_seed = self.data_seed
        rows = labelled_images(self.train_dataset, "train_dataset", target=self.model.target)
        rows, collator = self.drawing_by_row(rows, self.data_collator, self.draws)
        with replaced(self, train_dataset=rows, data_collator=collator):
            loader = super().get_train_dataloader()
        # every iterator draws a seed for its workers: from the global generator it would change the dropout after it
        getattr(loader, "base_dataloader", loader).generator = torch.Generator()
        return self.spared(loader)

    def spared(self, loader: DataLoader) -> DataLoader:
        """Makes the workers of a loader leave signals to the process that saves.

        Args:
            loader: of a set.
        """
        if self.args.save_strategy != SaveStrategy.NO:
            base: Any = getattr(loader, "base_dataloader", loader)
            base.worker_init_fn = partial(leave_signals, base.worker_init_fn, self.stop.listens)
        return loader

    def drawing_by_row(self, rows: Rows, collator: Any, draws: Draws) -> tuple[Rows, Callable[..., Any]]:
        """Returns rows and collator that draw by row, or as they are if nothing is drawn.

        Args:
            rows: of a set.
            collator: an `ImageCollator`, one around it, or any other.
            draws: what to draw from.
        """
        whole = collator if lacks_targets(rows) else self.model.collator(collator)
        if _shows_the_same(rows, whole):
            return rows, whole
        return replace(rows, draws=draws), DrawingCollator(whole)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self.epoch = kwargs["epoch"]
        self.draws.set_epoch(self.epoch)  # before the epoch's first batch is fetched
        super()._run_epoch(*args, **kwargs)


def _shows_the_same(rows: Rows, collator: Any) -> bool:
    """Whether rows are the same every time, so that nothing need be seeded."""
    images = collator.images if isinstance(collator, TargetCollator) else collator
    if type(images) is not ImageCollator or images.transform is not None:
        return False
    if not isinstance(rows, LabelledImages) or not isinstance(rows.rows, datasets.Dataset) or rows.columns is None:
        return False
    if isinstance(collator, TextCollator) and collator.texts == "one" and rows.has_several_texts:
        return False
    return rows.columns.transform is None
