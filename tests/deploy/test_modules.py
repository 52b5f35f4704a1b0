# SPDX-License-Identifier: Apache-2.0
"""A task as plain modules, which answer as the task does and have left it alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from hf_robust import SeveralLabels, ZeroShotClassifier, wise_ft
from hf_robust.deploy.modules import image_classifier, merged_copy, towers
from hf_robust.deploy.positions import resized_positions
from hf_robust.encoders.dual_encoder import image_embeds
from hf_robust.encoders.pretrained import ADAPTERS
from hf_robust.errors import ConfigError, NonFiniteError

from ..methods import METHODS, same_bits
from ..tiny_models import tiny_batch, tiny_model, tiny_processor
from .models import NAMES, all_models, embeds, lora, tuned


@all_models
def test_a_merged_copy_embeds_as_the_model_which_is_left_alone(build: Callable[[], PeftModel]) -> None:
    model = build()
    expected = embeds(model)
    model.base_model.train()
    before, modes = {name: tensor.clone() for name, tensor in model.state_dict().items()}, modes_of(model)
    merged = merged_copy(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(same_bits(before[name], after[name]) for name in before)
    assert modes == modes_of(model) and not any(modes_of(merged))
    assert not any(isinstance(module, ADAPTERS) for module in merged.modules())
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    torch.testing.assert_close(embeds(merged), expected, rtol=0, atol=1e-6)
    with model.eval().disable_adapter():
        assert not torch.allclose(embeds(model), expected, atol=1e-4)


def modes_of(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("head", ["live", "frozen", "trainable"])
@pytest.mark.parametrize("task", [ZeroShotClassifier, SeveralLabels])
@torch.no_grad()
def test_a_baked_head_answers_as_the_task_does_now(task: Any, head: str) -> None:
    """Also at a share α, and among the names of another set."""
    with torch.enable_grad():
        model = tuned(METHODS[1]) if head == "live" else lora()
    classifier = task(model, tiny_processor("clip"), NAMES, "photo", head=head).train()
    if head == "trainable":
        classifier.class_head.bias.uniform_()
    inputs, names = tiny_batch("clip", 3), [NAMES, ["owl", "cat"], ["lynx", "otter"]]
    if head == "live":
        wise_ft(classifier, 0.5)
    for some in names:
        with classifier.classes(some):
            plain = image_classifier(classifier)
            assert classifier.training
            classifier.eval()
            torch.testing.assert_close(plain(**inputs), classifier(**inputs).logits, rtol=1e-5, atol=1e-5)
            classifier.train()


@torch.no_grad()
def test_both_towers_are_of_one_copy_in_float32() -> None:
    model = tiny_model("clip").bfloat16()
    images, texts = towers(ZeroShotClassifier(model, tiny_processor("clip"), NAMES, head="frozen"))
    assert images.model is texts.model and {p.dtype for p in images.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    expected = image_embeds(model, tiny_batch("clip", 2)["pixel_values"].bfloat16())
    torch.testing.assert_close(images(**tiny_batch("clip", 2)), expected, rtol=0, atol=0.02)


@all_models
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_16_bits_nothing_is_rounded_away(build: Callable[[], PeftModel], dtype: torch.dtype) -> None:
    """Adapters in float32 learn what a weight of 16 bits cannot hold."""
    model = build().to(dtype)
    expected = embeds(copy.deepcopy(model).float())
    torch.testing.assert_close(embeds(merged_copy(model)), expected, rtol=0, atol=2e-6)


@torch.no_grad()
def test_attention_of_gpus_becomes_one_of_cpus() -> None:
    model = tiny_model("clip")
    expected = embeds(model)
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config._attn_implementation = "flash_attention_2"
    torch.testing.assert_close(embeds(merged_copy(model)), expected, rtol=0, atol=1e-6)
    assert model.config.vision_config._attn_implementation == "flash_attention_2"


def test_what_cannot_be_merged_is_refused() -> None:
    model = lora()
    with model.disable_adapter(), pytest.raises(ConfigError, match="switched off.*Leave disable_adapter"):
        merged_copy(model)
    injected = tiny_model("clip")
    injected.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match=r"load_adapter.*q_proj.*PeftModel\.from_pretrained"):
        merged_copy(injected)
    quantised = tiny_model("clip")
    quantised.config.quantization_config = {"load_in_8bit": True}
    with pytest.raises(ConfigError, match="quantised.*without quantisation"):
        merged_copy(get_peft_model(quantised, LoraConfig(target_modules=["fc1"])))
    with pytest.raises(ConfigError, match="not a supported dual encoder"):
        merged_copy(nn.Linear(2, 2))


@torch.no_grad()
@pytest.mark.parametrize("part", ["lora_B", "vision_model.encoder.layers.0.mlp.fc1.weight", "visual_projection"])
def test_values_that_are_not_finite_are_refused(part: str) -> None:
    """Of an adapter, of the base, of a module that was trained whole."""
    model = lora()
    named = [one for name, one in model.named_parameters() if part in name and "original_module" not in name]
    named[0].view(-1)[0] = torch.nan
    classifier = ZeroShotClassifier(model, tiny_processor("clip"), NAMES)
    for build in (image_classifier, towers):
        with pytest.raises(NonFiniteError, match=r"to export is NaN or infinite \(at .*(proj|fc1)"):
            build(classifier)


@torch.no_grad()
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_head_that_is_not_finite_is_refused(part: str) -> None:
    classifier = ZeroShotClassifier(tiny_model("clip"), tiny_processor("clip"), NAMES, head="trainable")
    getattr(classifier.class_head, part)[0] = torch.inf
    with pytest.raises(NonFiniteError, match=f"at {part} of the head"):
        image_classifier(classifier)


@pytest.mark.parametrize("grid", [(2, 2), (4, 4), (16, 16)])
def test_positions_are_those_of_transformers(grid: tuple[int, int]) -> None:
    """Smaller grids, larger ones, and long ones; padding gets the position of the first patch."""
    embeddings = tiny_model("siglip2").vision_model.embeddings
    shapes = torch.tensor([[1, 1], [2, 9], [1, 13], [5, 7], [16, 4], [3, 20], [2, 2]])
    positions = torch.randn(*grid, 8)
    expected = embeddings.resize_positional_embeddings(positions, shapes, 64)
    torch.testing.assert_close(resized_positions(positions, shapes, 64), expected, rtol=1e-5, atol=1e-5)


def test_positions_of_a_single_column_are_those_of_a_single_row() -> None:
    """PyTorch's kernel for CPUs gives every row of a single column the first one's value."""
    positions = torch.randn(4, 4, 8)
    rows, columns = resized_positions(positions, torch.tensor([[1, 13], [13, 1]]), 13)
    other = resized_positions(positions.transpose(0, 1), torch.tensor([[1, 13], [13, 1]]), 13)
    torch.testing.assert_close(torch.stack([columns, rows]), other)
    assert not torch.allclose(columns[0], columns[-1])
