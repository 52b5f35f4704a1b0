# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from math import sqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_robust.comparison.search import choose_weight, does_harm, find_learning_rate, search
from hf_robust.errors import ConfigError


def accurate(accuracy, images=10**9):
    """An accuracy with its standard error."""
    return {"accuracy": accuracy, "error": sqrt(accuracy * (1 - accuracy) / images)}


def validated(accuracies, losses=None, images=10**9):
    """What `try_settings` returns, by learning rate, and the rates that were asked for."""
    asked = []

    def run(rate):
        asked.append(rate)
        place = [1, 2, 3, 4, 5, 6, 7].index(rate)
        if accuracies[place] is None:
            return {"learning_rate": rate, "stopped": "loss is nan"}
        loss = losses[place] if losses else 1.0
        return {"learning_rate": rate, "loss": loss, **accurate(accuracies[place], images)}

    return run, asked


@pytest.mark.parametrize(
    ("accuracies", "chosen", "tried"),
    [
        ([0.3, 0.3, 0.5, 0.7, 0.6, 0.2, 0.1], 4, [4, 5, 3]),  # the middle
        ([0.3, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], 7, [4, 5, 6, 7]),  # the upper end
        ([0.3, 0.6, 0.5, 0.1, 0.1, 0.2, 0.1], 2, [4, 3, 2, 1]),  # from a wrecked model downwards
        ([0.3, 0.6, 0.1, None, None, 0.9, 0.9], 2, [4, 3, 2, 1]),
        ([0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], 1, [4, 3, 2, 1]),  # nothing helps
    ],
)
def test_the_search_ends_where_both_neighbours_are_worse(accuracies, chosen, tried):
    run, asked = validated(accuracies)
    assert find_learning_rate([1, 2, 3, 4, 5, 6, 7], run, accurate(0.3)) == chosen
    assert asked == tried


@settings(max_examples=50)
@given(st.integers(0, 6), st.lists(st.floats(0.01, 0.1), min_size=7, max_size=7))
def test_the_search_finds_a_single_peak(peak, steps):
    accuracies = [0.9 - sum(steps[min(place, peak) : max(place, peak)]) for place in range(7)]
    run, _ = validated(accuracies)
    assert find_learning_rate([1, 2, 3, 4, 5, 6, 7], run, accurate(0.2)) == peak + 1


def test_the_search_is_by_the_rule_of_one_standard_error():
    run, _ = validated([0.1, 0.1, 0.50, 0.53, 0.1, 0.1, 0.1], [9, 9, 1.0, 1.2, 9, 9, 9], images=100)
    assert find_learning_rate([1, 2, 3, 4, 5, 6, 7], run, accurate(0.3)) == 3


def test_a_loss_of_a_standard_error_does_no_harm():
    error = sqrt(0.3 * 0.7 / 100)
    for lost, harm in ((0.9, False), (1.1, True)):
        assert does_harm({"accuracy": 0.3 - lost * error}, accurate(0.3, images=100)) is harm


def test_no_rate_that_trains_is_an_error():
    run, _ = validated([None] * 7)
    with pytest.raises(ConfigError, match="no training ended.*learning_rates.*loss is nan"):
        find_learning_rate([1, 2, 3, 4, 5, 6, 7], run, accurate(0.3))


def test_the_largest_weight_within_one_standard_error_of_the_best_is_taken():
    found = [
        {"weight": w, "accuracy": a, "error": 0.04} for w, a in ((0.1, 0.50), (1, 0.53), (10, 0.495), (100, 0.48))
    ]
    assert choose_weight([*found, {"weight": 1000, "stopped": "loss is nan"}]) is found[2]


class Ended:
    """Runs that have ended, of which none is added."""

    def __init__(self, accuracies):
        run, _ = validated(accuracies)
        self.found = {f"full_rate_{rate}": run(rate) for rate in (3, 4, 5)}
        self.found["zero-shot"] = {"validation": accurate(0.3)}

    def get(self, name, *arguments):
        return self.found[name]


def test_a_soup_has_no_ingredient_whose_training_stopped():
    for accuracies, beside in (([0, 0, 0.4, 0.7, 0.5, 0, 0], (3, 5)), ([0, 0, 0.4, 0.7, None, 0, 0], (3,))):
        chosen = search(None, Ended(accuracies), "full+soup", [3, 4, 5], [1.0])
        assert (chosen.learning_rate, chosen.rates_beside) == (4, beside)
