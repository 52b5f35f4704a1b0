# SPDX-License-Identifier: Apache-2.0
"""What happens to a model between two calls of wise_ft: training, loading, copying, moving."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from hf_robust.interpolation.adapters import wise_ft
from tests.interpolation.tuned import ACLIP, LORA, SAFT, SHIRA, own, tuned
from tests.methods import CLIP, Method, assert_same, batch, outputs, prepared, same_bits, train
from tests.tiny_models import tiny_model


@pytest.fixture(params=[SAFT, ACLIP, LORA], ids=lambda method: method.name)
def wise_method(request) -> Method:
    return request.param


def records(model):
    return [record for module in model.modules() for record in vars(module).get("_wise_ft", {}).values()]


def test_trained_on_from_half_way_is_the_new_fine_tuned_model(wise_method):
    model = tuned(wise_method)
    first = outputs(model)
    wise_ft(model, 0.5)
    train(model, batch(CLIP, 1), steps=2)
    second, tensors = outputs(model), own(model)
    wise_ft(model, 1)
    assert same_bits(outputs(model), second) and not torch.equal(first, second)
    wise_ft(model, 0.3)
    assert not torch.equal(outputs(model), second)
    wise_ft(model, 1)
    assert_same(own(model), tensors)


def test_what_training_left_alone_stays_where_training_found_it():
    """Else a part of the model would jump back to the first training, a state that no training ever saw."""
    model = tuned(LORA)
    wise_ft(model, 0.5)
    for name, parameter in model.named_parameters():
        if "text_model" in name:
            parameter.requires_grad_(False)
    train(model, batch(CLIP, 1), steps=1)
    tensors = own(model)
    wise_ft(model, 1)
    assert_same(own(model), tensors)


def test_loaded_values_are_the_new_fine_tuned_model(wise_method, tmp_path: Path):
    model = tuned(wise_method)
    model.save_pretrained(tmp_path)
    expected = outputs(model)
    train(model, batch(CLIP, 1), steps=2)
    wise_ft(model, 0.5)
    set_peft_model_state_dict(model, load_file(tmp_path / "adapter_model.safetensors"))
    assert same_bits(outputs(model), expected)
    wise_ft(model, 1)
    assert same_bits(outputs(model), expected)
    wise_ft(model, 0)
    assert same_bits(outputs(model), outputs(tiny_model(CLIP)))


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_remember_the_fine_tuned_model_each_for_itself(wise_method, copied):
    model = tuned(wise_method)
    expected = outputs(model)
    wise_ft(model, 0.5)
    twin = copied(model)
    wise_ft(twin, 1)
    assert same_bits(outputs(twin), expected) and not torch.equal(outputs(model), expected)
    wise_ft(model, 1)
    assert same_bits(outputs(model), expected)


def test_nothing_shows_in_the_state_dict_and_nothing_is_kept_at_one(wise_method):
    model = tuned(wise_method)
    names, modules = list(model.state_dict()), [name for name, _ in model.named_modules()]
    assert not records(model)
    wise_ft(model, 0.5)
    assert len(records(model)) > 1
    assert list(model.state_dict()) == names and [name for name, _ in model.named_modules()] == modules
    assert not any(record.tuned.requires_grad for record in records(model))
    wise_ft(model, 1)
    assert not records(model)


def test_any_wrapper_of_the_model_will_do(wise_method):
    model = tuned(wise_method)
    expected = outputs(model)
    wise_ft(model, 0.5)
    wise_ft(torch.nn.Sequential(model), 0.25)
    wise_ft(model.get_base_model(), 1)
    assert same_bits(outputs(model), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_casting_in_between_keeps_the_fine_tuned_model(wise_method, dtype):
    model = tuned(wise_method)
    twin = copy.deepcopy(model).to(dtype)
    wise_ft(model, 0.5)
    model.to(dtype)
    for alpha in (0.7, 1):
        wise_ft(model, alpha)
        wise_ft(twin, alpha)
        assert_same(own(model), own(twin))
    wise_ft(model, 0)
    assert same_bits(outputs(model), outputs(tiny_model(CLIP).to(dtype)))


def test_the_same_alpha_again_writes_nothing(wise_method):
    """A write would tell autograd, and a head that keeps its class embeddings, that the weights have changed."""
    model = tuned(wise_method)
    for alpha in (1, 0.5, 0):
        wise_ft(model, alpha)
        outputs(model)
        versions = [parameter._version for parameter in model.parameters()]
        wise_ft(model, alpha)
        outputs(model)
        assert versions == [parameter._version for parameter in model.parameters()]


def test_modes_gradients_and_the_random_state_stay(wise_method):
    model = tuned(wise_method).train()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    random = torch.get_rng_state()
    wise_ft(model, 0.5)
    assert model.training and flags == [parameter.requires_grad for parameter in model.parameters()]
    assert torch.equal(random, torch.get_rng_state())
    with model.disable_adapter():
        wise_ft(model, 0.25)
        expected = outputs(model.eval())
    assert same_bits(expected, outputs(tiny_model(CLIP)))


def test_an_untrained_adapter_is_the_base_at_every_alpha(wise_method):
    model = prepared(wise_method, tiny_model(CLIP), CLIP).eval()
    for alpha in (0.5, 0, 1):
        wise_ft(model, alpha)
        assert same_bits(outputs(model), outputs(tiny_model(CLIP)))
    assert not records(model)


def test_an_adapter_that_transformers_loaded(wise_method, tmp_path: Path):
    model = tuned(wise_method)
    model.save_pretrained(tmp_path)
    plain = tiny_model(CLIP)
    plain.load_adapter(str(tmp_path))
    if wise_method.name == "SAFT":
        assert same_bits(outputs(plain), outputs(model))
    for alpha in (0.5, 0, 1):
        wise_ft(plain, alpha)
        wise_ft(model, alpha)
        assert same_bits(outputs(plain), outputs(model))


def test_a_deleted_adapter_does_not_come_back_in_a_new_one_of_its_name():
    """At α = 0 the values of both are zero."""
    for method in (SHIRA, LORA):
        model = tuned(method)
        wise_ft(model, 0)
        model.add_adapter("other", method.config())
        model.set_adapter("other")
        model.delete_adapter("default")
        model.add_adapter("default", method.config())
        model.set_adapter("default")
        wise_ft(model, 1)
        assert same_bits(outputs(model), outputs(tiny_model(CLIP)))
