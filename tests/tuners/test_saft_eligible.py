# SPDX-License-Identifier: Apache-2.0
"""Which parameters may hold entries, and which settings are wrong."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import CLIPConfig, CLIPModel

from hf_robust import SAFTConfig, mask_summary, select_saft
from hf_robust.errors import ConfigError
from hf_robust.tuners.saft.eligible import eligible_parameters
from hf_robust.tuners.saft.selection import _budget, find_layers

from ..tiny_models import FAMILIES, tiny_model
from .zoo import batches, exact_loss, zoo


def eligible(config: SAFTConfig, model: nn.Module) -> set[str]:
    wrapped = get_peft_model(model, config)
    return {
        f"{layer.unit}.{name}" for layer in find_layers(wrapped, None)[0] for name in layer.saft_eligible["default"]
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_both_towers_and_projections_is_eligible(family: str) -> None:
    names = {name for name, _ in tiny_model(family).named_parameters()}
    found = eligible(SAFTConfig(exclude_input_embeddings=False), tiny_model(family))
    assert found == names - {"logit_scale", "logit_bias"}


def test_vit_b_32_has_the_papers_budget() -> None:
    """All but `logit_scale`, each tied tensor once: 0.1 % are 151,277 entries."""
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig())
    for excluded, expected in ((False, 151_277_312), (True, 151_277_312 - 768 * 3 * 32 * 32 - 49_408 * 512)):
        units = eligible_parameters(model, SAFTConfig(exclude_input_embeddings=excluded))
        numel = sum(model.get_parameter(f"{unit}.{name}").numel() for unit, names in units.items() for name in names)
        assert numel == expected and _budget(0.001, numel) == expected // 1000


@pytest.mark.parametrize("family", FAMILIES)
def test_towers_split_the_model(family: str) -> None:
    vision, text = (eligible(SAFTConfig(towers=tower), tiny_model(family)) for tower in ("vision", "text"))
    assert vision and text and not vision & text
    assert vision | text == eligible(SAFTConfig(), tiny_model(family))
    assert all(re.search("vis", name) for name in vision) and all(re.search("text", name) for name in text)


@pytest.mark.parametrize("family", FAMILIES)
def test_input_embeddings_are_left_out(family: str) -> None:
    everything = eligible(SAFTConfig(exclude_input_embeddings=False), tiny_model(family))
    left_out = everything - eligible(SAFTConfig(), tiny_model(family))
    kinds = {re.search(r"(patch_embedding|token_embedding|word_embedding)", name).group(1) for name in left_out}
    assert "patch_embedding" in kinds and kinds & {"token_embedding", "word_embedding"}
    assert len([name for name in left_out if name.endswith("weight")]) == 2


def test_target_and_exclude_modules() -> None:
    found = eligible(SAFTConfig(target_modules=["twice", "patches"], exclude_modules=["bias"]), zoo())
    assert found == {"tower.block.twice.weight", "tower.patches.class_embedding", "tower.patches.convolution.weight"}
    assert eligible(SAFTConfig(target_modules=r".*\.norm"), zoo()) == {
        "tower.block.norm.weight",
        "tower.block.norm.bias",
    }
    assert not any(n.startswith("tower.head") for n in eligible(SAFTConfig(modules_to_save=["head"]), zoo()))


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"density": 0}, r"density.*got 0; allowed a number in \(0, 1\]"),
        ({"density": 1.1}, r"got 1.1"),
        ({"density": float("nan")}, "got nan"),
        ({"density": True}, "got True"),
        ({"density": "0.1"}, "got '0.1'"),
        ({"score": "gradient"}, "unknown score: got 'gradient'; allowed signed_mean, abs_mean"),
        ({"scope": "layer"}, "allowed global, per_tensor"),
        ({"towers": "image"}, "allowed both, vision, text"),
        ({"target_modules": []}, "target_modules is empty"),
    ],
)
def test_wrong_settings(settings_: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SAFTConfig(**settings_)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"target_modules": ["twise"]}, "target_modules matches no module: got 'twise'. Did you mean 'twice'"),
        ({"target_modules": ["twice", "nope"]}, "got 'nope'"),
        ({"exclude_modules": ["nope"]}, "exclude_modules matches no module"),
        ({"target_modules": "("}, "no regular expression.*got '\\('"),
        ({"target_modules": ["head"], "exclude_modules": ["head"]}, "no parameter is left"),
        ({"towers": "vision"}, "get_image_features"),
    ],
)
def test_settings_that_do_not_fit_the_model_leave_it_untouched(settings_: dict, message: str) -> None:
    model = zoo()
    with warnings.catch_warnings(), pytest.raises(ConfigError, match=message):
        get_peft_model(model, SAFTConfig(**settings_))
    assert [type(m) for m in model.modules()] == [type(m) for m in zoo().modules()]


def tied_zoo() -> nn.Module:
    model = zoo()
    model.tower.other = nn.Linear(8, 3, bias=True).double()
    model.tower.other.weight = model.tower.head.weight
    return model


def test_an_eligible_tied_parameter_is_refused() -> None:
    for settings_ in ({}, {"target_modules": ["head"]}, {"target_modules": ["other"]}):
        with pytest.raises(ConfigError, match=r"share a parameter.*tower\.head.*tower\.other.*with exclude_modules"):
            get_peft_model(tied_zoo(), SAFTConfig(**settings_))
    of_the_root = zoo()
    of_the_root.weight = of_the_root.tower.head.weight
    with pytest.raises(ConfigError, match=r"share a parameter.*'the model', 'tower\.head'"):
        get_peft_model(of_the_root, SAFTConfig())


@pytest.mark.parametrize(
    "settings_",
    [
        {"exclude_modules": ["head"]},  # as the message recommends, by either name
        {"exclude_modules": ["other.weight"]},
        {"exclude_modules": r".*\.other"},
        {"modules_to_save": ["head"]},
        {"target_modules": ["twice"]},
        {"target_modules": ["other"], "exclude_modules": ["head"]},
    ],
)
def test_a_tied_parameter_is_left_out_as_a_whole(settings_: dict) -> None:
    found = eligible(SAFTConfig(**settings_), tied_zoo())
    assert found and not found & {"tower.head.weight", "tower.other.weight"}
    targeted = "other" in settings_.get("target_modules", ["other"])
    assert ("tower.other.bias" in found) == (targeted and settings_.get("exclude_modules") != r".*\.other")


@pytest.mark.filterwarnings("ignore:.*tied:UserWarning")
def test_a_parameter_tied_to_a_head_that_is_saved_whole() -> None:
    """For the second adapter the head is in PEFT's wrapper."""
    config = SAFTConfig(density=0.1, score="random", modules_to_save=["other"])
    model = get_peft_model(tied_zoo(), config)
    model.add_adapter("second", config)
    layers = find_layers(model, None)[0]
    assert all(layer.saft_eligible["default"] == layer.saft_eligible["second"] for layer in layers)
    assert not any(layer.unit == "tower.head" for layer in layers)
    with pytest.raises(ConfigError, match=r"share a parameter.*tower\.head.*tower\.other"):
        model.add_adapter("third", SAFTConfig())


def test_a_model_with_a_tied_parameter_trains() -> None:
    model = get_peft_model(tied_zoo(), SAFTConfig(density=0.1, score="random", exclude_modules=["head"]))
    select_saft(model)
    batch = batches()[0]
    exact_loss(model, batch).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    plain = model.unload()
    assert plain.tower.other.weight is plain.tower.head.weight


def test_renormalising_embeddings_are_refused() -> None:
    renormalising = nn.Sequential(nn.Embedding(4, 3, max_norm=1.0))
    with pytest.raises(ConfigError, match="max_norm=1.0"):
        get_peft_model(renormalising, SAFTConfig())


def test_the_summary_names_kinds_counts_and_shares() -> None:
    model = get_peft_model(tiny_model("clip"), SAFTConfig(density=0.5, score="magnitude"))
    select_saft(model)
    summary = mask_summary(model)
    sizes = {name: p.numel() for name, p in tiny_model("clip").named_parameters()}
    embeddings = [name for name in sizes if "patch_embedding" in name or "token_embedding" in name]
    eligible_count = sum(sizes.values()) - sum(sizes[name] for name in (*embeddings, "logit_scale"))
    assert len(embeddings) == 2
    assert summary.selected == sum(kind.count for kind in summary.kinds) == eligible_count // 2
    assert summary.parameters == sum(sizes.values())
    assert sum(kind.share_of_entries for kind in summary.kinds) == pytest.approx(1)
    projection = next(kind for kind in summary.kinds if kind.kind == "visual_projection.weight")
    weight = tiny_model("clip").visual_projection.weight
    assert projection.share_of_tensor == pytest.approx(projection.count / weight.numel())
    queries = [k for k in summary.kinds if k.kind == "vision_model.encoder.layers.*.self_attn.q_proj.weight"]
    assert len(queries) == 1
    assert f"{summary.selected:,} of {summary.parameters:,}" in str(summary)
    assert len(str(summary).splitlines()) == 13 and "other kinds" in str(summary)
