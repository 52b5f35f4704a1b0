# SPDX-License-Identifier: Apache-2.0
"""Soups and TPGM against loops in float64 that were written from the formulas alone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st
from torch import nn

from hf_robust import wise_ft
from hf_robust.interpolation.soups import greedy_soup, uniform_soup
from hf_robust.interpolation.tpgm import tpgm

SMALL = given_settings(max_examples=10)
seeds = st.integers(0, 2**31 - 1)


def models(generator, n, noise=1.0):
    """Linear classifiers around one start, in float64."""
    start = generator.normal(size=(3, 4)), generator.normal(size=3)
    found = []
    for _ in range(n):
        model = nn.Linear(4, 3, dtype=torch.float64)
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), start, strict=True):
                parameter.copy_(torch.tensor(value + noise * generator.normal(size=value.shape)))
        found.append(model)
    return found


def values(model):
    return [parameter.detach().numpy().copy() for parameter in model.parameters()]


# --- soups ---


@pytest.mark.parametrize("n", [1, 2, 5])
def test_uniform_soup(n):
    ingredients = models(np.random.default_rng(n), n)
    for position, found in enumerate(values(uniform_soup(ingredients))):
        expected = np.zeros_like(found)
        for index in np.ndindex(*found.shape):
            expected[index] = sum(values(one)[position][index] for one in ingredients) / n
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def accuracy(weights, images, labels):
    weight, bias = weights
    right = 0
    for image, label in zip(images, labels, strict=True):
        answers = [sum(weight[c][j] * image[j] for j in range(4)) + bias[c] for c in range(3)]
        right += answers.index(max(answers)) == label
    return right / len(labels)


@SMALL
@given(seeds, st.integers(1, 6), st.integers(5, 30), st.booleans())
def test_greedy_soup(seed, n, n_images, greater):
    generator = np.random.default_rng(seed)
    ingredients = models(generator, n)
    images, labels = generator.normal(size=(n_images, 4)), generator.integers(3, size=n_images)

    def evaluate(model):
        right = accuracy(values(model), images, labels)
        return {"validation_accuracy": right} if greater else {"validation_error": 1 - right}

    alone = [accuracy(values(model), images, labels) for model in ingredients]
    order = sorted(range(n), key=lambda position: -alone[position])
    members, soup, best = [order[0]], values(ingredients[order[0]]), alone[order[0]]
    for position in order[1:]:
        size, more = len(members), values(ingredients[position])
        candidate = [(size * one + other) / (size + 1) for one, other in zip(soup, more, strict=True)]
        if accuracy(candidate, images, labels) > best:
            best = accuracy(candidate, images, labels)
            members, soup = [*members, position], candidate

    name = "validation_accuracy" if greater else "validation_error"
    found, table = greedy_soup(ingredients, evaluate, name, greater_is_better=greater)
    assert table.members == members
    for one, other in zip(values(found), soup, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


# --- TPGM ---


def gradients(weights, images, targets):
    """Of the mean of squares of x Wᵀ + b - y, and that mean."""
    weight, bias = weights
    errors = images @ weight.T + bias - targets
    return [2 * errors.T @ images / errors.size, 2 * errors.sum(axis=0) / errors.size], (errors**2).mean()


def projected(starts, tuned, batches, steps, learning_rate):
    """ρ and the losses: γ of every tensor by Adam, which starts at half the norm."""
    ways = [end - start for start, end in zip(starts, tuned, strict=True)]
    norms = [np.sqrt(sum(number**2 for number in way.ravel())) for way in ways]
    radii, first, second, losses = [norm / 2 for norm in norms], [0.0, 0.0], [0.0, 0.0], []
    for step in range(steps + 1):
        radii = [min(max(radius, 1e-8), norm) for radius, norm in zip(radii, norms, strict=True)]
        shares = [min(max(radius / (norm + 1e-8), 0), 1) for radius, norm in zip(radii, norms, strict=True)]
        if step == steps:
            return shares, losses
        weights = [start + share * way for start, share, way in zip(starts, shares, ways, strict=True)]
        slopes, loss = gradients(weights, *batches[step % len(batches)])
        losses.append(loss)
        for tensor, (slope, way, norm) in enumerate(zip(slopes, ways, norms, strict=True)):
            slope = (slope * way).sum() / (norm + 1e-8)
            first[tensor] = 0.9 * first[tensor] + 0.1 * slope
            second[tensor] = 0.999 * second[tensor] + 0.001 * slope**2
            mean, square = first[tensor] / (1 - 0.9 ** (step + 1)), second[tensor] / (1 - 0.999 ** (step + 1))
            radii[tensor] -= learning_rate * mean / (np.sqrt(square) + 1e-8)
    raise AssertionError


@given_settings(max_examples=12)
@given(seeds, st.integers(1, 40), st.integers(1, 3), st.floats(0.005, 0.5), st.floats(0.1, 2.0))
def test_tpgm(seed, steps, n_batches, learning_rate, noise):
    generator = np.random.default_rng(seed)
    (model,) = models(generator, 1)
    tuned = values(model)
    starts = [value + noise * generator.normal(size=value.shape) for value in tuned]
    zero_shot = {name: torch.tensor(start) for name, start in zip(("weight", "bias"), starts, strict=True)}
    batches = [(generator.normal(size=(6, 4)), generator.normal(size=(6, 3))) for _ in range(n_batches)]

    def loss_fn(model, batch):
        images, targets = batch
        return (model(torch.tensor(images)) - torch.tensor(targets)).square().mean()

    table = tpgm(model, batches, loss_fn, zero_shot, steps=steps, learning_rate=learning_rate)
    shares, losses = projected(starts, tuned, batches, steps, learning_rate)
    np.testing.assert_allclose(list(table.ratios.values()), shares, rtol=1e-5, atol=1e-6)
    assert list(table.ratios) == ["weight", "bias"]
    np.testing.assert_allclose(table.losses, losses, rtol=1e-5)
    for found, start, end, share in zip(values(model), starts, tuned, shares, strict=True):
        np.testing.assert_allclose(found, start + share * (end - start), rtol=1e-5, atol=1e-5)


def test_tpgm_comes_back_from_the_whole_way():
    generator = np.random.default_rng(0)
    (model,) = models(generator, 1)
    tuned = values(model)
    starts = [value - 0.5 for value in tuned]
    zero_shot = {name: torch.tensor(start) for name, start in zip(("weight", "bias"), starts, strict=True)}
    images, batches = generator.normal(size=(20, 4)), []
    for share in [3] * 4 + [0.2] * 26:  # targets beyond the fine-tuned model, then near the start
        weight, bias = (start + share * (end - start) for start, end in zip(starts, tuned, strict=True))
        batches.append((images, images @ weight.T + bias))

    def loss_fn(model, batch):
        return (model(torch.tensor(batch[0])) - torch.tensor(batch[1])).square().mean()

    table = tpgm(model, batches, loss_fn, zero_shot, steps=30, learning_rate=0.4)
    shares, losses = projected(starts, tuned, batches, 30, 0.4)
    assert projected(starts, tuned, batches, 4, 0.4)[0] == pytest.approx([1, 1], abs=1e-6) and max(shares) < 0.95
    np.testing.assert_allclose(list(table.ratios.values()), shares, rtol=1e-5)
    np.testing.assert_allclose(table.losses, losses, rtol=1e-5)


def test_a_first_step_of_tpgm_is_at_half_the_way():
    (model,) = models(np.random.default_rng(0), 1)
    zero_shot = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    half, seen = copy.deepcopy(model), []
    wise_ft(half, 0.5, zero_shot)

    def loss_fn(model, batch):
        seen.append(model(batch).detach())
        return model(batch).square().mean()

    batch = torch.ones(1, 4, dtype=torch.float64)
    tpgm(model, [batch], loss_fn, zero_shot, steps=1)
    torch.testing.assert_close(seen[0], half(batch).detach(), rtol=1e-6, atol=1e-6)
