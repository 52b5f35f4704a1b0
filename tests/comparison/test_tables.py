# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from math import sqrt
from statistics import stdev

import pytest

from hf_robust.comparison.tables import half_interval, mean_ranks, report, search_table, table


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


def test_a_search_of_which_only_a_stopped_training_has_ended_is_shown():
    stopped = {"searched": "full", "learning_rate": 1.0, "weight": 1.0, "stopped": "loss is nan"}
    ended = {"searched": "saft", "learning_rate": 1.0, "weight": 1.0, "accuracy": 0.5, "loss": 1.0, "error": 0.1}
    shown = search_table({"full_rate_1": stopped, "saft_rate_1": ended}).splitlines()
    assert [line.split("|")[3].strip() for line in shown[2:]] == ["–", "**50.0 (1.00)**"]


def test_a_suite_of_one_role_has_a_table_and_no_picture(tmp_path):
    found = {"means": {"id": 0.5}, "sets": {"photos": {"role": "id", "images": 4, "accuracy": 0.5}}}
    full = {"method": "full", "trained_parameters": 7, "training_seconds": 1.0, "learning_rate": 0.1, "weight": 1.0}
    report({}, {"zero-shot": found, "full_seed_1": {**full, "ways": {"fine-tuned": found}}}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "table.md"]
    assert "| **full**" in (tmp_path / "table.md").read_text()
