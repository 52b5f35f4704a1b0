# SPDX-License-Identifier: Apache-2.0
"""A-CLIP: what only this method promises; what every method does is in test_methods*.py."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel, PreTrainedModel

from hf_robust import ACLIPConfig
from hf_robust.encoders.dual_encoder import image_embeds, text_embeds
from hf_robust.errors import ConfigError, NonFiniteError
from tests.methods import (
    CLIP,
    METHODS,
    all_families,
    assert_same,
    base_tensors,
    batch,
    logits,
    outputs,
    same_bits,
    train,
    trained,
)
from tests.tiny_models import TRANSFORMER, VISION, tiny_model

ACLIP = next(method for method in METHODS if method.name == "A-CLIP")
QKV = {
    "vision-text-dual-encoder": {"q_proj", "k_proj", "v_proj", "query", "key", "value"},
}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


# --- what is trained ---


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 30_716_928),
        ({"train_bias": False}, 30_670_848),
        ({"towers": "vision"}, 21_261_312),
        ({"towers": "text"}, 9_455_616),
        ({"train_out_proj": True}, 30_716_928 + 12 * (768 * 768 + 768) + 12 * (512 * 512 + 512)),
        ({"target_modules": r".*\.q_proj", "exclude_modules": ["text_model"]}, 12 * (768 * 768 + 768)),
    ],
)
def test_number_of_parameters_of_vit_b_32(settings: dict, count: int) -> None:
    with torch.device("meta"):
        model = get_peft_model(CLIPModel(CLIPConfig()), ACLIPConfig(**settings))  # the config's defaults are ViT-B/32
    assert sum(parameter.numel() for parameter in trainable(model).values()) == count


@all_families
@pytest.mark.parametrize("out_proj", [False, True])
def test_the_projections_of_every_block_and_nothing_else(family: str, out_proj: bool) -> None:
    model = get_peft_model(tiny_model(family), ACLIPConfig(train_out_proj=out_proj))
    names = [name.removeprefix("base_model.model.").split(".aclip_")[0] for name in trainable(model)]
    modules = dict(tiny_model(family).named_modules())
    assert all(type(modules[name]) is nn.Linear for name in names)
    last = {name.split(".")[-1] for name in names}
    qkv = QKV.get(family, {"q_proj", "k_proj", "v_proj"})
    assert last - {"out_proj", "o_proj", "dense"} == qkv and (last != qkv) == out_proj
    assert len(set(names)) == 2 * 2 * (4 if out_proj else 3)  # towers, blocks
    assert not any(".head." in name for name in names)  # SigLIP's pooling


@pytest.mark.parametrize(("towers", "still"), [("vision", text_embeds), ("text", image_embeds)])
def test_one_tower_leaves_the_other_alone(towers: str, still: object) -> None:
    model = get_peft_model(tiny_model(CLIP), ACLIPConfig(towers=towers))
    train(model, batch(CLIP))
    inputs = batch(CLIP)
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    arguments = texts if towers == "vision" else {"pixel_values": inputs["pixel_values"]}
    assert same_bits(still(model, **arguments), still(tiny_model(CLIP), **arguments))
    assert not same_bits(outputs(model), outputs(tiny_model(CLIP)))


def test_any_model_takes_named_modules() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), ACLIPConfig(target_modules=["1"]))
    assert [p.numel() for p in trainable(model).values()] == [8, 2]


# --- the forward ---


@all_families
def test_the_copy_is_the_weight_of_the_forward(family: str) -> None:
    """The oracle is the base with the tuned tensors written into it, in float64."""
    model = trained(ACLIP, family)
    by_hand = tiny_model(family)
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            module, _, tensor = name.removeprefix("base_model.model.").removesuffix(".default").rpartition(".aclip_")
            by_hand.get_submodule(module).get_parameter(tensor).copy_(parameter)
    assert same_bits(outputs(model, family), outputs(by_hand, family))
    exact = logits(by_hand.double(), batch(family))
    torch.testing.assert_close(outputs(model, family).double(), exact, rtol=1e-4, atol=1e-4)


def test_no_extra_work_in_the_forward() -> None:
    counts = []
    for model in (tiny_model(CLIP), trained(ACLIP)):
        with FlopCounterMode(display=False) as counter:
            outputs(model)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_autocast_changes_nothing_at_the_start() -> None:
    found = []
    for model in (tiny_model(CLIP), get_peft_model(tiny_model(CLIP), ACLIPConfig())):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(logits(model.train(), batch(CLIP)))
    assert found[1].requires_grad and same_bits(found[0].detach(), found[1].detach())


# --- merging ---


def test_one_adapter_after_the_other_merges_to_the_sum() -> None:
    model = trained(ACLIP)
    model.add_adapter("second", ACLIPConfig(towers="vision"))
    model.set_adapter("second")
    train(model, batch(CLIP, seed=1))
    model.base_model.set_adapter(["default", "second"])
    both = outputs(model)
    model.merge_adapter(["second"])
    with pytest.warns(UserWarning, match="additionally merging default"):
        model.merge_adapter(["default"])
    torch.testing.assert_close(outputs(model), both, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert_same(base_tensors(model), tiny_model(CLIP).state_dict())
    assert same_bits(outputs(model), both)


def test_a_merged_model_changes_its_format() -> None:
    model = trained(ACLIP)
    model.merge_adapter()
    model.half()
    model.unmerge_adapter()
    assert_same(base_tensors(model), tiny_model(CLIP).half().state_dict())
    model.merge_adapter()
    assert_same(model.unload().state_dict(), tiny_model(CLIP).half().state_dict())


def test_an_adapter_added_to_a_merged_base_starts_at_the_base() -> None:
    model = trained(ACLIP)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging"):  # once the adapter has been added
        model.add_adapter("second", ACLIPConfig())
    model.set_adapter("second")
    assert same_bits(outputs(model.eval()), outputs(tiny_model(CLIP)))


def test_safe_merge_names_what_is_not_finite() -> None:
    model = trained(ACLIP)
    with torch.no_grad():
        next(iter(trainable(model).values())).fill_(torch.inf)
    with pytest.raises(NonFiniteError, match=r"NaN or infinity.*\['default'\]"):
        model.merge_adapter(safe_merge=True)


# --- refusals ---


def unknown_projections() -> PreTrainedModel:
    text = transformers.DistilBertConfig(dim=32, hidden_dim=48, n_layers=1, n_heads=2, vocab_size=80)
    vision = transformers.ViTConfig(**VISION)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=8)
    return transformers.VisionTextDualEncoderModel(config)


class Packed(nn.Linear):
    """Stands for the Linear of a quantisation library."""


def with_packed() -> PreTrainedModel:
    model = tiny_model(CLIP)
    model.vision_model.encoder.layers[0].self_attn.q_proj = Packed(TRANSFORMER["hidden_size"], 32)
    return model


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (tiny_model, {"target_modules": ["qproj"]}, "target_modules matches no module.*'qproj'.*'q_proj'"),
        (tiny_model, {"target_modules": "("}, "no regular expression"),
        (tiny_model, {"exclude_modules": ["kproj"]}, "exclude_modules matches no module.*'k_proj'"),
        (tiny_model, {"exclude_modules": ["self_attn"]}, "no module is left"),
        (lambda _: unknown_projections(), {}, "the text tower has no projection.*allowed q_proj.*target_modules"),
        (lambda _: with_packed(), {}, "plain Linear.*layers.0.self_attn.q_proj.*'Packed'.*unquantised"),
        (lambda _: nn.Sequential(nn.Linear(2, 2)), {}, "dual encoder.*open_clip"),
        (lambda _: nn.Sequential(nn.Linear(2, 2)), {"target_modules": ["0"], "towers": "text"}, "dual encoder"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_left_alone(make: object, settings: dict, message: str) -> None:
    model = make(CLIP)
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ConfigError, match=message):
        get_peft_model(model, ACLIPConfig(**settings))
    assert [(name, type(module)) for name, module in model.named_modules()] == before


@pytest.mark.parametrize("whole", [False, True], ids=["parameter", "module"])
def test_what_modules_share_is_refused_unless_it_is_excluded(whole: bool) -> None:
    """Each would get a copy of its own, and merging would write one over the other."""
    model = tiny_model(CLIP)
    attention = model.text_model.encoder.layers[0].self_attn
    if whole:
        attention.q_proj = attention.k_proj
    else:
        attention.q_proj.weight = attention.k_proj.weight
    with pytest.raises(ConfigError, match=r"several modules share.*self_attn.*exclude_modules"):
        get_peft_model(model, ACLIPConfig())
    excluded = [f"text_model.encoder.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj")]
    assert trainable(get_peft_model(model, ACLIPConfig(exclude_modules=excluded[whole:])))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"towers": "image"}, "unknown towers.*'image'.*both, vision, text"),
        ({"train_bias": 1}, "train_bias is no switch"),
        ({"train_out_proj": "no"}, "train_out_proj is no switch"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"exclude_modules": ()}, "exclude_modules is empty"),
        ({"train_out_proj": True, "target_modules": ["q_proj"]}, "default target_modules alone"),
    ],
)
def test_settings_are_checked(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ACLIPConfig(**settings)


def test_names_of_modules_may_come_as_a_set() -> None:
    assert ACLIPConfig(target_modules={"v_proj", "q_proj"}).target_modules == ["q_proj", "v_proj"]
