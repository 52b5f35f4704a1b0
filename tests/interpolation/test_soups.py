# SPDX-License-Identifier: Apache-2.0
"""Soups of whole models, and the choice of their members."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_robust.errors import ConfigError, MergeError, NonFiniteError
from hf_robust.interpolation.models import interpolate, own_tensors
from hf_robust.interpolation.soups import GreedySoup, choose_greedily, greedy_soup, uniform_soup
from hf_robust.tasks.class_names import ZeroShotClassifier
from hf_robust.tasks.identities import Identities
from tests.methods import assert_same
from tests.tiny_models import tiny_model, tiny_processor

METRIC = "validation_accuracy"


def copies(model):
    return {name: tensor.detach().clone() for name, tensor in own_tensors(model).items()}


def linear(seed, dtype=torch.float32):
    model, generator = nn.Linear(3, 2).to(dtype), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        size = 10.0 ** torch.randint(-6, 6, parameter.shape, generator=generator)
        parameter.data = (torch.randn(parameter.shape, generator=generator) * size).to(dtype)
    return model


def test_every_tensor_is_the_mean_and_the_ingredients_stay_as_they_were():
    models = [tiny_model("clip", seed=seed).train() for seed in range(3)]
    models[0].visual_projection.requires_grad_(False)
    before = [copies(model) for model in models]
    soup = uniform_soup(models)
    for name, tensor in copies(soup).items():
        values = torch.stack([tensors[name] for tensors in before])
        expected = values.double().mean(0).to(tensor.dtype) if tensor.is_floating_point() else values[0]
        torch.testing.assert_close(tensor, expected, rtol=1e-7, atol=1e-8)
    for model, tensors in zip(models, before, strict=True):
        assert_same(copies(model), tensors)
        assert model.training and not soup.training
        assert not {t.data_ptr() for t in own_tensors(model).values()} & {
            t.data_ptr() for t in own_tensors(soup).values()
        }


@given(seeds=st.lists(st.integers(0, 50), min_size=1, max_size=5), data=st.data())
@settings(max_examples=25, deadline=None)
def test_laws(seeds, data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    models = [linear(seed, dtype) for seed in seeds]
    soup = copies(uniform_soup(models))
    assert_same(copies(uniform_soup([models[0]] * len(models))), copies(models[0]))
    pair = models[0], models[-1]
    assert_same(copies(uniform_soup(pair)), copies(interpolate(*pair, 0.5)))
    shuffled = copies(uniform_soup(data.draw(st.permutations(models))))
    for name, tensor in soup.items():
        largest = max(float(model.get_parameter(name).detach().abs().max()) for model in models)
        torch.testing.assert_close(shuffled[name], tensor, rtol=torch.finfo(dtype).eps, atol=1e-15 * largest)


class Tied(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight
        self.first.weight.data.fill_(value)
        self.register_buffer("steps", torch.tensor(7))


def test_tied_tensors_stay_tied_and_whole_numbers_are_copied():
    soup = uniform_soup([Tied(0), Tied(1), Tied(5)])
    assert soup.first.weight is soup.second.weight
    assert torch.equal(soup.first.weight, torch.full((2, 2), 2.0)) and soup.steps == 7
    others = Tied(0), Tied(1)
    others[1].steps.add_(1)
    refused(MergeError, "whole numbers.*steps.*#1", others)


def refused(error, match, models, **settings):
    before = [copies(model) for model in models]
    with pytest.raises(error, match=match):
        uniform_soup(models, **settings)
    for model, tensors in zip(models, before, strict=True):
        assert_same(copies(model), tensors)


def test_models_that_do_not_fit_are_refused():
    refused(ConfigError, "no ingredients", [])
    refused(MergeError, "#2 model lacks 1 tensors of the #0 one.*lacking bias", [*[linear(0)] * 2, half_linear()])
    refused(MergeError, "two forms.*bfloat16 and .*float32", [linear(0), linear(0, torch.bfloat16)])
    broken = linear(0)
    broken.bias.data[1] = float("nan")
    refused(NonFiniteError, "bias of the #1 model.*1 of 2", [linear(0), broken])
    with pytest.raises(ConfigError, match="no model.*#0.*'a'.*Pass model="):
        uniform_soup(["a", "b"])
    for wrong in (linear(0), (linear(seed) for seed in range(2)), "ab"):
        with pytest.raises(ConfigError, match=f"no list of ingredients.*{type(wrong).__name__}"):
            uniform_soup(wrong)


def half_linear():
    return nn.Linear(3, 2, bias=False)


def test_heads_of_other_classes_are_refused():
    """Of the same shape, so that the tensors do not tell."""
    names = ["x", "y"], ["y", "x"]
    model = tiny_model("clip")
    first, second = (ZeroShotClassifier(model, tiny_processor("clip"), n, head="trainable") for n in names)
    with pytest.raises(MergeError, match="other classes.*#1.*'x', 'y'.*'y', 'x'"):
        uniform_soup([first, second])
    again = copy.deepcopy(first)
    again.class_head.weight.data.add_(1)
    found = uniform_soup([first, again]).class_head.weight
    torch.testing.assert_close(found, first.class_head.weight + 0.5)
    people = [Identities(model, tiny_processor("clip"), names) for names in (["ann", "bob"], ["bob", "ann"])]
    with pytest.raises(MergeError, match="other classes.*#1.*'ann', 'bob'.*'bob', 'ann'"):
        uniform_soup(people)


# --- greedy ---


def chosen(values, **settings):
    """The choice among ingredients whose soups have these values, by their members in the order they are taken."""
    asked = []

    def score(members):
        asked.append(tuple(members))
        return {METRIC: values[tuple(members)], "test_accuracy": 0.0}

    found = choose_greedily([f"m{index}" for index in range(3)], score, METRIC, **settings)
    return found, asked


def test_the_best_comes_first_and_the_others_must_be_strictly_better():
    values = {(0,): 0.5, (1,): 0.7, (2,): 0.7, (1, 2): 0.7, (1, 0): 0.8}
    found, asked = chosen(values)
    assert asked == [(0,), (1,), (2,), (1, 2), (1, 0)] and found.members == [1, 0]
    assert str(found).splitlines() == [
        "  ingredient  validation_accuracy  of the soup with it",
        "*         m1               0.7000               0.7000",
        "          m2               0.7000               0.7000",
        "*         m0               0.5000               0.8000",
    ]


def test_of_a_loss_the_lowest_comes_first():
    values = {(0,): 0.5, (1,): 0.7, (2,): 0.6, (0, 2): 0.4, (0, 2, 1): 0.45}
    assert chosen(values, greater_is_better=False)[0].members == [0, 2]


def test_the_greedy_soup_is_the_uniform_one_of_its_members():
    models = [linear(seed) for seed in range(4)]
    before = [copies(model) for model in models]
    target = uniform_soup([models[2], models[0]])

    def evaluate(model):
        assert all(model is not one for one in models)
        distance = sum((a - b).abs().sum() for a, b in zip(model.parameters(), target.parameters(), strict=True))
        with torch.no_grad():
            model.weight.zero_()  # a copy: it is the caller's to spoil
        return {METRIC: -distance.item()}

    soup, found = greedy_soup(models, evaluate, METRIC)
    assert isinstance(found, GreedySoup) and len(found.rows) == 4
    assert_same(copies(soup), copies(uniform_soup([models[member] for member in found.members])))
    assert sorted(found.members) == [0, 2]
    for model, tensors in zip(models, before, strict=True):
        assert_same(copies(model), tensors)


def never(model):
    raise AssertionError("evaluated")


def test_what_cannot_be_chosen_by_is_refused():
    models = [linear(0), linear(1)]
    with pytest.raises(ConfigError, match="a soup is chosen on validation data, never on a test set.*'test_accuracy'"):
        greedy_soup(models, never, "test_accuracy")
    with pytest.raises(MergeError, match="lacks"):  # before anything is evaluated
        greedy_soup([*models, half_linear()], never, METRIC)
    with pytest.raises(ConfigError, match="does not return the metric.*allowed loss"):
        greedy_soup(models, lambda model: {"loss": 1.0}, METRIC)
    with pytest.raises(ConfigError, match="evaluate returns no metrics.*NoneType"):
        greedy_soup(models, lambda model: None, METRIC)
    with pytest.raises(NonFiniteError, match="validation_accuracy is nan .at 0"):
        greedy_soup(models, lambda model: {METRIC: float("nan")}, METRIC)
