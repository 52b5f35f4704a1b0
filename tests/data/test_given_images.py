# SPDX-License-Identifier: Apache-2.0
"""Images as a user has them; how they are opened and predicted is tested with the tasks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_robust.data import given_images as module
from hf_robust.data.given_images import GivenImages, given_images
from hf_robust.errors import DataError
from tests.tiny_models import image_dataset


def test_one_image_is_told_from_several():
    one = [
        "a.jpg",
        Path("a.jpg"),
        Image.new("RGB", (4, 3)),
        np.zeros((4, 3, 3), np.uint8),
        {"bytes": b"", "path": None},
    ]
    assert [len(given_images(image)) for image in one] == [1] * 5
    assert len(given_images(one)) == len(given_images(tuple(one))) == 5
    assert len(given_images(np.zeros((7, 4, 3, 3), np.uint8))) == len(given_images(image_dataset(7, ["a", "b"]))) == 7


def test_nothing_is_opened_or_downloaded_before_its_turn(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "download", lambda *args: asked.append(args) or b"no image")
    rows = given_images(["none.png", "https://example.org/b.png", np.zeros(3)])
    found = [rows[place]["image"] for place in range(len(rows))]
    assert isinstance(rows, GivenImages) and not asked
    for image, message in zip(
        found, ["image 0, none.png", "image 1, https://example.org/b.png", "image 2"], strict=True
    ):
        with pytest.raises(DataError, match=f"at {message}"):
            image.open()
    assert asked == [("https://example.org/b.png", "image 1")]
