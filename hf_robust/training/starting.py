# SPDX-License-Identifier: Apache-2.0
"""What a trainer computes of its training set before the first step."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from ..data.collator import batches_in_order, n_images
from ..data.columns import REFERENCE_EMBEDS
from ..data.draws import Draws
from ..data.embeds_cache import is_cacheable, with_image_embeds
from ..data.rows import LabelledStream, labelled_images
from ..errors import ConfigError
from ..tuners.radapter import slow_averages
from ..tuners.saft import exports_to_shira, mask_summary, saft_unselected, select_saft
from ..tuners.saft.selection import scores_single_images
from .head_first import check_head_first, train_head, whole_set
from .model_init import ModelInitTrainer
from .preflight import check_trained

logger = logging.getLogger(__name__)


class StartingTrainer(ModelInitTrainer):
    """What `RobustTrainer` computes before it trains: where terms, tasks and heads start, and SAFT's entries."""

    head_losses: list[float]  # of the epochs that trained the head first

    def begin(self, resumed: bool) -> None:
        """Starts the terms of the loss; where no checkpoint brings them, also the task's own tensors and the entries.

        A head that is trained first is so after the task's own tensors have started, by which it is trained, and
        before SAFT's entries are selected: by the gradient of the loss that they will be trained on.

        Args:
            resumed: whether a checkpoint will be loaded.

        Raises:
            ConfigError: a head shall be trained first that cannot be, see `check_head_first`.
            NonFiniteError: it came to a loss that is NaN or infinite.
        """
        self.head_losses = []
        head_first = self.args.head_first_epochs > 0
        if head_first:
            check_head_first(self.model, self.images_to_train_on, self._plain_collator())
            check_trained(self.model)
        self._start_terms()
        if not resumed:
            self.model.prepare(self._training_set_in_order, self.accelerator)
            if head_first:
                self._train_head_first()
            if saft_unselected(self.model):
                self.select_entries()

    def _start_terms(self) -> None:
        if any(term.frozen_vision for term in self.model.terms.values()):
            self._embed_training_set()
        with self.accelerator.autocast():
            for term in self.model.terms.values():
                term.start(self.model, self._training_set_in_order)

    def _train_head_first(self) -> None:
        """On all ranks, which DDP and FSDP then give the head of the first, should theirs be rounded otherwise."""
        rows = labelled_images(self._embedded_images(), "train_dataset", target=self.model.target)
        how = self.args.eval_batch_size, 0, torch.device("cpu"), None
        data = whole_set(batches_in_order(rows, self.model.collator(self._plain_collator()), *how))
        decayed = self.get_decay_parameter_names(self.model)
        self.has_trained = True
        train_head(self.model, data, self.task_loss, self.args, decayed, self.head_losses.append)

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        done = super()._init_training_state(*args)
        for epoch, loss in enumerate(self.head_losses, start=1):  # only now: what has been logged before is forgotten
            self.log({"head_first_loss": loss, "head_first_epoch": epoch})
        slow = slow_averages(self.model, self.state.max_steps) if self.is_world_process_zero() else {}
        for adapter, share in slow.items():
            what = "In %d steps the average of R-Adapter %r, which is evaluated and saved, comes %.0f %% of the way: "
            logger.warning(what + "set a smaller average_decay", self.state.max_steps, adapter, 100 * share)
        return done

    def _training_set_in_order(self) -> Iterator[dict[str, Tensor]]:
        yield from self._own_share(self.train_dataset, self.args.eval_batch_size, "Looking at the training set")

    def _unprepare(self) -> None:
        """Takes back what `evaluate` did to the model.

        Accelerate takes a model that was prepared for evaluation for one prepared for training: it would not be
        wrapped in DistributedDataParallel, and every rank would train its own. Entries are ranked without autocast.
        """
        self.model = self.model_wrapped = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.model._is_accelerate_prepared = False

    def select_entries(self) -> None:
        """Selects the entries of the active SAFT adapter by the loss of the classification on the training set."""
        self._unprepare()

        def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            images = n_images(batch)
            return self.task_loss(model(**batch), batch.get(self.model.label_names[0]), images, images)

        with self.model.as_in_training():
            select_saft(self.model, self._selection_batches(), loss)
        if self.is_world_process_zero():
            logger.info(mask_summary(self.model))
            if exports_to_shira(self.model):
                logger.info("export_shira(trainer.model.model, folder) writes it for people without hf_robust")

    def _selection_batches(self) -> Iterator[dict[str, Tensor]]:
        size = 1 if scores_single_images(self.model) else self.args.selection_batch_size
        if size == 1 and self.model.whole_batch:
            what = "an image by itself has nothing to be told apart from, so its gradient is zero"
            remedy = "Use score='signed_mean' and a selection_batch_size above 1."
            raise ConfigError(what, where=f"task={self.model.name!r}, selection", remedy=remedy)
        for batch in self._own_share(self.train_dataset, size, "Selecting entries"):
            yield {name: tensor for name, tensor in batch.items() if name != REFERENCE_EMBEDS}

    def _embed_training_set(self) -> None:
        """Images that are the same every time are embedded once, as the vision tower is not trained."""
        if is_cacheable(self.train_dataset, self.data_collator):
            self._train_on_embedded(self._embedded_images())

    def _embedded_images(self) -> Any:
        image_processor, size = self.data_collator.image_processor, self.args.eval_batch_size
        how = image_processor, size, self.args.dataloader_num_workers, self._is_silent()
        with self.args.main_process_first(desc="embedding the training set"), self.accelerator.autocast():
            return with_image_embeds(self.images_to_train_on, self.model.model, *how)

    def _own_share(self, dataset: Any, batch_size: int, title: str) -> Iterator[dict[str, Tensor]]:
        """Yields this rank's share of a set, in order and without the copies that even batches need."""
        if isinstance(dataset, LabelledStream):
            what, allowed = f"{title}: ranks cannot share a dataset without length", "a dataset with numbered rows"
            raise ConfigError(what, where="train_dataset", got=type(dataset).__name__, allowed=allowed)
        block = batch_size if self.model.whole_batch else 1  # the same batches on any number of ranks
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        share = [row for row in range(len(dataset)) if row // block % ranks == rank]
        how = batch_size, self.args.dataloader_num_workers, next(self.model.parameters()).device
        title_or_none = None if self._is_silent() else title
        rows, collator = self.drawing_by_row(dataset, self._plain_collator(), Draws(self.data_seed))
        yield from batches_in_order(Subset(rows, share), collator, *how, title_or_none)
