# SPDX-License-Identifier: Apache-2.0
"""WiSE-FT of two whole models."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_robust.errors import ConfigError, MergeError, NonFiniteError
from hf_robust.interpolation.models import interpolate
from hf_robust.tasks.class_names import ZeroShotClassifier
from tests.methods import all_families, assert_same, outputs, same_bits
from tests.tiny_models import tiny_model, tiny_processor


def own(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def copies(model):
    return {name: tensor.detach().clone() for name, tensor in own(model).items()}


def modes(model):
    return [module.training for module in model.modules()]


def flags(model):
    return [parameter.requires_grad for parameter in model.parameters()]


@all_families
def test_every_tensor_is_the_official_formula(family):
    zero_shot, fine_tuned = tiny_model(family), tiny_model(family, seed=1)
    theta0, theta1 = copies(zero_shot), copies(fine_tuned)
    for alpha in (0.1, 0.5, 0.75):
        result = interpolate(zero_shot, fine_tuned, alpha)
        assert type(result) is type(fine_tuned)
        found = copies(result)
        assert found.keys() == theta1.keys()
        for name, tensor in found.items():
            expected = (1 - alpha) * theta0[name].double() + alpha * theta1[name].double()
            torch.testing.assert_close(tensor, expected.to(tensor.dtype), rtol=1e-7, atol=1e-8)
    assert any(not tensor.is_floating_point() for tensor in theta1.values())  # position_ids, which are not saved
    assert not set(theta1) <= set(result.state_dict()) | set(dict(result.named_parameters()))


def test_the_inputs_stay_as_they_were():
    zero_shot, fine_tuned = tiny_model("clip").train(), tiny_model("clip", seed=1)
    fine_tuned.visual_projection.requires_grad_(False)
    fine_tuned.train().text_model.eval()
    models = zero_shot, fine_tuned
    before = [
        (copies(m), [x.training for x in m.modules()], [p.requires_grad for p in m.parameters()]) for m in models
    ]
    result = interpolate(*models, 0.5)
    for model, (tensors, *others) in zip(models, before, strict=True):
        assert_same(copies(model), tensors)
        assert others == [modes(model), flags(model)]
    assert not any(module.training for module in result.modules())
    memory = {tensor.data_ptr() for model in models for tensor in own(model).values()}
    assert not memory & {tensor.data_ptr() for tensor in own(result).values()}


@given(alpha=st.floats(0, 1), seed=st.integers(0, 3))
@settings(max_examples=15)
def test_laws(alpha, seed):
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    generator = torch.Generator().manual_seed(seed)
    for parameter in (*first.parameters(), *second.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=generator)
    assert_same(copies(interpolate(first, first, alpha)), copies(first))
    assert_same(copies(interpolate(first, second, 0)), copies(first))
    assert_same(copies(interpolate(first, second, 1)), copies(second))
    if alpha >= 0.5:  # where 1 - α is exact
        assert_same(copies(interpolate(first, second, alpha)), copies(interpolate(second, first, 1 - alpha)))


def test_the_ends_give_the_outputs_of_the_models():
    zero_shot, fine_tuned = tiny_model("clip"), tiny_model("clip", seed=1)
    assert same_bits(outputs(interpolate(zero_shot, fine_tuned, 0)), outputs(zero_shot))
    assert same_bits(outputs(interpolate(zero_shot, fine_tuned, 1)), outputs(fine_tuned))
    half = outputs(interpolate(zero_shot, fine_tuned, 0.5))
    assert not torch.equal(half, outputs(zero_shot)) and not torch.equal(half, outputs(fine_tuned))


def test_a_trainable_head_is_interpolated_with_its_classifier():
    models = [tiny_model("clip"), tiny_model("clip", seed=1)]
    first, second = (ZeroShotClassifier(m, tiny_processor("clip"), ["a", "b"], head="trainable") for m in models)
    head = interpolate(first, second, 0.5).class_head
    torch.testing.assert_close(head.weight, (first.class_head.weight + second.class_head.weight) / 2)


class Tied(nn.Module):
    def __init__(self, values, tied=True):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        for module, value in zip((self.first, self.second), values, strict=True):
            module.weight.data.fill_(value)
        if tied:
            self.second.weight = self.first.weight


def test_tied_tensors_are_interpolated_once_and_stay_tied():
    result = interpolate(Tied([0, 0]), Tied([1, 1]), 0.25)
    assert result.first.weight is result.second.weight
    assert torch.equal(result.first.weight, torch.full((2, 2), 0.25))
    assert interpolate(Tied([0, 0], tied=False), Tied([1, 1]), 0.25).first.weight[0, 0] == 0.25
    result = interpolate(Tied([0, 0]), Tied([1, 2], tied=False), 0.25)
    assert result.first.weight[0, 0] == 0.25 and result.second.weight[0, 0] == 0.5
    with pytest.raises(MergeError, match="tied in the fine-tuned.*second.weight.*first.weight"):
        interpolate(Tied([0, 3], tied=False), Tied([1, 1]), 0.25)


def test_whole_numbers_are_copied():
    first, second = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    second.num_batches_tracked.fill_(7)
    second.running_mean.fill_(1)
    second.register_buffer("flags", torch.tensor([True, False]), persistent=False)
    first.register_buffer("flags", torch.tensor([False, False]), persistent=False)
    found = {alpha: interpolate(first, second, alpha) for alpha in (0, 0.5, 1)}
    assert [int(found[alpha].num_batches_tracked) for alpha in found] == [0, 7, 7]
    assert [found[alpha].flags.tolist() for alpha in found] == [[False, False], [True, False], [True, False]]
    assert found[0.5].running_mean.tolist() == [0.5, 0.5]


def refused(error, match, zero_shot, fine_tuned, alpha=0.5):
    before = copies(zero_shot), copies(fine_tuned)
    with pytest.raises(error, match=match):
        interpolate(zero_shot, fine_tuned, alpha)
    assert_same(copies(zero_shot), before[0])
    assert_same(copies(fine_tuned), before[1])


def test_models_that_do_not_fit_are_refused():
    model = tiny_model("clip")
    many = nn.ModuleList(nn.Linear(1, 1) for _ in range(5))
    refused(MergeError, r"lacks 8 tensors.*has 0 others.*2.bias, .*\(\+3 more\); others none", many[:1], many)
    refused(MergeError, r"lacks 0 tensors.*has 8 others.*lacking none; others 1.weight", many, many[:1])
    refused(MergeError, r"two forms \(at weight\): got '\(2, 3\), .* and \(2, 4\)", nn.Linear(3, 2), nn.Linear(4, 2))
    refused(MergeError, "two forms.*float32 and .*bfloat16", model, copy.deepcopy(model).bfloat16())
    refused(ConfigError, "alpha is no share", model, model, 1.5)
    tuned = get_peft_model(tiny_model("clip"), LoraConfig(target_modules=["q_proj"]))
    refused(MergeError, "fine-tuned model has adapters.*q_proj.*merge_and_unload", model, tuned)
    refused(MergeError, "zero-shot model has adapters.*q_proj.*wise_ft", tuned, model)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_values_that_are_not_finite_are_refused(value, alpha):
    broken, whole = nn.Linear(2, 2), nn.Linear(2, 2)
    broken.bias.data[1] = value
    refused(NonFiniteError, "bias of the zero-shot model.*1 of 2", broken, whole, alpha)
    refused(NonFiniteError, "bias of the fine-tuned model.*1 of 2", whole, broken, alpha)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantised_models_are_refused(dtype):
    quantised, whole = nn.Linear(2, 2), nn.Linear(2, 2)
    quantised.weight = nn.Parameter(torch.ones(2, 2).to(dtype), requires_grad=False)
    for models in ((quantised, whole), (whole, quantised)):
        with pytest.raises(MergeError, match="quantised .at weight.*float32"):
            interpolate(*models, 0.5)


def test_models_without_values_are_refused():
    with pytest.raises(MergeError, match="zero-shot model is not loaded.*weight"):
        interpolate(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2), 0.5)
