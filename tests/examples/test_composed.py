# SPDX-License-Identifier: Apache-2.0
"""The composed drawings: two of other kinds on every canvas, the same for every making."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "demo"))

import composed  # noqa: E402

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
DRAWINGS = Dataset.from_dict(
    {"image": [PILImage.new("RGB", (64, 64), colour) for colour in COLOURS.values()] * 2, "label": [0, 1, 2] * 2},
    features=Features({"image": Image(), "label": ClassLabel(names=list(COLOURS))}),
)


def test_every_canvas_shows_both_its_kinds_and_nothing_else():
    found = composed.compose(DRAWINGS, "seed", partners=2)
    assert len(found) == 12 and found.features["labels"].feature.names == list(COLOURS)
    for row in found:
        pixels = np.asarray(row["image"])
        shown = {tuple(map(int, colour)) for colour in np.unique(pixels.reshape(-1, 3), axis=0)}
        first, second = (list(COLOURS.values())[label] for label in row["labels"])
        assert shown == {first, second, (255, 255, 255)} and pixels.shape == (64, 64, 3)


def test_they_hang_on_the_seed_alone():
    first, again, other = (composed.compose(DRAWINGS, seed) for seed in ("a", "a", "b"))
    assert [row["image"].tobytes() for row in first] == [row["image"].tobytes() for row in again]
    assert [row["image"].tobytes() for row in first] != [row["image"].tobytes() for row in other]


def test_captions_name_both_kinds_in_either_order():
    drawings = composed.compose(DRAWINGS, "seed")
    names = list(COLOURS)
    for labels, texts in zip(drawings["labels"], composed.caption(drawings)["text"], strict=True):
        a, b = (names[label] for label in labels)
        assert texts == [f"an icon of a {a} and a {b}.", f"an icon of a {b} and a {a}."]
