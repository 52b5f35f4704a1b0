# SPDX-License-Identifier: Apache-2.0
"""How learning rate and weight of a method are chosen: on validation data alone, the same way for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

from ..errors import ConfigError, NonFiniteError
from ..evaluation import one_standard_error_rule
from .methods import ALL_METHODS, FULL, PROBE, Chosen
from .runs import Run, Runs
from .task import SEARCH_SEED, Comparison, make_trainer, validated_by

GRID = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
WEIGHTS = (0.1, 1.0, 10.0)  # times that of a loss


def search(comparison: Comparison, runs: Runs, name: str, rates: Sequence[float], weights: Sequence[float]) -> Chosen:
    """Returns what to take for a method: its learning rate and the weight of its loss.

    The rate is chosen at the loss's own weight, and the weight at that rate. A soup's ingredients are full
    fine-tuning at the rate chosen for that, and at those beside it where training did not stop.

    Args:
        comparison: what all share.
        runs: what has ended.
        name: of the method.
        rates: in ascending order.
        weights: what the weight of the loss may be multiplied by, 1 among them.
    """
    head = search(comparison, runs, PROBE, rates, weights).learning_rate if ALL_METHODS[name].head_first else None
    searched = FULL if ALL_METHODS[name].soup else name

    def tried(chosen: Chosen) -> Run:
        more = "" if chosen.weight == 1 else f"_weight_{chosen.weight:g}"
        file = f"{searched}_rate_{chosen.learning_rate:g}{more}"
        return runs.get(file, try_settings, comparison, searched, chosen)

    before = runs.found["zero-shot"]["validation"]
    rate = find_learning_rate(rates, lambda rate: tried(Chosen(rate, head_learning_rate=head)), before)
    if ALL_METHODS[name].soup:
        beside = [one for one in _beside(rates, rate) if "stopped" not in tried(Chosen(one))]
        return Chosen(rate, rates_beside=tuple(beside))
    if ALL_METHODS[name].loss is None:
        return Chosen(rate, head_learning_rate=head)
    return Chosen(rate, choose_weight([tried(Chosen(rate, weight)) for weight in weights])["weight"])


def try_settings(comparison: Comparison, name: str, chosen: Chosen) -> Run:
    """Trains, and returns what settings are chosen by; or why the training stopped.

    Args:
        comparison: what all share.
        name: of the method.
        chosen: the settings to try.
    """
    trainer = make_trainer(comparison, ALL_METHODS[name], chosen, SEARCH_SEED)
    try:
        trainer.train()
        figures: Run = {**validated_by(comparison, trainer)}
    except NonFiniteError as error:
        figures = {"stopped": str(error)}
    return {"searched": name, **asdict(chosen), **figures}


def find_learning_rate(rates: Sequence[float], validated: Callable[[float], Run], zero_shot: Run) -> float:
    """Goes down from the middle of the grid to where training does no harm, and from there to the better neighbours.

    Args:
        rates: the grid, in ascending order.
        validated: returns what `try_settings` returns for a rate.
        zero_shot: what `validate` returned for the pre-trained model.

    Raises:
        ConfigError: no training ended.
    """
    place = len(rates) // 2
    found = {place: validated(rates[place])}
    while place > 0 and does_harm(found[place], zero_shot):
        place -= 1
        found[place] = validated(rates[place])
    while True:
        best = rates.index(choose_rate(list(found.values()))["learning_rate"])
        neighbours = [place for place in (best + 1, best - 1) if 0 <= place < len(rates) and place not in found]
        if not neighbours:
            return rates[best]
        found[neighbours[0]] = validated(rates[neighbours[0]])


def _beside(rates: Sequence[float], rate: float) -> tuple[float, ...]:
    place = rates.index(rate)
    return tuple(rates[i] for i in (place - 1, place + 1) if 0 <= i < len(rates))


def does_harm(run: Run, zero_shot: Run) -> bool:
    """Returns whether a training stopped, or lost accuracy by more than a standard error.

    Args:
        run: what `try_settings` returned.
        zero_shot: what `validate` returned for the pre-trained model.
    """
    return "stopped" in run or run["accuracy"] < zero_shot["accuracy"] - zero_shot["error"]


def choose_rate(found: Sequence[Run]) -> Run:
    """Returns the run to take among those of several rates, by the rule of one standard error.

    Args:
        found: what `try_settings` returned for each.

    Raises:
        ConfigError: no training ended.
    """
    usable = _usable(found)
    accuracies, losses, errors = ([one[name] for one in usable] for name in ("accuracy", "loss", "error"))
    return usable[one_standard_error_rule(accuracies, losses, errors)]


def choose_weight(found: Sequence[Run]) -> Run:
    """Returns the run with the largest weight within one standard error of the best, which holds on most.

    Args:
        found: what `try_settings` returned for each weight.

    Raises:
        ConfigError: no training ended.
    """
    usable = _usable(found)
    best = max(usable, key=lambda one: one["accuracy"])
    near = [one for one in usable if one["accuracy"] >= best["accuracy"] - best["error"]]
    return max(near, key=lambda one: one["weight"])


def _usable(found: Sequence[Run]) -> list[Run]:
    usable = [one for one in found if "accuracy" in one]
    if not usable:
        raise ConfigError("no training ended", where="learning_rates", got=[one["stopped"] for one in found])
    return usable
