# SPDX-License-Identifier: Apache-2.0
"""Batches with m images of every identity: what is in them, and what their order hangs on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_robust.data.draws import Draws
from hf_robust.errors import ConfigError
from hf_robust.tasks.identity_sampler import IdentitySampler

LABELS = np.repeat(np.arange(6), 5)


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(2, 9), min_size=3, max_size=8),
    m=st.integers(1, 4),
    identities=st.integers(1, 3),
    epoch=st.integers(0, 3),
)
def test_every_batch_has_m_images_of_each_of_its_identities(counts, m, identities, epoch):
    labels, size = np.repeat(np.arange(len(counts)), counts), m * identities
    if size > len(labels):
        return
    draws = Draws(seed=3)
    draws.set_epoch(epoch)
    sampler = IdentitySampler(labels, m, size, draws)
    rows = np.array(list(sampler))
    assert len(rows) == len(sampler) and len(labels) - size < len(rows) <= len(labels)
    for batch in rows.reshape(-1, size):
        found, of = np.unique(labels[batch], return_counts=True)
        assert len(found) == identities and (of == m).all()
        for identity in found:
            own = batch[labels[batch] == identity]
            assert len(np.unique(own)) == m or counts[identity] < m  # twice only where there are too few


def test_the_order_hangs_on_seed_and_epoch_alone():
    draws = Draws(seed=42)
    sampler = IdentitySampler(LABELS, 2, 4, draws)
    before = np.random.get_state()[1].copy()
    first, again = list(sampler), list(sampler)
    draws.set_epoch(1)
    second = list(sampler)
    assert first == again and np.array_equal(np.random.get_state()[1], before)
    assert first != second and first != list(IdentitySampler(LABELS, 2, 4, Draws(seed=43)))
    later = Draws(seed=42)
    later.set_epoch(1)
    assert list(IdentitySampler(LABELS, 2, 4, later)) == second  # as a resumed run has it


@pytest.mark.parametrize(
    ("m", "batch_size", "message"),
    [
        (0, 4, "no number of images"),
        (True, 4, "no number of images"),
        (3, 4, "a batch of 4 images does not hold whole identities"),
        (2, 14, "needs 7 identities.*got '6 identities, 30 images"),
        (8, 32, "needs 4 identities.*got '6 identities, 30 images"),
    ],
)
def test_batches_that_cannot_be_filled_are_refused(m, batch_size, message):
    with pytest.raises(ConfigError, match=message):
        IdentitySampler(LABELS, m, batch_size, Draws(seed=0))
