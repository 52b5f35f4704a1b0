# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from math import sqrt
from statistics import stdev

import pytest

from hf_robust.comparison.tables import half_interval, mean_ranks, table


def test_ranks_are_mean_places_by_hand():
    rows = [{"id": [0.9, 0.7], "ood": [0.1]}, {"id": [0.6], "ood": [0.3]}, {"id": [0.8], "ood": [0.2]}]
    assert mean_ranks(rows) == [(1.5 + 3) / 2, (3 + 1) / 2, (1.5 + 2) / 2]


def test_the_interval_is_about_images_and_seeds_by_hand():
    sets = {"a": {"accuracy": 0.5, "images": 100}, "b": {"accuracy": 0.8, "images": 400}}
    one = {"sets": {**sets, "other": {"accuracy": 0.9, "images": 1}}}
    more = {"sets": {"a": {"accuracy": 0.6}, "b": {"accuracy": 0.9}}}
    of_images = sqrt(0.05**2 + 0.02**2) / 2  # the mean of two independent accuracies
    assert half_interval([one], ["a", "b"]) == pytest.approx(1.96 * of_images)
    of_seeds = stdev([0.65, 0.75]) / sqrt(2)
    both = half_interval([one, more], ["a", "b"])
    assert both == pytest.approx(1.96 * sqrt(of_images**2 + of_seeds**2))


def test_the_best_rank_is_marked():
    row = {
        "interval": {"id": 0.0},
        "alpha": [1.0],
        "trained_parameters": 7,
        "seconds": 1.0,
        "learning_rate": 0.1,
        "weight": None,
    }
    rows = {"zero-shot": {**row, "accuracy": {"id": [0.1]}, "rank": 2.0}, "full": {**row, "accuracy": {"id": [0.2]}}}
    rows["full"]["rank"] = 1.0
    marked = [line for line in table(rows).splitlines() if "**" in line]
    assert len(marked) == 1 and marked[0].startswith("| **full**")
