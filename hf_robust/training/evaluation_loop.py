# SPDX-License-Identifier: Apache-2.0
"""How a trainer of a task evaluates: in which precision, and what is kept of every batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from ..data.draws import kept_states
from .replaced import replaced
from .saving import SavingTrainer


class EvaluationLoopTrainer(SavingTrainer):
    """The evaluation of `RobustTrainer`.

    With `bf16_full_eval` or `fp16_full_eval` a copy of the model is evaluated, in training too, so that the
    weights stay what they are; it takes half of their memory beside them.
    """

    own_metrics: bool  # whether the user gave `compute_metrics`

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluates or predicts, as in `Trainer`.

        Args:
            dataloader: batches of the set.
            description: `"Evaluation"` or `"Prediction"`.
            prediction_loss_only: as in `Trainer`.
            ignore_keys: outputs of the classifier to leave out.
            metric_key_prefix: first part of every metric's name.
        """
        how = prediction_loss_only, ignore_keys, metric_key_prefix
        with self._kept_random_state(), self._evaluation_precision():
            output = super().evaluation_loop(dataloader, description, *how)
        unwanted = [f"{metric_key_prefix}_model_preparation_time"]  # says nothing of the model
        if self.own_metrics and not self.model.batch_loss:  # which only the task's own measure gives
            unwanted.append(f"{metric_key_prefix}_loss")
        return output._replace(metrics={n: v for n, v in (output.metrics or {}).items() if n not in unwanted})

    @contextmanager
    def _kept_random_state(self) -> Iterator[None]:
        """Training draws the same, whether or not there was an evaluation: a loader draws, and metrics may."""
        cuda = [self.args.device] if self.args.device.type == "cuda" else []
        with kept_states(), torch.random.fork_rng(cuda, device_type="cuda"):
            yield

    @contextmanager
    def _evaluation_precision(self) -> Iterator[None]:
        if not (self.args.bf16_full_eval or self.args.fp16_full_eval):
            yield
            return
        dtype = torch.bfloat16 if self.args.bf16_full_eval else torch.float16
        processor, prepared = self.model.processor, list(self.accelerator._models)
        half: nn.Module = copy.deepcopy(self.model, {id(processor): processor}).to(dtype)
        try:
            with replaced(self, model=half, model_wrapped=half):
                yield
        finally:
            self.accelerator._models[:] = prepared  # else the copy would stay, and training not prepare the model
