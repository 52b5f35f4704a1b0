# SPDX-License-Identifier: Apache-2.0
"""What a trainer remembers of its evaluations, so that the card of a saved model has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..cards.found import Found
from ..cards.left_out import left_out
from ..cards.results import CardResults, Column, curve_of, points_of, role_of
from ..data.columns import IDENTITY
from ..data.rows import LabelledImages
from ..encoders.pretrained import is_pretrained
from ..evaluation.roles import Role
from ..interpolation.callback import WiSEFTCallback
from ..interpolation.sweep import AlphaSweep
from .repeatable import RepeatableTrainer, Rows


class NotingTrainer(RepeatableTrainer):
    """What `RobustTrainer` remembers of its evaluations, by the model that was evaluated.

    That is the zero-shot one until training has changed something, then the fine-tuned one, and the one at α after
    WiSE-FT. A model that comes with a trained adapter is fine-tuned already.
    """

    found: Found
    sweep: AlphaSweep | None = None
    is_pretrained: bool | None = None  # None: not looked at yet
    notes = True  # not while α changes

    def forget_model(self) -> None:
        """Forgets what was found of a model that will be trained, or replaced by a new one."""
        self.sweep = None
        self.found.forget("fine-tuned", "chosen alpha")

    def note(self, name: str | None, rows: Rows, metrics: Mapping[str, float]) -> None:
        """Keeps what an evaluation found.

        Args:
            name: the set's; None for one that was given without a name.
            rows: the set.
            metrics: by name, without the set's.
        """
        of_search = self.hp_search_backend is not None
        if name is not None and isinstance(rows, LabelledImages) and self.notes and not of_search:
            self.found.note(name, rows, self._role(name, rows), self._evaluated_model(), metrics, self._step)

    def note_sweep(self, sets: Mapping[str, Rows], sweep: AlphaSweep) -> None:
        """Keeps what an α-sweep found of the zero-shot model, the fine-tuned one, and the chosen one.

        Args:
            sets: all that were evaluated.
            sweep: what was found.
        """
        alphas: dict[Column, float] = {"zero-shot": 0.0, "fine-tuned": 1.0, "chosen alpha": sweep.best_alpha}
        for column, alpha in alphas.items():
            for row in (row for row in sweep.rows if row["alpha"] == alpha):
                for name, rows in sets.items():
                    if isinstance(rows, LabelledImages):
                        metrics = {n: row[f"{name}_{n}"] for n in self.model.metrics if f"{name}_{n}" in row}
                        self.found.note(name, rows, self._role(name, rows), column, metrics, self._step)
        self.sweep = sweep

    def card_results(self) -> CardResults | None:
        """Returns what evaluations and `wise_ft_sweep` found on all sets but those a choice was made on.

        Returns:
            None where nothing is known of the model as it is now.
        """
        results = self.found.results(self._step, self.chosen_alpha)
        if results is None or self.sweep is None or results.metric != "accuracy":
            return results
        roles = {one.name: one.role for one in results.sets if f"{one.name}_accuracy" in self.sweep.rows[0]}
        return replace(results, curve=curve_of(self.sweep, roles) or points_of(results))

    def card_left_out(self) -> list[str]:
        """Returns which images, classes and adapters had no part in the training and its evaluations."""
        sets = {name: (one.images, one.bad) for name, one in self.found.sets.items()}
        return left_out(self.model, self.train_dataset, sets)

    @property
    def chosen_alpha(self) -> float | None:
        """The α that the model is at, by `wise_ft_sweep` or a `WiSEFTCallback`; None where it is as it was trained."""
        if self.sweep is not None:
            return self.sweep.best_alpha
        callbacks: list[Any] = self.callback_handler.callbacks
        alphas = [one.alpha for one in callbacks if isinstance(one, WiSEFTCallback)]
        return alphas[-1] if alphas and self.has_trained and not self.is_in_train else None

    def _evaluated_model(self) -> Column:
        if self.chosen_alpha is not None:
            return "chosen alpha"
        if self.is_pretrained is None and not self.has_trained:
            with self.whole_model():
                self.is_pretrained = is_pretrained(self.model.model, self.model.processor)
        return "zero-shot" if self.is_pretrained and not self.has_trained else "fine-tuned"

    def _role(self, name: str, rows: LabelledImages) -> Role:
        """Identities are always others than those of the training."""
        return role_of(name, self.model.target != IDENTITY and not self.model.knows(rows))

    @property
    def _step(self) -> int:
        """Of the training, which the model is at."""
        best = self.state.best_global_step if self.args.load_best_model_at_end and not self.is_in_train else None
        return best or self.state.global_step
