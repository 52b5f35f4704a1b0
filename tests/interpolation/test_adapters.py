# SPDX-License-Identifier: Apache-2.0
"""wise_ft against the official formula on dense weights, for every method."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor, nn

from hf_robust.interpolation.adapters import wise_ft
from tests.interpolation.tuned import LORA, METHODS, RSLORA, SAFT, own, tuned
from tests.methods import CLIP, Method, add, all_families, assert_same, batch, outputs, same_bits, train
from tests.tiny_models import tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),  # PEFT, of LN tuning
    pytest.mark.filterwarnings("ignore:.*tensor.s. have invalid shape"),  # PEFT, of saved biases of LoRA
]


@pytest.fixture(params=METHODS, ids=lambda method: method.name)
def wise_method(request) -> Method:
    return request.param


def dense(model: PeftModel) -> dict[str, Tensor]:
    """The weights of the plain model that the adapters make."""
    return copy.deepcopy(model).merge_and_unload().state_dict()


def at(model: nn.Module, alpha: float) -> dict[str, Tensor]:
    """The model's own state dict at α."""
    wise_ft(model, alpha)
    return own(model)


def check_oracle(model: PeftModel, family: str) -> None:
    """The model is in float64."""
    plain = tiny_model(family).double()
    theta0, theta1 = {name: tensor.clone() for name, tensor in plain.state_dict().items()}, dense(model)
    for alpha in (0.3, 0.5, 0.9):
        wise_ft(model, alpha)
        expected = {name: (1 - alpha) * theta0[name] + alpha * theta1[name] for name in theta0}
        found = dense(model)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor.to(found[name].dtype), rtol=1e-12, atol=1e-13)
        plain.load_state_dict(expected)
        torch.testing.assert_close(outputs(model, family), outputs(plain, family), rtol=1e-9, atol=1e-9)


def test_every_method_gives_the_official_formula(wise_method):
    check_oracle(tuned(wise_method, dtype=torch.float64), CLIP)


@all_families
@pytest.mark.parametrize("method", [SAFT, LORA], ids=lambda method: method.name)
def test_every_family_gives_the_official_formula(method, family):
    check_oracle(tuned(method, family, torch.float64), family)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_ends_are_the_two_models_bit_for_bit(wise_method, dtype):
    model = tuned(wise_method, dtype=dtype)
    base = tiny_model(CLIP).to(dtype)
    expected, fine_tuned = outputs(model), dense(model)
    wise_ft(model, 0)
    assert same_bits(outputs(model), outputs(base))
    if wise_method.name != "LoRA on inputs":  # PEFT merges B A of a Conv as a sum of products of zeros
        assert_same(dense(model), base.state_dict())
    wise_ft(model, 0.5)
    assert not torch.equal(outputs(model), outputs(base)) and not torch.equal(outputs(model), expected)
    wise_ft(model, 1)
    assert same_bits(outputs(model), expected)
    assert_same(dense(model), fine_tuned)


def test_float32_is_the_formula_to_its_last_bits(wise_method):
    model = tuned(wise_method)
    theta0, theta1 = tiny_model(CLIP).double().state_dict(), dense(model)
    wise_ft(model, 0.25)
    for name, tensor in dense(model).items():
        expected = 0.75 * theta0[name] + 0.25 * theta1[name].double()
        torch.testing.assert_close(tensor.double(), expected.double(), rtol=3e-7, atol=3e-7)


def test_saft_touches_only_its_entries():
    model = tuned(SAFT)
    base, fine_tuned = tiny_model(CLIP).state_dict(), dense(model)
    wise_ft(model, 0.5)
    shown = dict(model.named_parameters())
    for name, tensor in dense(model).items():
        assert torch.equal(tensor == base[name], fine_tuned[name] == base[name])
    name = "visual_projection"
    unit = model.get_base_model().visual_projection
    assert torch.equal(unit.base_layer.weight, dense(model)[f"{name}.weight"])  # shown without a forward
    assert any(parameter is unit.base_layer.weight for parameter in shown.values())


ALPHAS = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))


@pytest.fixture(scope="module", params=METHODS, ids=lambda method: method.name)
def shared(request) -> tuple[PeftModel, dict[str, Tensor]]:
    """A trained model that is set to many α, and its own tensors when fine-tuned."""
    model = tuned(request.param)
    return model, at(model, 1)


@given(alphas=st.lists(ALPHAS, min_size=1, max_size=3))
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_only_the_last_alpha_counts(shared, alphas):
    model, fine_tuned = shared
    expected = at(model, alphas[-1])
    wise_ft(model, 1)
    for alpha in alphas:
        wise_ft(model, alpha)
    assert_same(dict(model.state_dict()), expected)
    assert_same(at(model, 1), fine_tuned)


def test_the_saved_adapter_is_the_adapter_at_alpha(wise_method, tmp_path: Path):
    model = tuned(wise_method)
    wise_ft(model, 0.5)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(tiny_model(CLIP), tmp_path).eval()
    assert same_bits(outputs(loaded), outputs(model))
    wise_ft(loaded, 0.5)  # what was saved half-way is the fine-tuned adapter of those who load it
    wise_ft(model, 0.25)
    torch.testing.assert_close(outputs(loaded), outputs(model), rtol=1e-4, atol=1e-4)


def test_only_active_adapters_are_scaled():
    for method in (SAFT, RSLORA):
        model = tuned(method)
        add(method, model, CLIP, "other")
        model.set_adapter("other")
        train(model, batch(CLIP, 1))
        other = outputs(model)
        model.set_adapter("default")
        default = outputs(model)
        wise_ft(model, 0.5)
        half = outputs(model)
        model.set_adapter("other")
        assert same_bits(outputs(model), other)
        wise_ft(model, 0)
        model.set_adapter("default")
        assert same_bits(outputs(model), half)
        wise_ft(model, 1)
        assert same_bits(outputs(model), default)
        model.base_model.set_adapter(["default", "other"])
        both = outputs(model)
        assert same_bits(both, default)  # "other" is at α = 0
        wise_ft(model, 1)
        assert not torch.equal(outputs(model), both)
