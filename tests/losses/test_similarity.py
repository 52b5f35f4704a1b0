# SPDX-License-Identifier: Apache-2.0
"""The similarity loss by itself: its numbers, its gradients, its weight over time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hf_robust.errors import ConfigError, DataError
from hf_robust.losses import SimilarityLoss

DISTANCES = ["cosine", "l2", "mse", "l1"]
all_distances = pytest.mark.parametrize("distance", DISTANCES)
vectors = arrays(np.float64, (3, 4), elements=st.floats(-10, 10, width=32))


def oracle(distance, tuned, reference):
    """The definitions, number by number."""
    total = 0.0
    for u, v in zip(tuned.tolist(), reference.tolist(), strict=True):
        differences = [a - b for a, b in zip(u, v, strict=True)]
        if distance == "cosine":
            dot = math.fsum(a * b for a, b in zip(u, v, strict=True))
            total += 1 - dot / (math.hypot(*u) * math.hypot(*v))
        elif distance == "l2":
            total += math.sqrt(math.fsum(d**2 for d in differences))
        elif distance == "mse":
            total += math.fsum(d**2 for d in differences) / len(u)
        else:
            total += math.fsum(abs(d) for d in differences) / len(u)
    return total / len(tuned)


@all_distances
def test_it_is_the_mean_of_the_distance_as_defined(distance):
    tuned, reference = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    value = SimilarityLoss(3.0, distance).between(tuned, reference)
    assert value.shape == () and value.item() == pytest.approx(oracle(distance, tuned, reference), rel=1e-12)


@all_distances
@settings(max_examples=30)
@given(tuned=vectors, reference=vectors)
def test_it_is_symmetric_and_not_negative(distance, tuned, reference):
    tuned, reference = torch.from_numpy(tuned), torch.from_numpy(reference)
    similarity = SimilarityLoss(distance=distance).between
    assert similarity(tuned, reference) == similarity(reference, tuned) >= 0


@all_distances
@settings(max_examples=30)
@given(embeds=vectors)
def test_equal_embeddings_give_exactly_zero_and_a_gradient_of_zero(distance, embeds):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        tuned = torch.from_numpy(embeds).to(dtype).requires_grad_()
        value = SimilarityLoss(distance=distance).between(tuned, tuned.detach().clone())
        value.backward()
        assert value.item() == 0 and tuned.grad.count_nonzero() == 0  # NaN counts as nonzero


@all_distances
def test_its_gradient_is_that_of_finite_differences_and_goes_to_the_tuned_alone(distance):
    tuned = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    similarity = SimilarityLoss(distance=distance).between
    assert torch.autograd.gradcheck(lambda embeds: similarity(embeds, reference.detach()), (tuned,))
    similarity(tuned, reference).backward()
    assert reference.grad is None and tuned.grad.count_nonzero() == tuned.numel()


@all_distances
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sums_are_float32_or_better(distance, dtype):
    tuned, reference = torch.randn(4, 300).to(dtype), torch.randn(4, 300).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        value = SimilarityLoss(distance=distance).between(tuned, reference)
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    assert value.item() == pytest.approx(oracle(distance, tuned.double(), reference.double()), rel=1e-5)


def test_cosine_does_not_see_lengths_and_the_others_do():
    tuned, reference = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    for distance in DISTANCES:
        similarity = SimilarityLoss(distance=distance).between
        same = torch.isclose(similarity(3 * tuned, 5 * reference), similarity(tuned, reference), rtol=1e-12)
        assert same == (distance == "cosine")


@pytest.mark.parametrize(
    "shapes",
    [((2, 3), (1, 3)), ((2, 3), (2, 4)), ((2, 3), (3,)), ((3,), (3,)), ((2, 3, 4), (2, 3, 4)), ((0, 3), (0, 3))],
)
def test_embeddings_that_do_not_pair_are_refused(shapes):
    tuned, reference = map(torch.zeros, shapes)
    with pytest.raises(DataError, match="do not pair") as error:
        SimilarityLoss().between(tuned, reference)
    assert all(str(shape) in str(error.value) for shape in shapes)


@pytest.mark.parametrize("argument", ["distance", "towers", "schedule"])
@pytest.mark.parametrize("got", ["Cosine", "", None])
def test_unknown_name_is_refused(argument, got):
    with pytest.raises(ConfigError, match=f"unknown {argument}.*losses"):
        SimilarityLoss(**{argument: got})


def test_it_has_nothing_to_train_and_shows_its_settings():
    similarity = SimilarityLoss(0.5, "l1", "both", "linear")
    assert not similarity.state_dict() and not list(similarity.parameters())
    shown = "SimilarityLoss(weight=0.5, distance='l1', towers='both', schedule='linear')"
    assert repr(similarity) == shown
    assert similarity.settings() == {"weight": 0.5, "distance": "l1", "towers": "both", "schedule": "linear"}
