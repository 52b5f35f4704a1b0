# SPDX-License-Identifier: Apache-2.0
"""What is known of a set, and when it is another."""

from __future__ import annotations

import pytest
from torch.utils.data import ConcatDataset, Subset

from hf_robust.cards.found import Found
from hf_robust.data.rows import labelled_images
from tests.tiny_models import image_dataset

NAMES = ["red", "green", "blue"]
FIRST, SECOND = (image_dataset(6, NAMES, seed=seed) for seed in (1, 2))  # of equal labels
PLAIN, COPY = ([FIRST[number] for number in range(6)] for _ in range(2))


def columns(*given):
    """Of which models something is known after sets of one name were evaluated, the last one fine-tuned."""
    found = Found(("accuracy",))
    for dataset, column in zip(given, ("zero-shot", "fine-tuned"), strict=True):
        found.note("id", labelled_images(dataset, "id"), "id", column, {"accuracy": 0.5})
    return [*found.sets["id"].metrics]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (FIRST, SECOND),
        (FIRST.select([0, 3]), FIRST.select([3, 0])),
        (Subset(FIRST, [0]), Subset(FIRST, [3])),
        (ConcatDataset([FIRST, FIRST]), ConcatDataset([FIRST, SECOND])),
        (PLAIN, COPY),
    ],
)
def test_figures_of_another_set_of_equal_labels_are_forgotten(first, second):
    assert columns(first, second) == ["fine-tuned"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: FIRST,
        lambda: FIRST.with_format("torch"),
        lambda: Subset(FIRST, [0, 2]),
        lambda: ConcatDataset([FIRST, SECOND]),
        lambda: ConcatDataset([Subset(PLAIN, [0]), COPY]),
        lambda: PLAIN,
    ],
)
def test_a_set_that_is_given_again_is_the_same(make):
    assert columns(make(), make()) == ["zero-shot", "fine-tuned"]


def test_a_set_is_not_taken_for_one_that_was_where_it_is():
    found = Found(("accuracy",))
    for column in ("zero-shot", "fine-tuned"):
        found.note("id", labelled_images([*PLAIN], "id"), "id", column, {"accuracy": 0.5})
    assert [*found.sets["id"].metrics] == ["fine-tuned"]
