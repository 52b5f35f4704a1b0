# SPDX-License-Identifier: Apache-2.0
"""Configs that are used again, and which modules they take, for every method."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hf_robust import SAFTConfig, saft_unselected, select_saft
from hf_robust.errors import ConfigError, NonFiniteError

from .methods import (
    CLIP,
    Method,
    adapter_tensors,
    assert_same,
    base_tensors,
    batch,
    loss_fn,
    outputs,
    same_bits,
    spoil,
    train,
    trained,
)
from .tiny_models import tiny_model


def with_settings(method: Method, **settings: Any) -> PeftConfig:
    return replace(method.config(), **settings)


def select(model: nn.Module, name: str = "default", seed: int = 0) -> None:
    if saft_unselected(model, name):
        select_saft(model, [batch(CLIP, seed)], loss_fn, adapter_name=name)


def train_new(model: PeftModel, seed: int = 0) -> Tensor:
    """Trains what must be a new adapter."""
    base = base_tensors(model)
    assert saft_unselected(model) == isinstance(model.peft_config["default"], SAFTConfig)
    assert same_bits(outputs(model.eval()), outputs(model.get_base_model().eval()))
    select(model, seed=seed)
    before = outputs(model)
    train(model, batch(CLIP, seed))
    found = outputs(model)
    assert not torch.allclose(found, before, atol=1e-2)
    assert_same(base_tensors(model), base)
    return found


# --- a config is used again ---


def test_one_config_serves_several_adapters_and_is_not_changed(method: Method, tmp_path: Path) -> None:
    config = with_settings(method, target_modules=["fc1", "q_proj"], exclude_modules=["text_model"])
    if isinstance(config, SAFTConfig):
        config.density = 0.1
    expected = copy.deepcopy(config.__dict__)
    alone = [train_new(get_peft_model(tiny_model(CLIP), copy.deepcopy(config)), seed) for seed in (0, 1)]
    for seed in (0, 1):
        model = get_peft_model(tiny_model(CLIP), config)
        assert same_bits(train_new(model, seed), alone[seed])
        model.save_pretrained(tmp_path / f"{seed}", save_embedding_layers=False)
        assert same_bits(outputs(PeftModel.from_pretrained(tiny_model(CLIP), tmp_path / f"{seed}")), alone[seed])
    model.add_adapter("b", config)
    assert saft_unselected(model, "b") == isinstance(config, SAFTConfig)
    select(model, "b")
    model.set_adapter("b")
    train(model, batch(CLIP))
    assert same_bits(outputs(model), alone[0])
    model.save_pretrained(tmp_path / "two", save_embedding_layers=False)
    model.merge_and_unload()
    assert {**config.__dict__, "inference_mode": False} == expected  # which PEFT sets while it saves


@pytest.fixture(scope="module")
def saved(method: Method, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    trained(method).save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.parametrize("base_seed", [0, 1], ids=["same base", "other base"])
@pytest.mark.parametrize("by_peft", [True, False])
def test_a_config_from_a_file_makes_a_new_adapter(
    method: Method, saved: Path, tmp_path: Path, base_seed: int, by_peft: bool
) -> None:
    kind: Any = PeftConfig if by_peft else type(method.config())
    config = kind.from_pretrained(str(saved))
    config.inference_mode = False
    assert type(config) is type(method.config()) and config.saved is not None
    expected = copy.deepcopy(config.__dict__)
    found = train_new(get_peft_model(tiny_model(CLIP, seed=base_seed), config))
    assert same_bits(found, train_new(get_peft_model(tiny_model(CLIP, seed=base_seed), method.config())))
    model = get_peft_model(tiny_model(CLIP, seed=base_seed), config)
    train_new(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert same_bits(outputs(PeftModel.from_pretrained(tiny_model(CLIP, seed=base_seed), tmp_path)), found)
    assert {**config.__dict__, "inference_mode": False} == expected


def test_a_config_from_a_file_makes_a_second_adapter(method: Method, saved: Path) -> None:
    model = PeftModel.from_pretrained(tiny_model(CLIP), saved)
    expected = outputs(model)
    config = PeftConfig.from_pretrained(str(saved))
    config.inference_mode = False
    model.add_adapter("b", config)
    select(model, "b", seed=1)
    model.set_adapter("b")
    assert same_bits(outputs(model), outputs(tiny_model(CLIP)))
    train(model, batch(CLIP, seed=1))
    model.set_adapter("default")
    assert same_bits(outputs(model), expected)


# --- modules_to_save ---


def test_two_adapters_with_the_same_modules_to_save(method: Method, tmp_path: Path) -> None:
    config = with_settings(method, modules_to_save=["visual_projection"])
    model = get_peft_model(tiny_model(CLIP), config)
    model.add_adapter("second", config)
    found = {}
    for seed, name in enumerate(("default", "second")):
        select(model, name, seed)
        model.set_adapter(name)
        train(model, batch(CLIP, seed))
        found[name] = outputs(model)
    assert not torch.allclose(found["default"], found["second"], atol=1e-2)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    for name, folder in (("default", tmp_path), ("second", tmp_path / "second")):
        model.set_adapter(name)
        assert same_bits(outputs(model), found[name])
        assert same_bits(outputs(PeftModel.from_pretrained(tiny_model(CLIP), folder)), found[name])
    with model.disable_adapter():
        assert same_bits(outputs(model), outputs(tiny_model(CLIP)))


def test_modules_to_save_that_are_not_there_or_hold_an_adapter(method: Method) -> None:
    for wanted in (["nope"], ["visual_projection", "visual_projektion"]):
        model = tiny_model(CLIP)
        with pytest.raises(ConfigError, match=r"modules_to_save matches no module: got '(nope|visual_projektion)'"):
            get_peft_model(model, with_settings(method, modules_to_save=wanted))
        assert [type(m) for m in model.modules()] == [type(m) for m in tiny_model(CLIP).modules()]
    model = get_peft_model(tiny_model(CLIP), method.config())
    modules = [(name, type(module)) for name, module in model.named_modules()]
    for wanted in ("self_attn", "text_model"):
        with pytest.raises(ConfigError, match="modules_to_save names what holds another adapter: got 'text_model"):
            model.add_adapter("second", with_settings(method, modules_to_save=[wanted]))
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert list(model.peft_config) == ["default"]


def classifier() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, vocab_size=20)).eval()


def test_task_type_of_a_classifier(method: Method, tmp_path: Path) -> None:
    """PEFT adds `classifier` and `score`, of which this model has the first."""
    config = with_settings(method, task_type="SEQ_CLS", target_modules=["query", "value"])
    if isinstance(config, SAFTConfig):
        config.score = "random"
    model = get_peft_model(classifier(), config)
    select_saft(model) if saft_unselected(model) else None
    inputs = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]), "labels": torch.tensor([1, 1])}
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.train()(**inputs).loss.backward()
    optimizer.step()
    moved = [name for name, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[name])]
    expected = [name for name in before if not any(kind in name for kind in method.no_first_gradient)]
    assert "base_model.model.classifier.modules_to_save.default.weight" in moved and moved == expected
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(classifier(), tmp_path).eval()
        assert same_bits(loaded(**inputs).logits, expected)
        assert not torch.allclose(classifier()(**inputs).logits, expected, atol=1e-3)


# --- numbered layers, as LoRA takes them ---


def chosen(config: PeftConfig) -> set[str]:
    model: Any = get_peft_model(tiny_model(CLIP), config)
    return {name for name, module in model.base_model.model.named_modules() if isinstance(module, BaseTunerLayer)}


@pytest.mark.parametrize("targets", [["q_proj"], ["fc1", "k_proj", "v_proj"]])
@pytest.mark.parametrize(
    "layers",
    [
        {"layers_to_transform": 1},
        {"layers_to_transform": [1]},
        {"layers_to_transform": [0, 1]},
        {"layers_to_transform": []},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"layers_to_transform": [1], "layers_pattern": ["h", "encoder.layers"]},
        {"layers_to_transform": 1, "layers_pattern": "vision_model.encoder.layers"},
    ],
)
def test_layers_are_chosen_as_lora_does(method: Method, targets: list[str], layers: dict) -> None:
    settings = {"target_modules": targets, **layers}
    assert chosen(with_settings(method, **settings)) == chosen(LoraConfig(**settings))


def test_layers_of_one_tower(method: Method) -> None:
    both, vision = (chosen(with_settings(method, layers_to_transform=[1], towers=t)) for t in ("both", "vision"))
    assert vision == {name for name in both if name.startswith("vision_model.")} and len(both) == 2 * len(vision)
    assert all(".layers.1." in name for name in both)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"layers_to_transform": [0, 2]}, r"layers_to_transform matches no module: got \[2\]; allowed 0, 1"),
        ({"layers_to_transform": 9}, r"got \[9\]; allowed 0, 1"),
        ({"layers_to_transform": 0, "layers_pattern": "h"}, r"got \[0\]; allowed nothing"),
        ({"layers_to_transform": 0, "layers_pattern": "ayers"}, r"got \[0\]; allowed nothing"),
    ],
)
def test_a_layer_that_is_not_there_is_an_error(method: Method, layers: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_peft_model(tiny_model(CLIP), with_settings(method, **layers))


def test_a_layer_of_the_other_tower_is_not_meant(method: Method) -> None:
    model = tiny_model(CLIP)
    model.vision_model.encoder.layers = model.vision_model.encoder.layers[:1]
    get_peft_model(copy.deepcopy(model), with_settings(method, layers_to_transform=[0, 1]))
    with pytest.raises(ConfigError, match=r"got \[1\]; allowed 0"):
        get_peft_model(model, with_settings(method, layers_to_transform=[0, 1], towers="vision"))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"layers_to_transform": -1}, "no list of layers: got -1; allowed numbers from 0 on"),
        ({"layers_to_transform": [0, True]}, "no list of layers"),
        ({"layers_to_transform": "1"}, "no list of layers: got '1'"),
        ({"layers_pattern": "layers"}, "layers_to_transform, which is not given"),
        ({"layers_to_transform": [1], "layers_pattern": [1]}, "layers_pattern is no list of names"),
    ],
)
def test_wrong_settings_of_layers(method: Method, layers: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_settings(method, **layers)


def test_layers_of_a_saved_adapter(method: Method, tmp_path: Path) -> None:
    settings = {"layers_to_transform": [1], "layers_pattern": ["encoder.layers"]}
    model = trained(method, **settings)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(tiny_model(CLIP), tmp_path)
    config = loaded.peft_config["default"]
    assert {name: getattr(config, name) for name in settings} == settings
    assert same_bits(outputs(loaded), outputs(model))
    assert_same(adapter_tensors(loaded), adapter_tensors(model))
    assert all(".layers.1." in name for name in adapter_tensors(model))


# --- quantised bases ---


class Int8Params(nn.Parameter):
    """Stands for a parameter of bitsandbytes."""


class Quantized(Tensor):
    """Stands for a tensor of torchao."""


def as_parameter_class(model: nn.Module, layer: nn.Linear) -> None:
    layer.weight = Int8Params(layer.weight.data, requires_grad=False)


def as_tensor_class(model: nn.Module, layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Quantized), requires_grad=False)


def as_float8(model: nn.Module, layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)


def as_int8(model: nn.Module, layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)


def as_noted(model: nn.Module, layer: nn.Linear) -> None:
    model.quantization_method = "bitsandbytes"


def as_noted_in_a_tower(model: nn.Module, layer: nn.Linear) -> None:
    model.vision_model.quantization_method = "bitsandbytes"


@pytest.mark.parametrize(
    "quantize", [as_parameter_class, as_tensor_class, as_float8, as_int8, as_noted, as_noted_in_a_tower]
)
def test_quantised_bases_are_refused_and_left_alone(method: Method, quantize: Any) -> None:
    model = tiny_model(CLIP)
    attention = model.vision_model.encoder.layers[1].self_attn
    for layer in (attention.q_proj, attention.out_proj):  # of which every method trains one
        quantize(model, layer)
    before = [(name, type(module)) for name, module in model.named_modules()]
    required = [parameter.requires_grad for parameter in model.parameters()]
    got = "(Int8Params|Quantized|Parameter of torch.(float8_e4m3fn|int8)|bitsandbytes)"
    with pytest.raises(ConfigError, match=f"quantised weights cannot be trained.*got '{got}.*Load the model unquant"):
        get_peft_model(model, method.config())
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert [parameter.requires_grad for parameter in model.parameters()] == required
    assert "peft_config" not in vars(model)
    if quantize is not as_noted:  # the other tower is as it should be
        get_peft_model(model, with_settings(method, towers="text"))


# --- safe merging ---


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_errors_of_safe_merging_are_value_errors(method: Method, merge: str) -> None:
    model = trained(method)
    spoil(model, torch.inf)
    with pytest.raises(ValueError, match="NaN or infinity into the base") as error:
        getattr(model, merge)(safe_merge=True)
    assert type(error.value) is NonFiniteError
    assert model.get_model_status().merged_adapters == []


def test_layers_tell_their_sizes(method: Method) -> None:
    model = get_peft_model(tiny_model(CLIP), method.config())
    layer = model.base_model.model.vision_model.encoder.layers[0].self_attn.q_proj
    linear = tiny_model(CLIP).vision_model.encoder.layers[0].self_attn.q_proj
    assert (layer.in_features, layer.out_features) == (linear.in_features, linear.out_features)
