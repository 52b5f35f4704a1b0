# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from hf_robust.errors import ConfigError, DataError, NonFiniteError
from hf_robust.tasks.identity_metrics import identity_metrics
from hf_robust.tasks.verification import tar_at_far


def drawn(images=60, identities=8, lone=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.cat([torch.randint(identities, (images,), generator=generator), identities + torch.arange(lone)])
    centres = torch.randn(identities + lone, 6, generator=generator, dtype=torch.float64)
    embeds = centres[indices] + 1.2 * torch.randn(images + lone, 6, generator=generator, dtype=torch.float64)
    return embeds, indices


def by_brute_force(embeds, identities):
    """After the definitions, an image at a time."""
    units = torch.nn.functional.normalize(embeds, dim=1)
    cosines, indices = (units @ units.T).numpy(), np.asarray(identities)
    first_right, precisions = [], []
    for query, row in enumerate(cosines):
        order = [other for other in np.argsort(-row) if other != query]
        right = indices[order] == indices[query]
        if relevant := right.sum():
            first_right.append(right[0])
            precisions.append(sum(right[: i + 1].mean() for i in range(relevant) if right[i]) / relevant)
    upper = np.triu_indices(len(indices), 1)
    same, scores = (indices[:, None] == indices)[upper], cosines[upper]
    rates = {f"tar_at_far_1e-{n}": tar_at_far(scores[same], scores[~same], 10**-n) for n in (2, 3)}
    found = {"recall@1": np.mean(first_right), "mAP@R": np.mean(precisions), "roc_auc": roc_auc_score(same, scores)}
    return found | rates


@pytest.mark.parametrize("chunk_size", [7, 128])
def test_nearest_and_pairs_are_those_of_all_similarities(chunk_size):
    embeds, identities = drawn(180)
    found, expected = identity_metrics(embeds, identities, chunk_size), by_brute_force(embeds, identities)
    assert found.keys() == expected.keys() and not math.isnan(found["tar_at_far_1e-3"])
    assert found == pytest.approx(expected, rel=1e-5)
    assert all(0.01 < value < 0.99 for value in found.values())


def test_by_hand():
    """Points on a circle; the only image of an identity is no query but may be found."""
    angles = torch.tensor([0.0, 0.1, 0.25, 1.0, 1.5, 1.7])
    embeds = torch.stack([angles.cos(), angles.sin()], dim=1)
    found = identity_metrics(embeds, ["ann", "ann", "lone", "ann", "bob", "bob"])
    # ann: (both of two), found first; found, then lone; lone, then found at 2. bob: found each
    assert found["recall@1"] == pytest.approx(4 / 5)
    assert found["mAP@R"] == pytest.approx((1 / 2 + 1 / 2 + 0 + 1 + 1) / 5)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.integers(5, 70), st.permutations(range(33)))
def test_neither_order_nor_chunks_nor_names_matter(seed, chunk_size, order):
    embeds, identities = drawn(30, 5, seed=seed)
    found = identity_metrics(embeds, identities)
    names = np.array([f"person {10 - index}" for index in identities])
    again = identity_metrics(5 * embeds[order], names[order], chunk_size)
    assert again == pytest.approx(found, rel=1e-5, nan_ok=True)


def test_identities_beyond_what_float32_can_tell_are_told_apart():
    embeds, identities = drawn(30, 5)
    expected = identity_metrics(embeds, identities)
    assert identity_metrics(embeds, identities + 2**40) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("embeds", "identities", "options", "error", "message"),
    [
        (torch.eye(3), [1, 1], {}, DataError, r"do not fit.*\(2,\).*\(3,\) integers or strings"),
        (torch.eye(3), [1.0, 1.0, 2.0], {}, DataError, "do not fit.*float64"),
        (torch.eye(3), [1, 1, 1], {}, DataError, "nothing to tell apart.*1 identities with 3 images"),
        (torch.eye(3), [1, 2, 3], {}, DataError, "nothing to tell apart.*3 identities with 1 images"),
        (torch.zeros(3, 2), [1, 1, 2], {}, DataError, "no direction"),
        (torch.full((3, 2), torch.inf), [1, 1, 2], {}, NonFiniteError, "embeds, row 0"),
        (torch.eye(3), [1, 1, 2], {"chunk_size": 0}, ConfigError, "chunk_size.*got 0"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(embeds, identities, options, error, message):
    with pytest.raises(error, match=message):
        identity_metrics(embeds, identities, **options)
