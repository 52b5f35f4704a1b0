# SPDX-License-Identifier: Apache-2.0
"""A processor that is not the one an adapter was trained with is told."""

from __future__ import annotations

import copy
import warnings

import pytest
from peft import PeftModel
from transformers import AutoProcessor

from hf_robust import ZeroShotClassifier, class_embeddings
from hf_robust.errors import AdapterFileError
from tests.tiny_models import FAMILIES, tiny_model, tiny_processor
from tests.trainers import NAMES, build


def saved(folder, method, family="clip"):
    trainer = build(folder, method, family, max_steps=1)
    trainer.train()
    trainer.save_model()


def other_processor(**settings):
    processor = tiny_processor("clip")
    for name, value in settings.items():
        setattr(processor.image_processor, name, value)
    return processor


@pytest.mark.parametrize("method", ["saft", "aclip"])
def test_images_prepared_otherwise_than_in_training_are_a_warning(tmp_path, method):
    saved(tmp_path, method)
    model = PeftModel.from_pretrained(tiny_model("clip"), tmp_path)
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    other = other_processor(image_mean=[0.5, 0.5, 0.5], do_center_crop=False)
    message = (
        r"second was trained with other images: do_center_crop was True and is False, image_mean was \[0.48.*0.5, "
    )
    for use in (ZeroShotClassifier, class_embeddings):
        with pytest.warns(UserWarning, match=message):
            use(model, other, NAMES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_images_are_none(tmp_path, family):
    saved(tmp_path, "saft", family)
    model = PeftModel.from_pretrained(tiny_model(family), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for processor in (tiny_processor(family), AutoProcessor.from_pretrained(tmp_path, subfolder="processor")):
            ZeroShotClassifier(model, processor, NAMES)
            ZeroShotClassifier(copy.deepcopy(model), processor, NAMES)


def test_what_is_known_of_the_images_is_not_saved_with_the_settings(tmp_path):
    saved(tmp_path / "first", "saft")
    model = PeftModel.from_pretrained(tiny_model("clip"), tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    first, second = (tmp_path / name / "adapter_config.json" for name in ("first", "second"))
    assert "image_mean" not in second.read_text() and len(second.read_text()) <= len(first.read_text()) + 10
    again = PeftModel.from_pretrained(tiny_model("clip"), tmp_path / "second")
    ZeroShotClassifier(again, other_processor(do_center_crop=False), NAMES)  # nothing is known, nothing is said


def test_a_damaged_processor_beside_an_adapter_is_an_error(tmp_path):
    saved(tmp_path, "saft")
    file = tmp_path / "processor" / "processor_config.json"
    file.write_text(file.read_text()[:-20])
    with pytest.raises(AdapterFileError, match="processor_config.json"):
        PeftModel.from_pretrained(tiny_model("clip"), tmp_path)
