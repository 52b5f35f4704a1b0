# SPDX-License-Identifier: Apache-2.0
"""Saving and loading an adapter, alone or in a state dict, for every method."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModel, PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from .methods import (
    METHODS,
    Method,
    adapter_tensors,
    add,
    all_families,
    assert_same,
    base_names,
    base_tensors,
    batch,
    loss_fn,
    merged_tensors,
    outputs,
    prefix_of,
    prepared,
    same_bits,
    shown_tensors,
    train,
    trained,
)
from .tiny_models import FAMILIES, tiny_model


@pytest.fixture
def saft() -> Method:
    return next(method for method in METHODS if method.name == "SAFT")


# --- saving and loading ---


@dataclass(frozen=True)
class Saved:
    family: str
    base: Path
    adapter: Path
    config: PeftConfig
    prefix: str
    logits: Tensor
    base_logits: Tensor


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, method: Method, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    family, folder = request.param, tmp_path_factory.mktemp("saved")
    base = tiny_model(family)
    base.save_pretrained(folder / "base")
    base_logits = outputs(base, family)
    model = prepared(method, type(base).from_pretrained(folder / "base"), family)
    train(model, batch(family))
    model.save_pretrained(folder / "adapter")
    found = outputs(model, family)
    assert (found - base_logits).abs().max() > 1e-2
    config = model.peft_config["default"]
    return Saved(family, folder / "base", folder / "adapter", config, prefix_of(model), found, base_logits)


def fresh_base(saved: Saved) -> nn.Module:
    return type(tiny_model(saved.family)).from_pretrained(saved.base)


def by_peft(saved: Saved) -> nn.Module:
    return PeftModel.from_pretrained(fresh_base(saved), saved.adapter)


def by_peft_without_memory(saved: Saved) -> nn.Module:
    return PeftModel.from_pretrained(fresh_base(saved), saved.adapter, low_cpu_mem_usage=True)


def by_auto_class(saved: Saved) -> nn.Module:
    return AutoPeftModel.from_pretrained(str(saved.adapter))


def as_second_adapter(saved: Saved) -> nn.Module:
    model = by_peft(saved)
    model.load_adapter(str(saved.adapter), "second")
    model.set_adapter("second", inference_mode=True)
    model.delete_adapter("default")
    return model


def as_second_adapter_without_memory(saved: Saved) -> nn.Module:
    model = by_peft(saved)
    model.load_adapter(str(saved.adapter), "second", low_cpu_mem_usage=True)
    model.set_adapter("second", inference_mode=True)
    return model


def by_transformers(saved: Saved) -> nn.Module:
    model = fresh_base(saved)
    model.load_adapter(str(saved.adapter))
    return model


@pytest.mark.parametrize(
    "load",
    [
        by_peft,
        by_peft_without_memory,
        by_auto_class,
        as_second_adapter,
        as_second_adapter_without_memory,
        by_transformers,
    ],
)
def test_reloaded_adapter_gives_the_same_logits(saved: Saved, load: Callable[[Saved], nn.Module]) -> None:
    torch.manual_seed(123)
    model = load(saved).eval()
    assert same_bits(outputs(model, saved.family), saved.logits)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_transformers_can_disable_a_loaded_adapter(saved: Saved) -> None:
    model = by_transformers(saved).eval()
    model.disable_adapters()
    assert same_bits(outputs(model, saved.family), saved.base_logits)
    model.enable_adapters()
    assert same_bits(outputs(model, saved.family), saved.logits)


def test_training_goes_on_after_loading(saved: Saved) -> None:
    model = PeftModel.from_pretrained(fresh_base(saved), saved.adapter, is_trainable=True)
    before = loss_fn(model.eval(), batch(saved.family))
    train(model, batch(saved.family))
    assert loss_fn(model, batch(saved.family)) < before
    with model.disable_adapter():
        assert same_bits(outputs(model, saved.family), saved.base_logits)


def test_saving_again_gives_the_same_bytes(saved: Saved, tmp_path: Path) -> None:
    model = by_peft(saved)
    model.save_pretrained(tmp_path / "again")
    with model.disable_adapter():
        model.save_pretrained(tmp_path / "disabled")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    for folder in ("again", "disabled", "merged"):
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / folder / file).read_bytes() == (saved.adapter / file).read_bytes(), (folder, file)


def test_files_hold_the_adapter_alone(saved: Saved) -> None:
    tensors = load_file(saved.adapter / "adapter_model.safetensors")
    assert len(tensors) > 1 and all(saved.prefix in name for name in tensors)
    written = json.loads((saved.adapter / "adapter_config.json").read_text())
    assert written["peft_type"] == saved.config.peft_type.value
    reloaded = PeftConfig.from_pretrained(saved.adapter)
    assert type(reloaded) is type(saved.config)
    peft_adds = {"inference_mode": True, "auto_mapping": written["auto_mapping"]}
    adapters_own = {name: written[name] for name in ("saved", "entry_counts") if name in written}
    assert reloaded == replace(saved.config, **peft_adds, **adapters_own)
    assert saved.config.saved is None


# --- the state dict ---


@all_families
def test_state_dict_goes_back_in(method: Method, family: str) -> None:
    model = trained(method, family)
    state, expected = copy.deepcopy(model.state_dict()), outputs(model, family)
    train(model, batch(family, seed=1))
    assert not torch.equal(outputs(model, family), expected)
    model.load_state_dict(state)
    assert same_bits(outputs(model, family), expected)
    assert_same(model.state_dict(), state)


@all_families
def test_loading_another_base_keeps_the_adapter(method: Method, family: str, tmp_path: Path) -> None:
    model, other = trained(method, family), tiny_model(family, seed=1)
    before, adapter = outputs(model, family), adapter_tensors(model)
    names = base_names(model)
    assert set(names) == set(other.state_dict())
    report = model.load_state_dict({names[name]: t for name, t in other.state_dict().items()}, strict=False)
    assert report.unexpected_keys == []
    assert_same(base_tensors(model), other.state_dict())
    assert_same(adapter_tensors(model), adapter)
    assert not torch.equal(outputs(model, family), before)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    expected = PeftModel.from_pretrained(tiny_model(family, seed=1), tmp_path)
    assert same_bits(outputs(model, family), outputs(expected, family))
    with model.disable_adapter():
        assert same_bits(outputs(model, family), outputs(other, family))


@all_families
def test_saft_shows_effective_weights_as_parameters(saft: Method, family: str) -> None:
    """The state dict holds the base's own numbers; `named_parameters` those the forward uses."""
    model, base = trained(saft, family), tiny_model(family)
    shown = shown_tensors(model)
    add(saft, model, family, "second")
    model.set_adapter("second")  # untrained; shown at once, before any forward
    assert_same(shown_tensors(model), {name: base.state_dict()[name] for name in shown})
    model.set_adapter("default")
    merged = merged_tensors(model, ["default"])
    assert_same(shown, {name: merged[name] for name in shown})
    assert any(not torch.equal(tensor, base.state_dict()[name]) for name, tensor in shown.items())
    base.load_state_dict(merged)
    assert same_bits(outputs(model, family), outputs(base, family))
    assert_same(base_tensors(model), tiny_model(family).state_dict())
