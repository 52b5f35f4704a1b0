# SPDX-License-Identifier: Apache-2.0
"""Batches of images with texts, several labels or identities."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader

from hf_robust.data.collator import ImageCollator
from hf_robust.data.draws import Draws
from hf_robust.data.rows import labelled_images
from hf_robust.data.target_collators import IdentityCollator, LabelsCollator, TextCollator
from hf_robust.encoders.dual_encoder import text_tokenizer, tokenize
from hf_robust.errors import DataError
from tests.tiny_models import FAMILIES, image_dataset, tiny_model, tiny_processor

CAPTIONS = [["a cat"], ["two dogs", "dogs at play", "a dog and a dog"], ["an owl", "a bird"]]


def plain(family="clip", **settings):
    return ImageCollator(tiny_processor(family), **settings)


def text_collator(family="clip", texts="one", **settings):
    return TextCollator(plain(family, **settings), text_tokenizer(tiny_processor(family), tiny_model(family)), texts)


def captioned(captions=CAPTIONS):
    dataset = image_dataset(len(captions), ["a", "b"])
    return labelled_images(dataset.add_column("caption", captions), "photos", target="text")  # labels are left alone


@pytest.mark.parametrize("family", FAMILIES)
def test_all_texts_of_a_batch_know_their_images(family):
    rows = captioned()
    batch = text_collator(family, "all")(rows.__getitems__([2, 0, 1]))
    texts = [*CAPTIONS[2], *CAPTIONS[0], *CAPTIONS[1]]
    expected = plain(family).inputs(rows.__getitems__([2, 0, 1]))
    expected |= tokenize(tiny_processor(family), texts, tiny_model(family))
    assert batch.keys() == {*expected, "image_of_text", "rows"} and batch["image_of_text"].tolist() == [
        0,
        0,
        1,
        2,
        2,
        2,
    ]
    assert all(torch.equal(batch[name], expected[name]) for name in expected) and batch["rows"].tolist() == [2, 0, 1]


def ids(batches):
    """The tokens of every text, without what pads them."""
    masks = [zip(batch["input_ids"], batch["attention_mask"], strict=True) for batch in batches]
    return [tuple(tokens[mask == 1].tolist()) for batch in masks for tokens, mask in batch]


def test_the_text_that_is_drawn_hangs_on_seed_epoch_and_row_alone():
    collate, first = pickle.loads(pickle.dumps(text_collator())), text_collator(texts="first")
    draws = Draws(3)
    rows = replace(captioned([CAPTIONS[1]] * 40), draws=draws)
    alone = [ids([collate([rows[index]])])[0] for index in range(40)]
    counts = Counter(alone)
    assert len(counts) == 3 and min(counts.values()) > 5
    state = torch.random.get_rng_state()
    assert ids(DataLoader(rows, 7, num_workers=1, collate_fn=collate, generator=torch.Generator())) == alone
    batch = collate(rows.__getitems__([5, 30, 2]))
    assert ids([batch]) == [alone[index] for index in (5, 30, 2)] and batch["image_of_text"].tolist() == [0, 1, 2]
    draws.set_epoch(1)
    assert ids([collate(rows.__getitems__(list(range(40))))]) != alone
    assert torch.equal(torch.random.get_rng_state(), state)
    expected = ids([first(captioned().__getitems__([0, 1, 2]))])
    assert ids([collate(captioned().__getitems__([0, 1, 2]))]) == expected  # nothing says what a row draws
    drawing = replace(captioned(), draws=draws).__getitems__([0, 1, 2])
    assert ids([collate.without_transform()(drawing)]) == expected


def test_collators_for_evaluation_show_rows_as_they_are():
    for collate in (text_collator(transform=str), LabelsCollator(plain(transform=str)), text_collator("clip", "all")):
        assert collate.without_transform().images.transform is None
    assert text_collator(texts="all").without_transform().texts == "all"


def test_a_text_that_is_too_long_or_not_there_is_a_data_error():
    rows = captioned(["a cat", "a dog", "very " * 40]).__getitems__([0, 2])
    message = r"^text is longer than the text tower \(at {}\).*77 tokens.*{{.pairs.: {{.truncate.: True}}}}"
    with pytest.raises(DataError, match=message.format("photos, row 2")):
        text_collator()(rows)
    opened = [{"image": Image.new("RGB", (9, 9)), "text": row["text"]} for row in rows]
    with pytest.raises(DataError, match=message.format("row 1 of a batch")):
        text_collator()(opened)
    with pytest.raises(DataError, match="row without `text`"):
        text_collator()([{"image": Image.new("RGB", (9, 9)), "caption": "a cat"}])


def test_several_labels_are_numbers_and_nan_where_they_are_not_known():
    picture = Image.new("RGB", (9, 9))
    rows = [{"image": picture, "labels": one, "label": "stray"} for one in ([1, 0, -1], [0, 0, 1])]
    batch = LabelsCollator(plain())(rows)
    expected = torch.tensor([[1.0, 0.0, float("nan")], [0.0, 0.0, 1.0]])
    assert batch["labels"].dtype == torch.float32 and torch.equal(
        batch["pixel_values"], plain().inputs(rows)["pixel_values"]
    )
    torch.testing.assert_close(batch["labels"], expected, equal_nan=True, rtol=0, atol=0)
    assert "labels" not in LabelsCollator(plain())([{"image": picture}])
    for wrong, message in ([[1, 0], "different numbers"], [None, "row without `labels`"]):
        with pytest.raises(DataError, match=message):
            LabelsCollator(plain())([rows[0], {"image": picture, "labels": wrong}])


def test_identities_are_indices():
    dataset = Dataset.from_dict({"image": [Image.new("RGB", (9, 9))] * 3, "identity": ["b", "a", "b"]})
    rows = labelled_images(dataset, "people", target="identity")
    assert IdentityCollator(plain())(list(rows))["labels"].tolist() == [1, 0, 1]
    assert "labels" not in IdentityCollator(plain())([{"image": Image.new("RGB", (9, 9)), "label": 3}])
    with pytest.raises(DataError, match="identity is no class index.*'b'"):
        IdentityCollator(plain())([{"image": Image.new("RGB", (9, 9)), "identity": "b"}])
