# SPDX-License-Identifier: Apache-2.0
"""Which sets need to be seeded row by row."""

from __future__ import annotations

import pytest

from hf_robust.data.collator import ImageCollator
from hf_robust.data.rows import labelled_images
from hf_robust.data.target_collators import LabelsCollator, TextCollator
from hf_robust.encoders.dual_encoder import text_tokenizer
from hf_robust.training.repeatable import _shows_the_same
from tests.tiny_models import image_dataset, tiny_model, tiny_processor


def texts(which, transform=None):
    tokenizer = text_tokenizer(tiny_processor("clip"), tiny_model("clip"))
    return TextCollator(ImageCollator(tiny_processor("clip"), transform), tokenizer, which)


SEVERAL, ONE = [["a cat", "a tom"], ["a dog"]], ["a cat", "a dog"]
PLAIN = ImageCollator(tiny_processor("clip"))


@pytest.mark.parametrize(
    ("captions", "collator", "expected"),
    [
        (SEVERAL, texts("one"), False),
        (SEVERAL, texts("all"), True),
        (SEVERAL, texts("one").without_transform(), True),
        (ONE, texts("one"), True),
        (ONE, texts("one", str), False),
        (ONE, LabelsCollator(PLAIN), True),
    ],
)
def test_rows_are_seeded_where_texts_or_images_are_drawn(captions, collator, expected):
    dataset = image_dataset(2, ["a", "b"]).add_column("text", captions)
    assert _shows_the_same(labelled_images(dataset, "photos", target="text"), collator) is expected
    transformed = dataset.with_transform(lambda rows: rows)
    assert not _shows_the_same(labelled_images(transformed, "photos", target="text"), collator)
    assert not _shows_the_same(labelled_images(list(dataset), "photos", target="text"), collator)
