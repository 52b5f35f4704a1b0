# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model

from hf_robust import SAFTConfig, ZeroShotClassifier, model_card
from hf_robust.cards.left_out import left_out
from hf_robust.data.readable import bad_rows, readable_rows
from hf_robust.data.rows import labelled_images
from tests.data.test_readable import spoiled
from tests.tiny_models import image_dataset, tiny_model, tiny_processor
from tests.trainers import NAMES


def classifier(model=None, names=NAMES):
    return ZeroShotClassifier(tiny_model("clip") if model is None else model, tiny_processor("clip"), names)


def test_nothing_is_said_of_nothing() -> None:
    rows = labelled_images(image_dataset(6, NAMES), "train")
    assert left_out(classifier(), rows, {"id": (5, [])}) == [] == left_out(classifier(), None, {})


def test_long_lists_of_images_and_classes_are_cut() -> None:
    names = [f"c{number}" for number in range(14)]
    bad = [f"row {number}, image cannot be opened" for number in range(12)]
    rows = labelled_images(image_dataset(14, names), "train").select([0, 1])
    found = left_out(classifier(names=names), rows, {"id": (88, bad)})
    unseen = "12 classes without a training image: c2, c3, c4, c5, c6, c7, c8, c9, c10, c11 and 2 more"
    images = f"12 of 100 images of the set id: {'; '.join(bad[:10])} and 2 more"
    assert found == [unseen, images]


def test_adapters_that_are_not_active_are_named_by_their_methods() -> None:
    model = get_peft_model(tiny_model("clip"), LoraConfig(target_modules="all-linear"), adapter_name="secret-run")
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    found = left_out(classifier(model), None, {})
    assert found == ["Other adapters of the model, not active and not in these figures: LORA"]
    saft = get_peft_model(tiny_model("clip"), SAFTConfig())
    assert left_out(classifier(saft), None, {}) == []


def test_rows_are_named_without_what_the_system_says_of_files(tmp_path) -> None:
    rows = readable_rows(labelled_images(spoiled([1, 4]), "photos"), silent=True)
    assert bad_rows(rows) == ["row 1, image cannot be decoded", "row 4, image cannot be decoded"]
    assert bad_rows(labelled_images(spoiled([]), "photos")) == []


@pytest.mark.parametrize("text", ["<b>x</b>", "a | b", "[l](http://e)"])
def test_what_was_left_out_is_escaped(text) -> None:
    shown = model_card(classifier(), left_out=[f"1 class: {text}"]).text
    assert text not in shown and "- Left out: 1 class" in shown
