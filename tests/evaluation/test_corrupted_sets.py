# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np

from hf_robust.data.images import load_rgb
from hf_robust.data.rows import labelled_images
from hf_robust.evaluation.corrupted_sets import FIVE, SEVERITY, corrupted_sets
from hf_robust.evaluation.corruptions import corrupt
from tests.tiny_models import image_dataset

NAMES = ["red", "green", "blue"]


def test_each_image_is_in_one_set_under_its_corruption():
    rows = labelled_images(image_dataset(12, NAMES), "id")
    found = corrupted_sets(rows, seed=3)
    assert list(found) == [f"ood_{name}" for name in FIVE] and sum(map(len, found.values())) == 12
    for place, (corruption, part) in enumerate(zip(FIVE, found.values(), strict=True)):
        assert part.class_names == NAMES and part.labels.tolist() == rows.labels[place::5].tolist()
        for index in range(len(part)):
            clean = rows[place + 5 * index]
            expected = corrupt(load_rgb(clean["image"]), corruption, SEVERITY, 3, index)
            row = pickle.loads(pickle.dumps(part))[index]  # as a worker gets it
            assert np.array_equal(np.asarray(load_rgb(row["image"])), np.asarray(expected))
            assert row["label"] == clean["label"]


def test_few_images_make_few_sets():
    assert list(corrupted_sets(labelled_images(image_dataset(2, NAMES), "id"))) == [f"ood_{name}" for name in FIVE[:2]]


def test_images_that_were_looked_at_are_not_looked_at_again():
    rows = replace(labelled_images(image_dataset(6, NAMES), "id"), skipped=["row 7: broken"])
    assert all(part.skipped == ["row 7: broken"] for part in corrupted_sets(rows).values())
