# SPDX-License-Identifier: Apache-2.0
"""R-Adapter: what only this method promises; what every method does is in test_methods*.py."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel

from hf_robust import RAdapterConfig, wise_ft
from hf_robust.encoders.dual_encoder import text_embeds
from hf_robust.errors import ConfigError
from hf_robust.tuners.radapter import RAdapterLayer
from tests.methods import (
    CLIP,
    all_families,
    assert_same,
    base_tensors,
    batch,
    logits,
    outputs,
    same_bits,
    train,
)
from tests.tiny_models import HIDDEN, tiny_model
from tests.trainers import build

WIDTH, INNER = 6, 9


def adapted(family: str = CLIP, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    return get_peft_model(tiny_model(family).to(dtype), RAdapterConfig(**options))


def layers(model: nn.Module) -> dict[str, RAdapterLayer]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, RAdapterLayer)}
    return {name.removeprefix("base_model.model."): layer for name, layer in found.items()}


def linear(bias: bool = True, **options: Any) -> tuple[PeftModel, RAdapterLayer]:
    """One Linear in float64 with an adapter of random F, σ and averages."""
    model = nn.Sequential(nn.Linear(INNER, WIDTH, bias=bias)).double()
    wrapped = get_peft_model(model, RAdapterConfig(target_modules=["0"], **options))
    fill(wrapped)
    return wrapped, wrapped.base_model.model[0]


def fill(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (t for n, t in model.state_dict().items() if "radapter_" in n and t.is_floating_point()):
            tensor.copy_(torch.randn_like(tensor))


def by_hand(layer: RAdapterLayer, average: bool, name: str = "default") -> Tensor:
    """σ F as one dense matrix."""
    prefix = "radapter_average_" if average else "radapter_"
    matrix = getattr(layer, f"{prefix}weight")[name]
    downs = getattr(layer, f"{prefix}down")
    matrix = matrix @ downs[name] if name in downs else matrix
    return (getattr(layer, f"{prefix}scale")[name] * matrix).detach()


# --- what is trained ---


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 20_447_280),  # the paper's 20.5 M
        ({"towers": "vision"}, 12 * 2 * (768**2 + 1)),
        ({"r": 4}, 12 * 2 * (2 * 4 * (768 + 512) + 2)),
        ({"r": 512}, 12 * 2 * (2 * 512 * 768 + 512**2 + 2)),  # full rank in the text tower
    ],
)
def test_number_of_parameters_of_vit_b_16(options: dict, count: int) -> None:
    with torch.device("meta"):
        config = CLIPConfig(vision_config={"patch_size": 16})  # the rest is its default
        model = get_peft_model(CLIPModel(config), RAdapterConfig(**options))
    assert model.get_nb_trainable_parameters()[0] == count


@all_families
def test_behind_attention_and_mlp_of_every_block_and_nowhere_else(family: str) -> None:
    found = layers(adapted(family))
    assert len(found) == 2 * 2 * 2  # towers, blocks
    for name, layer in found.items():
        assert any(part.isdigit() for part in name.split(".")), name  # not SigLIP's pooling head
        is_mlp = name.split(".")[-2] in ("mlp", "output") and ".attention." not in name
        assert (layer.in_features, layer.out_features) == (48 if is_mlp else HIDDEN, HIDDEN), name
    assert sum(layer.in_features == 48 for layer in found.values()) == 4


def test_low_rank_begins_with_its_own_draws() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (layers(adapted(r=2, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    downs = [layer.radapter_down["default"] for layer in first.values()]
    assert len({tuple(down.flatten().tolist()) for down in downs}) == len(downs) == 8
    assert all(same_bits(a.radapter_down["default"], first[n].radapter_down["default"]) for n, a in again.items())
    assert not any(
        torch.equal(a.radapter_down["default"], first[n].radapter_down["default"]) for n, a in other.items()
    )
    assert all(down.abs().max() <= (6 / (HIDDEN + 2)) ** 0.5 for down in downs)  # Xavier's bound
    assert not any(layer.radapter_weight["default"].any() for layer in first.values())


# --- the forward ---


@pytest.mark.parametrize("r", [None, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_are_the_formula(r: int | None, bias: bool) -> None:
    model, layer = linear(bias, r=r, drop_path=0.0)
    x = torch.randn(3, 4, INNER, dtype=torch.float64)
    y = F.linear(x, layer.base_layer.weight, layer.base_layer.bias).detach()
    trained = [p for p in model.parameters() if p.requires_grad]
    found = model.train()(x)
    torch.testing.assert_close(found, y + y @ by_hand(layer, average=False).T, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(found.square().sum(), trained)
    weight, down, scale = (getattr(layer, f"radapter_{n}") for n in ("weight", "down", "scale"))
    factors = weight["default"] @ down["default"] if r else weight["default"]
    slow = torch.autograd.grad((y + scale["default"] * (y @ factors.T)).square().sum(), trained)
    for one, other in zip(gradients, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), y + y @ by_hand(layer, average=True).T, rtol=1e-12, atol=1e-12)


@all_families
@pytest.mark.parametrize("r", [None, 3])
def test_evaluation_is_by_the_averages_merged(family: str, r: int | None) -> None:
    """The oracle is the base with (I + σ F) W and (I + σ F) b written into it, in float64."""
    model, plain = adapted(family, r=r).eval(), tiny_model(family).double()
    fill(model)
    with torch.no_grad():
        for name, layer in layers(model).items():
            module = plain.get_submodule(name)
            factor = torch.eye(layer.out_features, dtype=torch.float64) + by_hand(layer.double(), average=True)
            for parameter in module.parameters():
                parameter.copy_(factor @ parameter)
    found, exact = outputs(model.float(), family), outputs(plain, family)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
    assert same_bits(outputs(model.merge_and_unload(), family), found)


def test_evaluation_in_autocast_is_that_of_the_merged_model() -> None:
    model = adapted().eval()
    fill(model)
    found = []
    for one in (model, copy.deepcopy(model).merge_and_unload()):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(outputs(one))
    assert same_bits(*found)


@pytest.mark.parametrize("r", [None, 4])
def test_cost_is_one_more_product_of_the_tokens(r: int | None) -> None:
    counts = []
    for model in (tiny_model(CLIP), adapted(r=r, drop_path=0.0), adapted(r=r).merge_and_unload()):
        with FlopCounterMode(display=False) as counter:
            logits(model.train(), batch(CLIP))
        counts.append(counter.get_total_flops())
    images, prompts = batch(CLIP)["pixel_values"], batch(CLIP)["input_ids"]
    tokens = len(images) * 5 + prompts.numel()
    per_token = 2 * HIDDEN * (2 * r if r else HIDDEN)
    assert counts[1] - counts[0] == tokens * 4 * per_token and counts[2] == counts[0]


def test_negative_zeros_stay_where_nothing_changes() -> None:
    model, layer = linear()
    with torch.no_grad():
        layer.base_layer.bias.fill_(-0.0)
        layer.radapter_average_weight["default"][1:].zero_()
    expected = layer.base_layer.weight.clone()
    model.merge_adapter()
    assert same_bits(layer.base_layer.weight[1:], expected[1:])
    assert not torch.equal(layer.base_layer.weight[0], expected[0])
    assert layer.base_layer.bias.signbit().all()


# --- dropping ---


@pytest.mark.parametrize(("unit", "kept_apart"), [("sample", (0,)), ("token", (1,))])
def test_dropped_units_are_the_base_and_the_mean_is_kept(unit: Any, kept_apart: tuple[int]) -> None:
    model, layer = linear(drop_path=0.4, drop_unit=unit)
    x = torch.randn(1, 1, INNER, dtype=torch.float64).expand(40, 50, INNER)
    y = F.linear(x, layer.base_layer.weight, layer.base_layer.bias).detach()
    full = y[0, 0] @ by_hand(layer, average=False).T / 0.6
    kept = []
    for _ in range(50):
        change = (model.train()(x) - y).detach()
        is_kept = change.abs().amax(dim=-1) > 0
        torch.testing.assert_close(change[is_kept], full.expand_as(change[is_kept]), rtol=1e-11, atol=1e-11)
        along = is_kept.movedim(kept_apart[0], 0).flatten(1)
        assert (along == along[:, :1]).all()  # the whole unit, or nothing of it
        kept.append(along[:, 0].double().mean())
    assert torch.stack(kept).mean() == pytest.approx(0.6, abs=0.03)
    assert len({value.item() for value in kept}) > 5
    assert torch.equal(model.eval()(x), model(x))  # no dropping in evaluation


def test_all_may_be_dropped() -> None:
    model, layer = linear(drop_path=0.999)
    x = torch.randn(2, INNER, dtype=torch.float64)
    found = model.train()(x)
    found.sum().backward()
    assert torch.equal(found, layer.base_layer(x))
    assert not layer.radapter_weight["default"].grad.any()


def test_dropping_draws_as_dropout_does() -> None:
    model = adapted(drop_path=0.5).train()
    fill(model)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(logits(model, batch(CLIP)).detach())
    assert same_bits(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_a_new_adapter_is_in_the_mode_of_its_base() -> None:
    model = get_peft_model(tiny_model(CLIP).eval(), RAdapterConfig())
    assert not any(layer.training for layer in layers(model).values())


# --- several adapters ---


def test_several_adapters_add() -> None:
    model, layer = linear(drop_path=0.0)
    model.add_adapter("second", RAdapterConfig(target_modules=["0"], r=2, drop_path=0.0))
    fill(model)
    model.base_model.set_adapter(["default", "second"])
    x = torch.randn(3, INNER, dtype=torch.float64)
    y = F.linear(x, layer.base_layer.weight, layer.base_layer.bias).detach()
    for average in (True, False):
        both = by_hand(layer, average) + by_hand(layer, average, "second")
        found = model.train(not average)(x)
        torch.testing.assert_close(found, y + y @ both.T, rtol=1e-11, atol=1e-11)
    expected = model.eval()(x)
    model.merge_adapter(["second"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that another is merged already
        model.merge_adapter(["default"])
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)


def test_one_tower_leaves_the_other_alone() -> None:
    model = adapted(towers="vision", average_decay=0.5)
    train(model, batch(CLIP))
    texts = {name: batch(CLIP)[name] for name in ("input_ids", "attention_mask")}
    assert same_bits(text_embeds(model, **texts), text_embeds(tiny_model(CLIP), **texts))
    assert not same_bits(outputs(model), outputs(tiny_model(CLIP)))
    assert_same(base_tensors(model), tiny_model(CLIP).state_dict())


def test_wise_ft_refuses_a_frozen_head_that_would_not_follow(tmp_path: Path) -> None:
    trained = build(tmp_path, "radapter", head="frozen", max_steps=1)
    trained.train()  # the frozen head leaves the text tower alone
    wise_ft(trained.model, 0.5)
    fill(trained.model.model.base_model.model.text_model)
    with pytest.raises(ConfigError, match="frozen head would not follow"):
        wise_ft(trained.model, 0.5)


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r is out of range: got 0; allowed whole numbers from 1"),
        ({"r": True}, "r is out of range"),
        ({"seed": None}, "seed is out of range"),
        ({"scale": 0.0}, "scale is out of range: got 0.0; allowed numbers above 0"),
        ({"scale": float("nan")}, "scale is out of range"),
        ({"drop_path": 1.0}, r"drop_path is out of range: got 1.0; allowed \[0, 1\)"),
        ({"average_decay": 1}, "average_decay is out of range.*or None"),
        ({"drop_unit": "head"}, "unknown drop_unit.*'head'.*sample, token"),
        ({"towers": "image"}, "unknown towers"),
    ],
)
def test_settings_are_checked(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RAdapterConfig(**options)
