# SPDX-License-Identifier: Apache-2.0
"""transformers' pipeline answers as our classifier does, where it can."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModel, Pipeline, ProcessorMixin, pipeline

from hf_robust import ZeroShotClassifier, with_image_size

from ..methods import METHODS, Method, batch, prepared, train
from ..tiny_models import image_dataset, tiny_model, tiny_processor
from .models import MODELS, NAMES, all_models

TASK = "zero-shot-image-classification"
TEMPLATE = "a photo of a {}."
PICTURES = image_dataset(4, NAMES)["image"]


@torch.no_grad()
def our_logits(model: nn.Module, processor: ProcessorMixin, template: str = TEMPLATE) -> Tensor:
    classifier = ZeroShotClassifier(model, processor, NAMES, template, head="frozen").eval()
    return classifier(**processor.image_processor(images=list(PICTURES), return_tensors="pt")).logits


def their_scores(pipe: Pipeline, template: str = TEMPLATE) -> Tensor:
    answers = pipe(list(PICTURES), candidate_labels=NAMES, hypothesis_template=template)
    scores = [{one["label"]: one["score"] for one in answer} for answer in answers]
    return torch.tensor([[of_image[name] for name in NAMES] for of_image in scores])


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=1e-5)


@all_models
def test_on_an_adapter_and_on_the_folder_of_the_merged_model(build: Callable[[], PeftModel], tmp_path: Path) -> None:
    model, processor = build(), tiny_processor("clip")
    expected = our_logits(model, processor).softmax(dim=-1)
    parts = {"image_processor": processor.image_processor, "tokenizer": processor.tokenizer}
    assert close(their_scores(pipeline(TASK, model=model.get_base_model(), **parts)), expected)
    model.merge_and_unload().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert close(their_scores(pipeline(TASK, model=str(tmp_path))), expected)


def test_the_template_is_the_classifiers() -> None:
    """The pipeline's own is another, and there is one alone."""
    model, processor = MODELS["LoRA"](), tiny_processor("clip")
    pipe = pipeline(
        TASK, model=model.get_base_model(), image_processor=processor.image_processor, tokenizer=processor.tokenizer
    )
    assert close(their_scores(pipe, "an owl, {}."), our_logits(model, processor, "an owl, {}.").softmax(dim=-1))
    assert not close(their_scores(pipe, "an owl, {}."), our_logits(model, processor).softmax(dim=-1))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_on_the_folder_of_an_adapter(method: Method, tmp_path: Path) -> None:
    """With our package imported; the adapter's config says where the base is."""
    processor = tiny_processor("clip")
    tiny_model("clip").save_pretrained(tmp_path / "base")
    model = prepared(method, AutoModel.from_pretrained(tmp_path / "base"), "clip")
    train(model, batch("clip"))
    model.save_pretrained(tmp_path / "adapter")
    expected = our_logits(model, processor).softmax(dim=-1)
    parts = {"image_processor": processor.image_processor, "tokenizer": processor.tokenizer}
    assert close(their_scores(pipeline(TASK, model=str(tmp_path / "adapter"), **parts)), expected)
    assert not close(their_scores(pipeline(TASK, model=str(tmp_path / "base"), **parts)), expected)


@pytest.mark.parametrize("family", ["siglip", "siglip2"])
def test_siglips_scores_are_sigmoids(family: str) -> None:
    """Its tokenizer must pad on the right and give no attention mask, as that of the checkpoints is set up."""
    model, processor = tiny_model(family), tiny_processor(family)
    tokenizer = processor.tokenizer
    tokenizer.padding_side, tokenizer.model_input_names = "right", ["input_ids"]
    pipe = pipeline(TASK, model=model, image_processor=processor.image_processor, tokenizer=tokenizer)
    assert close(their_scores(pipe), our_logits(model, processor).sigmoid())


def test_larger_images_are_not_for_the_pipeline() -> None:
    model = tiny_model("clip")
    larger = with_image_size(tiny_processor("clip"), 64, model)
    pipe = pipeline(TASK, model=model, image_processor=larger.image_processor, tokenizer=larger.tokenizer)
    with pytest.raises(ValueError, match=r"64\*64.*doesn't match model"):
        their_scores(pipe)
