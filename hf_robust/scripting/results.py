# SPDX-License-Identifier: Apache-2.0
"""What scripts show and leave of their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from statistics import stdev
from typing import Any

from ..cards.card import model_card
from ..cards.results import Column, results_from_accuracies, role_of
from ..data.rows import LabelledImages
from ..training.trainer import RobustTrainer

VERSIONS_OF = ("hf_robust", "torch", "transformers", "peft", "accelerate", "datasets")


def package_versions() -> dict[str, str]:
    """Returns the versions of the packages that results depend on, by name."""
    return {package: version(package) for package in VERSIONS_OF}


def percent(value: float, by_seed: Sequence[float] = ()) -> str:
    """Returns a figure in percent, with its standard deviation over seeds (n - 1) where there are several.

    Args:
        value: a fraction.
        by_seed: fractions that it is the mean of.

    Example:
        >>> percent(0.5, [0.4, 0.6])
        '50.0 ± 14.1'
    """
    return f"{100 * value:.1f}" + (f" ± {100 * stdev(by_seed):.1f}" if len(by_seed) > 1 else "")


def save_with_card(
    trainer: RobustTrainer,
    sets: Mapping[str, LabelledImages],
    accuracies: Mapping[Column, Mapping[str, float]],
    chosen_alpha: float | None = None,
) -> None:
    """Saves a trained model with a card that shows accuracies on all sets but `validation`.

    Args:
        trainer: after its training.
        sets: the evaluation sets by name.
        accuracies: by column and set, fractions.
        chosen_alpha: the α that the model is at; None where it is as it was trained.

    Example:
        >>> sets = {"id": labelled_images(photos, "id")}
        >>> save_with_card(trainer, sets, {"zero-shot": {"id": 0.5}, "fine-tuned": {"id": 0.75}})
    """
    roles = {}
    for name, rows in sets.items():
        if name != "validation":
            roles[name] = role_of(name, not trainer.model.knows(rows)), len(rows)
    results = results_from_accuracies(accuracies, roles, chosen_alpha, trainer.model.metrics[0])
    how: Any = {"train_images": len(trainer.train_dataset), "left_out": trainer.card_left_out()}
    trainer.create_model_card(model_card(trainer.model, trainer.args, results, **how))
    trainer.save_model()
