# SPDX-License-Identifier: Apache-2.0
"""One training of a method, and what can be made of the model afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from ..cards.card import model_card
from ..cards.results import Column, results_from_accuracies
from ..interpolation.adapters import wise_ft
from ..interpolation.per_image import PerImageEnsemble
from ..interpolation.soups import greedy_soup
from ..interpolation.sweep import alpha_sweep
from ..scripting.progress import is_silent
from ..training.replaced import replaced
from ..training.trainer import RobustTrainer
from .methods import ALL_METHODS, After, Chosen, Method
from .runs import Run
from .task import SEARCH_SEED, Comparison, evaluate, make_trainer, validated_by

FINE_TUNED = "fine-tuned"
TIES = 1e-9  # where all images are right there is no error, but several α may have them right


def zero_shot(comparison: Comparison) -> Run:
    """Returns what the pre-trained model does on the suite and on the validation data.

    Args:
        comparison: what all share.
    """
    trainer = make_trainer(comparison, Method(), Chosen(learning_rate=0.0), SEARCH_SEED)
    return {**evaluate(comparison, trainer.model, trainer.model), "validation": validated_by(comparison, trainer)}


def train_and_evaluate(comparison: Comparison, name: str, chosen: Chosen, seed: int, before: Run, first: bool) -> Run:
    """Trains, and returns what the model does on the suite, and what is made of it afterwards.

    Args:
        comparison: what all share.
        name: of the method.
        chosen: its settings.
        seed: of the shots and the training.
        before: what `zero_shot` returned.
        first: whether cards are written, of the first seed.
    """
    method = ALL_METHODS[name]
    trainer, seconds = (_soup if method.soup else _trained)(comparison, method, chosen, seed)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    ways: dict[str, Run] = {FINE_TUNED: evaluate(comparison, trainer.model, trainer.model)}
    for way in (way for way in method.after if way in comparison.after):
        ways[way] = WAYS[way](comparison, trainer, ways[FINE_TUNED])
        wise_ft(trainer.model, 1.0, trainer.zero_shot)
    if first and not method.soup and trainer.is_world_process_zero():
        _save_cards(comparison, trainer, name, before, ways)
    return {
        "method": name,
        **asdict(chosen),
        "seed": seed,
        "trained_parameters": trained,
        "training_seconds": seconds,
        "ways": ways,
    }


def _trained(comparison: Comparison, method: Method, chosen: Chosen, seed: int) -> tuple[RobustTrainer, float]:
    """A trainer that has trained, and how many seconds it took."""
    trainer = make_trainer(comparison, method, chosen, seed)
    start = time.perf_counter()
    trainer.train()
    return trainer, time.perf_counter() - start


def _soup(comparison: Comparison, method: Method, chosen: Chosen, seed: int) -> tuple[RobustTrainer, float]:
    """A greedy soup, chosen on validation data, of models that were trained at several rates."""
    rates = chosen.learning_rate, *chosen.rates_beside
    trainers, seconds = zip(*(_trained(comparison, method, Chosen(rate), seed) for rate in rates), strict=True)
    first: RobustTrainer = trainers[0]

    def validated(model: nn.Module) -> dict[str, float]:
        with replaced(first, model=model):
            return {f"validation_{name}": value for name, value in validated_by(comparison, first).items()}

    soup, _ = greedy_soup([trainer.model for trainer in trainers], validated, "validation_accuracy")
    first.model.load_state_dict(soup.state_dict())
    return first, sum(seconds)


def _wise_ft(comparison: Comparison, trainer: RobustTrainer, fine_tuned: Run) -> Run:
    """WiSE-FT to the smallest α within one standard error of the best on validation data."""

    def validated(model: Any) -> dict[str, float]:
        figures = validated_by(comparison, trainer)
        return {f"validation_{name}": value for name, value in figures.items()}

    error = validated_by(comparison, trainer)["error"]
    how: Any = {"zero_shot": trainer.zero_shot, "tolerance": max(error, TIES)}
    sweep = alpha_sweep(trainer.model, comparison.alphas, validated, "validation_accuracy", **how)
    found = fine_tuned if sweep.best_alpha == 1 else evaluate(comparison, trainer.model, trainer.model)
    return {**found, "alpha": sweep.best_alpha, "sweep": sweep.rows}


def _tpgm(comparison: Comparison, trainer: RobustTrainer, fine_tuned: Run) -> Run:
    """TPGM: shares of the way for every tensor, learned on the validation data of the task alone."""
    table = trainer.tpgm_sweep(comparison.validation)
    return {**evaluate(comparison, trainer.model, trainer.model), "shares": table.ratios}


def _vrf(comparison: Comparison, trainer: RobustTrainer, fine_tuned: Run) -> Run:
    """VRF with the paper's K: one thousandth of the failures, so 1 for fewer than 1,500."""
    data = trainer.train_dataset, comparison.validation, trainer.zero_shot
    silent = is_silent(comparison.training_args)
    ensemble = PerImageEnsemble.fit(trainer.model, *data, neighbour=1, silent=silent)
    return {**evaluate(comparison, ensemble, trainer.model), "ensemble": ensemble.settings()}


WAYS: dict[After, Callable[[Comparison, RobustTrainer, Run], Run]] = {
    "wise-ft": _wise_ft,
    "tpgm": _tpgm,
    "vrf": _vrf,
}


def _save_cards(comparison: Comparison, trainer: RobustTrainer, name: str, before: Run, ways: dict[str, Run]) -> None:
    """Writes a model card for what a method gives: the model as it was trained, and by WiSE-FT."""
    folder = Path(str(trainer.args.output_dir)) / "cards"
    folder.mkdir(parents=True, exist_ok=True)
    sets = {n: (one["role"], one["images"]) for n, one in before["sets"].items()}
    for way in (way for way in (FINE_TUNED, "wise-ft") if way in ways):
        alpha = ways[way].get("alpha")
        columns: dict[Column, Run] = {"zero-shot": before, "fine-tuned": ways[FINE_TUNED]}
        if alpha is not None:
            columns["chosen alpha"] = ways[way]
        accuracies = {c: {n: one["accuracy"] for n, one in of["sets"].items()} for c, of in columns.items()}
        results = results_from_accuracies(accuracies, sets, alpha)
        card = model_card(trainer.model, trainer.args, results, train_images=len(trainer.train_dataset))
        card.save(folder / f"{name if way == FINE_TUNED else f'{name}+{way}'}.md")
