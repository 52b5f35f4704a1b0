# SPDX-License-Identifier: Apache-2.0
"""The functions of the terms, and MPM-NCE, against loops that were written from the formulas alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from hf_robust.losses import Moved
from hf_robust.losses.context import context_divergence, context_embeds
from hf_robust.losses.features import feature_distance, layers_by_depth
from hf_robust.losses.lipsum import lipsum_penalty
from hf_robust.losses.spuriosity import spuriosity_divergence
from hf_robust.losses.weights import squared_distance
from hf_robust.tasks.contrastive import gather_pairs, softmax_loss
from tests.losses.formulas import (
    check,
    context,
    contexts_of,
    deep,
    features,
    lipsum,
    mpm_nce,
    spuriosity,
    units,
)

LABELS = [0, 1, 0, 2, 1]
SMALL = given_settings(max_examples=15)
SHAPES = [(1, 3, 2), (4, 5, 3), (6, 2, 7)]
seeds = st.integers(0, 2**31 - 1)


@pytest.mark.parametrize(("batch", "others", "dim"), SHAPES)
def test_lipsum_penalty(batch, others, dim):
    generator = np.random.default_rng(batch)
    arrays = [units(generator, rows, dim) for rows in (batch, batch, others)]
    texts = torch.tensor(arrays[2])
    check(
        lambda f, f0: lipsum_penalty(f, f0, texts, 7.5),
        lambda f, f0: lipsum(f, f0, arrays[2], 7.5),
        arrays[:1],
        arrays[1:2],
    )


@SMALL
@given(seeds, st.floats(0.1, 100.0))
def test_lipsum_penalty_goes_with_the_square_of_the_scale(seed, scale):
    generator = np.random.default_rng(seed)
    tuned, start, texts = (units(generator, rows, 4) for rows in (3, 3, 5))
    found = lipsum_penalty(*map(torch.tensor, (tuned, start, texts)), scale).item()
    assert found == pytest.approx(lipsum(tuned, start, texts, scale), rel=1e-9)
    assert found == pytest.approx(scale**2 * lipsum(tuned, start, texts, 1.0), rel=1e-9)


@pytest.mark.parametrize(("classes", "templates"), [(1, 3), (4, 1), (3, 2)])
def test_context_embeds(classes, templates):
    embeds = units(np.random.default_rng(classes), classes * templates, 5)
    found = context_embeds(torch.tensor(embeds), templates).numpy()
    np.testing.assert_allclose(found, contexts_of(embeds, templates), rtol=1e-12)


@pytest.mark.parametrize(("batch", "others", "dim"), SHAPES)
def test_context_divergence(batch, others, dim):
    generator = np.random.default_rng(batch)
    tuned, start, contexts = (units(generator, rows, dim) for rows in (batch, batch, others))
    texts = torch.tensor(contexts)
    check(
        lambda f, f0: context_divergence(f, f0, texts, 3.0),
        lambda f, f0: context(f, f0, contexts, 3.0),
        [tuned],
        [start],
    )


@SMALL
@given(seeds, st.floats(0.1, 100.0))
def test_context_divergence_at_any_scale(seed, scale):
    generator = np.random.default_rng(seed)
    tuned, start, contexts = (units(generator, rows, 4) for rows in (3, 3, 5))
    found = context_divergence(*map(torch.tensor, (tuned, start, contexts)), scale).item()
    assert found == pytest.approx(context(tuned, start, contexts, scale), rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 4, 2)])
def test_feature_distance(shape, axis, reduction):
    generator = np.random.default_rng(0)
    tuned, start = generator.normal(size=(2, *shape))
    check(
        lambda h, h0: feature_distance(h, h0, axis, reduction),
        lambda h, h0: features(h, h0, axis, reduction),
        [tuned],
        [start],
    )


@SMALL
@given(seeds, st.integers(1, 6), st.integers(1, 6))
def test_feature_distance_is_bounded_as_its_norms_say(seed, n_tokens, width):
    tuned, start = np.random.default_rng(seed).normal(size=(2, 2, n_tokens, width))
    for axis, length in ((1, n_tokens), (2, width)):
        found = feature_distance(torch.tensor(tuned), torch.tensor(start), axis, "mean").item()
        assert found == pytest.approx(features(tuned, start, axis, "mean"), rel=1e-9, abs=1e-15)
        assert found <= 4 / length + 1e-12


@pytest.mark.parametrize("depth", [4, 8, 12, 24])
def test_layers_by_depth(depth):
    names = [f"vision_model.encoder.layers.{share * depth // 4 - 1}" for share in (1, 2, 3, 4)]
    assert layers_by_depth(deep(depth)) == ("vision_model.pre_layrnorm", *names)


def test_squared_distance():
    generator = np.random.default_rng(0)
    tuned = [generator.normal(size=shape) for shape in ((), (3,), (2, 4), (5, 1, 2))]
    starts = [generator.normal(size=array.shape) for array in tuned]

    def loss(*tensors):
        return squared_distance([Moved(t, torch.tensor(s)) for t, s in zip(tensors, starts, strict=True)])

    def oracle(*arrays):
        return sum(
            (number - other) ** 2
            for array, start in zip(arrays, starts, strict=True)
            for number, other in zip(array.ravel(), start.ravel(), strict=True)
        )

    check(loss, oracle, tuned)


@pytest.mark.parametrize("labels", [LABELS, [0, 1, 2], [4, 4, 4], [1]])
def test_spuriosity_divergence(labels):
    generator = np.random.default_rng(len(labels))
    arrays = [units(generator, len(labels), 4) for _ in range(4)]
    keys = torch.tensor(labels)
    check(
        lambda *tensors: spuriosity_divergence(*tensors, keys, 3.0),
        lambda *given_arrays: spuriosity(*given_arrays, labels, 3.0),
        arrays[:2],
        arrays[2:],
    )


@SMALL
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), seeds, st.floats(0.1, 100.0))
def test_spuriosity_divergence_of_any_labels(labels, seed, scale):
    generator = np.random.default_rng(seed)
    arrays = [units(generator, len(labels), 4) for _ in range(4)]
    found = spuriosity_divergence(*map(torch.tensor, arrays), torch.tensor(labels), scale).item()
    assert found == pytest.approx(spuriosity(*arrays, labels, scale), rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("repeated", ["positive", "ignore", "negative"])
@pytest.mark.parametrize(("smoothing", "margin"), [(0.0, 0.0), (0.02, 0.05), (0.3, 0.7)])
def test_mpm_nce(repeated, smoothing, margin):
    generator = np.random.default_rng(1)
    arrays = [units(generator, 5, 3), units(generator, 5, 3), np.array(4.0)]
    labels = torch.tensor(LABELS)[:, None]

    def loss(images, texts, scale):
        pairs = gather_pairs(images, texts, torch.arange(5), labels)
        return softmax_loss(pairs, scale, repeated, smoothing, margin)

    check(loss, lambda v, t, s: mpm_nce(v, t, s, LABELS, repeated, smoothing, margin), arrays)


@SMALL
@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), seeds, st.floats(0.0, 0.9), st.floats(0.0, 1.0))
def test_mpm_nce_of_any_labels(labels, seed, smoothing, margin):
    generator = np.random.default_rng(seed)
    images, texts = (units(generator, len(labels), 4) for _ in range(2))
    keys = torch.tensor(labels)[:, None]
    pairs = gather_pairs(torch.tensor(images), torch.tensor(texts), torch.arange(len(labels)), keys)
    found = softmax_loss(pairs, torch.tensor(9.0, dtype=torch.float64), "positive", smoothing, margin).item()
    expected = mpm_nce(images, texts, 9.0, labels, "positive", smoothing, margin)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("repeated", ["positive", "ignore", "negative"])
def test_mpm_nce_of_several_texts_an_image(repeated):
    generator = np.random.default_rng(2)
    images, texts = units(generator, 3, 4), units(generator, 6, 4)
    image_of_text, says = [0, 1, 0, 2, 2, 1], [7, 7, 5, 7, 4, 3]
    pairs = gather_pairs(*map(torch.tensor, (images, texts, image_of_text)), torch.tensor(says)[:, None])
    found = softmax_loss(pairs, torch.tensor(9.0, dtype=torch.float64), repeated, 0.1, 0.3).item()
    expected = mpm_nce(images, texts, 9.0, says, repeated, 0.1, 0.3, image_of_text)
    assert found == pytest.approx(expected, rel=1e-9)
