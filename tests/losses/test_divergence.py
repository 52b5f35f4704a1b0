# SPDX-License-Identifier: Apache-2.0
"""The divergence that terms share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn import functional as F

from hf_robust.losses.divergence import divergence

logits = arrays(np.float64, (3, 4), elements=st.floats(-50, 50, width=32))


def test_it_is_that_of_pytorch():
    tuned, reference = 5 * torch.randn(6, 9, dtype=torch.float64), 5 * torch.randn(6, 9, dtype=torch.float64)
    expected = F.kl_div(tuned.log_softmax(-1), reference.softmax(-1), reduction="batchmean")
    assert divergence(tuned, reference).item() == pytest.approx(expected.item(), rel=1e-12)


@settings(max_examples=40)
@given(tuned=logits, reference=logits, constant=st.floats(-9, 9))
def test_it_is_not_negative_and_does_not_see_a_constant(tuned, reference, constant):
    tuned, reference = torch.from_numpy(tuned), torch.from_numpy(reference)
    value = divergence(tuned, reference)
    assert value >= 0 and divergence(tuned + constant, reference).item() == pytest.approx(value.item(), abs=1e-9)


@settings(max_examples=40)
@given(values=logits, masked=arrays(bool, (3, 4)))
def test_equal_logits_give_exactly_zero_and_a_gradient_of_zero(values, masked):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        tuned = torch.from_numpy(values).to(dtype).requires_grad_()
        hidden = tuned.masked_fill(torch.from_numpy(masked), torch.finfo(dtype).min)
        value = divergence(hidden, hidden.detach().clone())
        value.backward()
        assert value.item() == 0 and tuned.grad.count_nonzero() == 0  # NaN counts as nonzero


def test_its_gradient_is_that_of_finite_differences_and_goes_to_the_tuned_alone():
    tuned = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda one: divergence(one, reference.detach()), (tuned,))
    divergence(tuned, reference).backward()
    assert reference.grad is None and tuned.grad.count_nonzero() == tuned.numel()


def test_sums_are_float32_or_better():
    tuned, reference = torch.randn(4, 300).bfloat16(), torch.randn(4, 300).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = divergence(tuned, reference)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(divergence(tuned.double(), reference.double()).item(), rel=1e-4)
