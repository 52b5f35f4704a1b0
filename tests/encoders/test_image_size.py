# SPDX-License-Identifier: Apache-2.0
"""Images of another size than in pre-training."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from hf_robust import SAFTConfig, select_saft, with_image_size
from hf_robust.encoders.dual_encoder import INTERPOLATING, SIZE_FREE, base_model, image_embeds
from hf_robust.encoders.image_size import pixels_of
from hf_robust.errors import ConfigError
from tests.methods import batch, loss_fn
from tests.tiny_models import (
    FAMILIES,
    IMAGE_SIZE,
    PATCH_SIZE,
    PROJECTION,
    TRANSFORMER,
    VISION,
    synthetic_picture,
    tiny_model,
    tiny_processor,
)

TWICE = 2 * IMAGE_SIZE
SQUARE = [name for name in FAMILIES if name != "siglip2"]
TOWERS = {
    "clip": transformers.CLIPVisionConfig,
    "siglip": transformers.SiglipVisionConfig,
    "deit": transformers.DeiTConfig,
    "dinov2": transformers.Dinov2Config,
    "dinov2_with_registers": transformers.Dinov2WithRegistersConfig,
    "dinov3": transformers.DINOv3ViTConfig,
}


def two_towers(vision_config):
    text = transformers.BertConfig(**TRANSFORMER, vocab_size=160)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        vision_config, text, projection_dim=PROJECTION
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.VisionTextDualEncoderModel(config).eval()


MODELS = {
    **{name: lambda name=name: (tiny_model(name), tiny_processor(name)) for name in SQUARE},
    **{
        f"two towers, {name}": lambda config=config: (
            two_towers(config(**VISION)),
            tiny_processor("vision-text-dual-encoder"),
        )
        for name, config in TOWERS.items()
    },
}


def pixels(processor, n=3):
    pictures = [synthetic_picture(index, 5, 90, seed=index) for index in range(n)]
    return processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_are_transformers_own_with_interpolated_positions(name):
    model, processor = MODELS[name]()
    images = pixels(with_image_size(processor, TWICE, model))
    assert images.shape == (3, 3, TWICE, TWICE)
    with torch.no_grad():
        own = model.get_image_features(pixel_values=images, interpolate_pos_encoding=True).pooler_output
        assert torch.equal(image_embeds(model, images), F.normalize(own, dim=-1))


def test_every_tower_that_is_let_through_is_tried():
    tried = {MODELS[name]()[0].config.vision_config.model_type for name in MODELS}
    assert tried == {*INTERPOLATING, *SIZE_FREE}


@pytest.mark.parametrize("name", FAMILIES)
def test_at_the_size_of_pretraining_transformers_is_asked_for_nothing(name, monkeypatch):
    model, processor = tiny_model(name), tiny_processor(name)
    asked = []
    own = model.get_image_features
    monkeypatch.setattr(model, "get_image_features", lambda **inputs: asked.append(set(inputs)) or own(**inputs))
    images = processor.image_processor(images=[synthetic_picture(0, 5, 90, seed=0)], return_tensors="pt")
    image_embeds(model, **images)
    if name != "siglip2":
        image_embeds(model, torch.zeros(1, 3, IMAGE_SIZE, TWICE))
    assert asked == [set(images), {"pixel_values", "interpolate_pos_encoding"}][: len(asked)]
    assert len(asked) == (1 if name == "siglip2" else 2)


@pytest.mark.parametrize("name", SQUARE)
def test_the_given_processor_is_left_as_it_was(name):
    model, processor = tiny_model(name), tiny_processor(name)
    before = processor.image_processor.to_json_string()
    larger = with_image_size(processor, TWICE, model)
    assert processor.image_processor.to_json_string() == before and pixels(processor).shape[-1] == IMAGE_SIZE
    assert type(larger) is type(processor) and larger.tokenizer is processor.tokenizer
    same = with_image_size(larger, IMAGE_SIZE, model)
    assert same.image_processor.to_json_string() == before  # caches of embeddings are named by it
    assert with_image_size(processor, None, model) is processor


def test_the_border_that_is_cut_off_stays_the_same_fraction():
    crop = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = tiny_processor("clip")
    processor.image_processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=crop)
    larger = with_image_size(processor, TWICE, tiny_model("clip")).image_processor.to_dict()
    assert larger["size"] == {"shortest_edge": 80} and larger["crop_size"] == {"height": TWICE, "width": TWICE}


@pytest.mark.parametrize("name", SQUARE)
@pytest.mark.parametrize("wrap", ["full", "saft"])
def test_positions_are_trained_through_the_interpolation(name, wrap):
    model = tiny_model(name)
    images = {**batch(name), "pixel_values": pixels(with_image_size(tiny_processor(name), TWICE, model), n=4)}
    if wrap == "saft":
        config = SAFTConfig(density=0.05, scope="per_tensor", exclude_input_embeddings=False)
        model = get_peft_model(model, config)
        select_saft(model, [images], loss_fn)
    model.train()
    loss_fn(model, images).backward()
    towers = base_model(model).named_parameters()
    trained = {name: parameter.grad for name, parameter in towers if parameter.requires_grad}
    trained.pop("logit_bias", None)
    assert any("position_embedding" in name or ".embeddings.saft_values" in name for name in trained)
    assert [name for name, grad in trained.items() if grad is None or not grad.any()] == []


@pytest.mark.parametrize("name", ["siglip", "siglip2"])
def test_saft_values_of_positions_are_seen(name):
    """These towers read the weight of an Embedding that SAFT has wrapped."""
    model, processor = tiny_model(name), tiny_processor(name)
    if name == "siglip":
        processor = with_image_size(processor, TWICE, model)
    inputs = dict(processor.image_processor(images=[synthetic_picture(0, 5, 90, seed=0)], return_tensors="pt"))
    model = get_peft_model(
        model, SAFTConfig(density=0.5, score="random", target_modules=["position_embedding.weight"])
    )
    select_saft(model)
    with torch.no_grad():
        before = image_embeds(model, **inputs)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
        changed = image_embeds(model, **inputs)
        assert (changed - before).abs().max() > 1e-3
        with model.disable_adapter():
            assert torch.equal(image_embeds(model, **inputs), before)
        assert torch.equal(image_embeds(model.merge_and_unload(), **inputs), changed)


# --- refusals ---


@pytest.mark.parametrize(
    "size, nearest", [(40, "32, 48"), (0, "16"), (-32, "16"), (9, "16"), (True, None), (64.0, None), ("64", None)]
)
def test_sizes_that_are_refused(size, nearest):
    message = "positive integer" if nearest is None else f"multiples of 16, the nearest: {nearest}$"
    with pytest.raises(ConfigError, match=message):
        with_image_size(tiny_processor("clip"), size, tiny_model("clip"))


def test_the_size_of_pretraining_need_be_no_multiple():
    """SigLIP's largest has 384 pixels and patches of 14."""
    size = IMAGE_SIZE + PATCH_SIZE // 2
    model = two_towers(transformers.SiglipVisionConfig(**{**VISION, "image_size": size}))
    processor = with_image_size(tiny_processor("vision-text-dual-encoder"), size, model)
    images = pixels(processor)
    assert images.shape[-1] == size and image_embeds(model, images).shape == (3, PROJECTION)
    with pytest.raises(ConfigError, match="multiples of 16"):
        with_image_size(processor, size + PATCH_SIZE, model)


def test_pixels_beside_the_patches_are_not_dropped_silently():
    with pytest.raises(ConfigError, match="got 40; allowed multiples of 16"):
        image_embeds(tiny_model("clip"), torch.zeros(1, 3, IMAGE_SIZE, 40))


def test_siglip2_chooses_its_own_shapes():
    model, processor = tiny_model("siglip2"), tiny_processor("siglip2")
    with pytest.raises(ConfigError, match="no size in pixels.*max_num_patches"):
        with_image_size(processor, TWICE, model)
    processor.image_processor.max_num_patches = 16  # the remedy
    assert pixels_of(processor).shape[1] == 16


def test_a_tower_of_one_size_is_refused():
    model = two_towers(transformers.Aimv2VisionConfig(**VISION))
    with pytest.raises(ConfigError, match="another size.*got 'aimv2_vision_model'; allowed clip_vision_model.*dinov2"):
        with_image_size(tiny_processor("vision-text-dual-encoder"), TWICE, model)


def test_one_tower_alone_is_refused():
    with pytest.raises(ConfigError, match="not a supported dual encoder"):
        with_image_size(tiny_processor("clip"), TWICE, tiny_model("clip").vision_model)


def test_an_image_processor_without_a_square_is_refused():
    processor = tiny_processor("clip")
    processor.image_processor.do_center_crop = False
    with pytest.raises(ConfigError, match=r"does not make squares: got \(32, 48\)"):
        with_image_size(processor, TWICE, tiny_model("clip"))


def test_an_image_processor_that_does_not_resize_is_refused():
    processor = tiny_processor("clip")
    processor.image_processor.do_resize = False
    with pytest.raises(ConfigError, match="does not resize"):
        with_image_size(processor, TWICE, tiny_model("clip"))


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_pefts_adapter_on_positions_is_refused(name):
    """Where positions are interpolated its weight is read, and PEFT hands out that of the base."""
    model = get_peft_model(tiny_model(name), LoraConfig(target_modules=["q_proj", "position_embedding"]))
    with pytest.raises(ConfigError, match="vision_model.embeddings.position_embedding"):
        with_image_size(tiny_processor(name), TWICE, model)
    with_image_size(
        tiny_processor(name), TWICE, get_peft_model(tiny_model(name), LoraConfig(target_modules=["q_proj"]))
    )
