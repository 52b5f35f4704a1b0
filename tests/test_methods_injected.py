# SPDX-License-Identifier: Apache-2.0
"""Adapters in a model without PEFT's wrapper, names that are taken, and adapters that wait, for every method."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_robust import (
    ACLIPConfig,
    SAFTConfig,
    export_shira,
    mask_summary,
    saft_unselected,
    select_saft,
    wise_ft,
)
from hf_robust.errors import ConfigError, SelectionError

from .methods import (
    CLIP,
    Method,
    adapter_tensors,
    assert_same,
    base_tensors,
    batch,
    loss_fn,
    outputs,
    prepared,
    same_bits,
    train,
    trained,
)
from .test_methods import through_pickle
from .tiny_models import tiny_model

# What PEFT says of every second adapter without its wrapper, and of every layer that loses its active adapter
pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning"),
]


def by_transformers(config: PeftConfig) -> nn.Module:
    model = tiny_model(CLIP)
    model.add_adapter(config)
    return model


def by_injection(config: PeftConfig) -> nn.Module:
    return inject_adapter_in_model(config, tiny_model(CLIP))


def select(model: nn.Module, name: str = "default", seed: int = 0) -> None:
    assert saft_unselected(model, name) == isinstance(model.peft_config[name], SAFTConfig)
    if saft_unselected(model, name):
        with pytest.raises(SelectionError, match="select_saft"):
            mask_summary(model, name)
        select_saft(model, [batch(CLIP, seed), batch(CLIP, seed + 10)], loss_fn, adapter_name=name)
        assert mask_summary(model, name).selected > 0


# --- a model that carries the layers ---


@pytest.mark.parametrize("make", [by_transformers, by_injection])
def test_an_injected_adapter_is_that_of_get_peft_model(method: Method, make: Callable, tmp_path: Path) -> None:
    base = outputs(tiny_model(CLIP))
    model = make(method.config())
    select(model)
    train(model, batch(CLIP))
    expected = outputs(model)
    assert same_bits(expected, outputs(trained(method)))
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.enable_adapters(False)
    assert same_bits(outputs(model), base)
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.enable_adapters(True)
    wise_ft(model, 0.0)
    assert same_bits(outputs(model), base)
    wise_ft(model, 1.0)
    assert same_bits(outputs(model), expected)
    twin = copy.deepcopy(model)
    assert same_bits(outputs(twin), expected)


def test_two_adapters_by_transformers(method: Method, tmp_path: Path) -> None:
    base = outputs(tiny_model(CLIP))
    model = by_transformers(method.config())
    found = {}
    for seed, name in enumerate(("default", "second")):
        if seed:
            model.add_adapter(method.config(), "second")
            assert model.active_adapters() == ["second"]
        select(model, name, seed)
        train(model, batch(CLIP, seed))
        found[name] = outputs(model)
        model.save_pretrained(tmp_path / name)
    assert not torch.allclose(found["default"], found["second"], atol=1e-2)
    for name in ("default", "second", "default"):
        model.set_adapter(name)
        assert same_bits(outputs(model), found[name])
        assert same_bits(outputs(PeftModel.from_pretrained(tiny_model(CLIP), tmp_path / name)), found[name])
    model.disable_adapters()
    assert same_bits(outputs(model), base)
    model.enable_adapters()
    assert same_bits(outputs(model), found["default"])
    loaded = tiny_model(CLIP)
    for name in found:
        loaded.load_adapter(str(tmp_path / name), name)
    for name, expected in found.items():
        loaded.set_adapter(name)
        assert same_bits(outputs(loaded.eval()), expected)
    loaded.delete_adapter("second")
    loaded.set_adapter("default")
    assert same_bits(outputs(loaded), found["default"])


def test_an_injected_adapter_can_be_exported(tmp_path: Path) -> None:
    model = tiny_model(CLIP)
    model.add_adapter(SAFTConfig(density=0.02, target_modules=["fc1", "fc2"], exclude_modules=["bias"]))
    select(model)
    train(model, batch(CLIP))
    export_shira(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(CLIP), tmp_path).eval()
    torch.testing.assert_close(outputs(loaded), outputs(model), rtol=1e-4, atol=1e-4)


# --- names in the state dict ---


def test_a_reloaded_model_has_the_names_of_a_new_one(method: Method, tmp_path: Path) -> None:
    model = trained(method)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    expected, prefix = list(model.state_dict()), "base_model.model."
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(tiny_model(CLIP), tmp_path, low_cpu_mem_usage=low_memory)
        assert list(loaded.state_dict()) == expected
        second = prepared(method, tiny_model(CLIP), CLIP)
        second.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_memory)
        second.delete_adapter("default")
        assert [name.replace(".second", ".default") for name in second.state_dict()] == expected
    plain = tiny_model(CLIP)
    plain.load_adapter(str(tmp_path))
    assert [prefix + name for name in plain.state_dict()] == expected


# --- refusals leave nothing behind ---


def test_a_refused_adapter_leaves_no_name(method: Method) -> None:
    wrong, right = replace(method.config(), target_modules=["nope"]), method.config()
    model = tiny_model(CLIP)
    with pytest.raises(ConfigError, match="matches no module"):
        model.add_adapter(wrong)
    model.add_adapter(right)
    with pytest.raises(ConfigError, match="matches no module"):
        model.add_adapter(wrong, "second")
    assert list(model.peft_config) == ["default"] and model.active_adapters() == ["default"]
    model.add_adapter(right, "second")
    wrapped = get_peft_model(tiny_model(CLIP), method.config())
    with pytest.raises(ConfigError, match="matches no module"):
        wrapped.add_adapter("second", wrong)
    assert list(wrapped.peft_config) == ["default"]
    wrapped.add_adapter("second", method.config())


def test_a_name_that_is_taken_is_refused(method: Method) -> None:
    model = by_injection(method.config())
    select(model)
    train(model, batch(CLIP))
    expected, config = outputs(model), model.peft_config["default"]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match="has an adapter of this name: got 'default'. Choose another"):
        inject_adapter_in_model(replace(method.config(), towers="vision"), model)
    assert model.peft_config == {"default": config} and model.peft_config["default"] is config
    assert_same(dict(model.state_dict()), state)
    assert same_bits(outputs(model), expected)


@pytest.mark.parametrize("first", [SAFTConfig(), ACLIPConfig(), LoraConfig(target_modules=["q_proj"])], ids=repr)
def test_two_methods_in_one_model_are_refused(method: Method, first: PeftConfig) -> None:
    if type(first) is type(method.config()):
        return
    model = by_transformers(copy.deepcopy(first))
    modules = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ConfigError, match="adapter of another method.*model of its own"):
        model.add_adapter(method.config(), "second")
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert list(model.peft_config) == ["default"]


# --- deleting, and adding again ---


@pytest.mark.parametrize("alone", [True, False])
def test_a_deleted_adapters_name_is_free(method: Method, alone: bool, tmp_path: Path) -> None:
    model = trained(method)
    expected = outputs(model)
    if not alone:
        model.add_adapter("other", method.config())
    model.delete_adapter("default")
    assert same_bits(outputs(model.base_model.model), outputs(tiny_model(CLIP)))
    model.add_adapter("default", method.config())
    model.set_adapter("default")
    select(model)
    assert same_bits(outputs(model), outputs(tiny_model(CLIP)))
    train(model, batch(CLIP))
    assert same_bits(outputs(model), expected)
    model.save_pretrained(tmp_path, save_embedding_layers=False, selected_adapters=["default"])
    assert same_bits(outputs(PeftModel.from_pretrained(tiny_model(CLIP), tmp_path)), expected)


# --- adapters that wait for their entries, or their file ---


@pytest.fixture(scope="module")
def saved(method: Method, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    folder, model = tmp_path_factory.mktemp("saved"), trained(method)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder, outputs(model)


def waiting(folder: Path) -> PeftModel:
    """As PEFT makes it before it loads the tensors."""
    return PeftModel(tiny_model(CLIP), PeftConfig.from_pretrained(folder))


def same(model: nn.Module) -> nn.Module:
    return model


def halved_and_back(model: nn.Module) -> nn.Module:
    return model.half().float()


@pytest.mark.parametrize("clone", [same, copy.deepcopy, through_pickle])
def test_copies_of_waiting_adapters(method: Method, saved: tuple[Path, Tensor], clone: Callable) -> None:
    folder, expected = saved
    model = waiting(folder)
    twin = clone(model)
    for one in (twin, model):
        set_peft_model_state_dict(one, load_file(folder / "adapter_model.safetensors"))
        assert same_bits(outputs(one.eval()), expected)
    new = get_peft_model(tiny_model(CLIP), method.config())
    twin = clone(new)
    for one in (twin, new):
        if one is not new or twin is not new:
            assert saft_unselected(one) == isinstance(new.peft_config["default"], SAFTConfig)
        if saft_unselected(one):
            select_saft(one, [batch(CLIP), batch(CLIP, 10)], loss_fn)
    train(twin, batch(CLIP))
    assert same_bits(outputs(twin), expected)
    assert twin is new or same_bits(outputs(new.eval()), outputs(tiny_model(CLIP)))


def test_waiting_adapters_change_their_format(method: Method, saved: tuple[Path, Tensor]) -> None:
    folder, _ = saved
    model = waiting(folder)
    model.to(torch.bfloat16)
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    expected = PeftModel.from_pretrained(tiny_model(CLIP).to(torch.bfloat16), folder)
    assert same_bits(outputs(model.eval()), outputs(expected))
    new = get_peft_model(tiny_model(CLIP), method.config()).half()
    if saft_unselected(new):
        select_saft(new.float(), [batch(CLIP)], loss_fn)
        new.half()
    assert {p.dtype for p in new.parameters() if p.requires_grad} == {torch.float32}
    assert same_bits(outputs(new.eval()), outputs(tiny_model(CLIP).half()))


def test_waiting_adapters_go_to_the_meta_device(method: Method, saved: tuple[Path, Tensor]) -> None:
    for model in (waiting(saved[0]), get_peft_model(tiny_model(CLIP), method.config()), trained(method)):
        model.to("meta")
        model.eval()
        model.train()
        assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("low_memory", [False, True])
def test_loading_over_an_adapter_keeps_its_parameters(
    method: Method, saved: tuple[Path, Tensor], low_memory: bool
) -> None:
    folder, expected = saved
    model: Any = PeftModel.from_pretrained(tiny_model(CLIP), folder, is_trainable=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    train(model, batch(CLIP, seed=1))
    assert not same_bits(outputs(model), expected)
    model.load_adapter(folder, "default", is_trainable=True, low_cpu_mem_usage=low_memory)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert same_bits(outputs(model.eval()), expected)
    loss_fn(model.train(), batch(CLIP)).backward()
    optimizer.step()
    assert not same_bits(outputs(model.eval()), expected)
    assert_same(base_tensors(model), tiny_model(CLIP).state_dict())
    assert adapter_tensors(model)
