# SPDX-License-Identifier: Apache-2.0
"""θ₀'s embeddings while a model is trained, computed live."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_robust.encoders.dual_encoder import image_embeds, text_embeds, tokenize, tower_modules
from hf_robust.encoders.pretrained import pretrained_weights
from hf_robust.errors import ConfigError
from hf_robust.losses.reference import pretrained_image_embeds, pretrained_prompts, pretrained_tower
from hf_robust.tasks.class_names import ZeroShotClassifier
from tests.methods import Method, batch, logits, prepared, train
from tests.tiny_models import FAMILIES, tiny_batch, tiny_model, tiny_processor

NAMES = ["red", "green", "blue"]
LORA = Method("LoRA", lambda: LoraConfig(target_modules=["q_proj", "fc1"], modules_to_save=["visual_projection"]))


@pytest.fixture(params=["method", "LoRA"])
def trained(request, method):
    """A PEFT model after five steps, its vision tower in train mode, its text tower frozen."""
    model = prepared(LORA if request.param == "LoRA" else method, tiny_model("clip"), "clip")
    for name in tower_modules(model, "text"):
        model.get_base_model().get_submodule(name).requires_grad_(False)
    train(model, batch("clip"))
    logits(model, batch("clip"))  # SAFT writes the values of the last step at the next forward
    model.get_base_model().vision_model.train()
    return model


def test_the_live_reference_is_the_base_and_leaves_all_as_it_was(trained):
    inputs = tiny_batch("clip", 4)
    before = {name: parameter.detach().clone() for name, parameter in trained.named_parameters()}
    flags = {name: parameter.requires_grad for name, parameter in trained.named_parameters()}
    modes = {name: module.training for name, module in trained.named_modules()}
    vision = pretrained_tower(trained, "vision")
    embeds = pretrained_image_embeds(vision, {**inputs, "labels": torch.tensor([0, 1, 2, 0])})
    assert vision is trained and not embeds.requires_grad
    assert torch.equal(embeds, image_embeds(tiny_model("clip"), **inputs))
    assert not torch.equal(embeds, image_embeds(trained, **inputs))
    assert flags == {name: parameter.requires_grad for name, parameter in trained.named_parameters()}
    assert modes == {name: module.training for name, module in trained.named_modules()}
    assert any(modes.values()) and not all(modes.values())
    assert any(flags.values()) and not any(flag for name, flag in flags.items() if "text_model" in name)
    assert all(torch.equal(parameter, before[name]) for name, parameter in trained.named_parameters())


def test_all_is_as_it_was_after_an_error_too(trained):
    flags = [parameter.requires_grad for parameter in trained.parameters()]
    modes = [module.training for module in trained.modules()]
    with pytest.raises(RuntimeError, match="stop"), pretrained_weights(trained):
        raise RuntimeError("stop")
    assert flags == [parameter.requires_grad for parameter in trained.parameters()]
    assert modes == [module.training for module in trained.modules()]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_frozen_copies_stay_and_hold_one_tower_each(family):
    model, inputs = tiny_model(family).train(), tiny_batch(family, 3)
    tokens = tokenize(tiny_processor(family), ["a photo of a cat.", "dog"], model)
    plain = tiny_model(family)
    with torch.no_grad():
        expected = image_embeds(plain, **inputs), text_embeds(plain, **tokens)
    vision, text = (pretrained_tower(model, tower) for tower in ("vision", "text"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
        found = pretrained_image_embeds(vision, inputs), text_embeds(text, **tokens)
    assert all(map(torch.equal, found, expected))
    assert not torch.equal(image_embeds(model, **inputs), expected[0])
    for copy, other in ((vision, "text"), (text, "vision")):
        assert not any(list(copy.get_submodule(name).parameters()) for name in tower_modules(model, other))
        assert model.training and not copy.training


def test_a_tower_that_is_not_trained_is_its_own_reference():
    model = tiny_model("clip")
    ZeroShotClassifier(model, tiny_processor("clip"), NAMES, head="frozen")
    assert pretrained_tower(model, "text") is model
    assert pretrained_tower(model, "vision") is not model


def test_class_embeddings_of_the_base_in_parts_or_not(trained, monkeypatch):
    monkeypatch.setattr("hf_robust.encoders.class_embeds.PROMPTS_AT_ONCE", 1)
    classifier = ZeroShotClassifier(trained, tiny_processor("clip"), NAMES)
    plain = tiny_model("clip")
    prompts = tokenize(tiny_processor("clip"), [f"a photo of a {name}." for name in NAMES], plain)
    embeds = classifier.prompts.pick(pretrained_prompts(classifier), None)
    with torch.enable_grad():
        bits = ZeroShotClassifier(plain, tiny_processor("clip"), NAMES).encode_prompts()
    assert torch.equal(embeds, bits) and not embeds.requires_grad
    torch.testing.assert_close(embeds, text_embeds(plain, **prompts).detach(), atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias:UserWarning")
def test_weights_trained_beside_an_adapter_are_refused():
    model = get_peft_model(tiny_model("clip"), LoraConfig(target_modules=["q_proj"], bias="all"))
    with pytest.raises(ConfigError, match="trained beside the adapter.*vision_model.*bias='none'"):
        pretrained_tower(model, "vision")
    assert any(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_A" in name)
