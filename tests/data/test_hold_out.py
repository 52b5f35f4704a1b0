# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from hf_robust.data.hold_out import hold_out
from hf_robust.data.rows import labelled_images
from hf_robust.errors import DataError
from tests.tiny_models import image_dataset


def labelled(labels):
    rows = image_dataset(1, ["a", "b", "c"]).select([0] * len(labels)).remove_columns("label")
    return labelled_images(rows.add_column("label", labels), "photos", order=["a", "b", "c"])


@given(st.lists(st.integers(0, 2), min_size=4, max_size=40), st.floats(0.05, 0.6), st.integers(0, 3))
def test_every_class_gives_its_share_and_every_row_is_in_one_part(labels, share, seed):
    if len(set(labels)) == len(labels):
        labels.append(labels[0])
    kept, held = hold_out(labelled(labels), share, seed)
    assert sorted([*kept.numbers, *held.numbers]) == [*range(len(labels))]
    for label in set(labels):
        number = int((held.shown_labels == label).sum())
        assert number == min(max(round(share * labels.count(label)), 1), labels.count(label) - 1)
    assert np.array_equal(held.numbers, hold_out(labelled(labels), share, seed)[1].numbers)
    assert [*held.numbers] == sorted(held.numbers) and [*kept.numbers] == sorted(kept.numbers)


def test_the_seed_says_which(monkeypatch):
    rows = labelled([0, 1] * 20)
    assert len({tuple(hold_out(rows, 0.2, seed)[1].numbers) for seed in range(5)}) > 1


def test_identities_are_held_out_whole():
    rows = image_dataset(12, ["a"]).remove_columns("label").add_column("identity", [f"no {n // 3}" for n in range(12)])
    kept, held = hold_out(labelled_images(rows, "photos", target="identity"), 0.25, 0)
    assert len(held) == 6 and not set(kept.shown_labels) & set(held.shown_labels)


def test_rows_with_texts_are_held_out_by_chance():
    rows = image_dataset(10, ["a"]).remove_columns("label").add_column("text", [f"number {n}" for n in range(10)])
    kept, held = hold_out(labelled_images(rows, "photos", target="text"), 0.3, 0)
    assert (len(kept), len(held)) == (7, 3)


def test_too_few_images_are_refused():
    with pytest.raises(DataError, match="too few images to hold some out .at photos.: got 1"):
        hold_out(labelled([0]), 0.1, 0)


def test_what_is_held_out_of_a_part_is_of_that_part():
    part = labelled([0, 1] * 10).select(range(10, 20))
    kept, held = hold_out(part, 0.2, 0)
    assert min(kept.numbers) >= 10 and min(held.numbers) >= 10 and isinstance(part.rows, Dataset)
