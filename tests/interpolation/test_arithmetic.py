# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_robust.errors import ConfigError, NonFiniteError
from hf_robust.interpolation.arithmetic import (
    check_alpha,
    check_finite,
    interpolate_,
    interpolate_tensor,
    is_finite,
    mean_,
    mean_tensor,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
alphas = st.floats(0, 1)
inner_alphas = st.floats(0, 1, exclude_min=True, exclude_max=True)
positive = st.floats(0, 1e6)


@st.composite
def tensors(draw, n=2, dtypes=DTYPES):
    """`n` vectors of one dtype and length, of any finite values."""
    dtype = draw(st.sampled_from(dtypes))
    width = {torch.float16: 16, torch.float64: 64}.get(dtype, 32)
    limit = float(np.finfo(f"float{width}").max) if width < 64 else 1e300
    if dtype == torch.bfloat16:
        limit = torch.finfo(dtype).max
    values = st.floats(-limit, limit, width=width, allow_nan=False)
    length = draw(st.integers(1, 5))
    rows = [draw(st.lists(values, min_size=length, max_size=length)) for _ in range(n)]
    return [torch.tensor(row, dtype=torch.float64).to(dtype) for row in rows]


def bits(tensor):
    return tensor.numpy(force=True).tobytes() if tensor.dtype != torch.bfloat16 else tensor.view(torch.int16).tolist()


def ulp(value, dtype):
    """Distance between the numbers of `dtype` around `value`."""
    limits = torch.finfo(dtype)
    exponent = math.frexp(max(abs(float(value)), limits.tiny))[1] - 1
    return Fraction(limits.eps) * Fraction(2) ** exponent


@given(tensors(dtypes=[*DTYPES, torch.float64]))
def test_ends_are_the_models_themselves(pair):
    assert bits(interpolate_tensor(*pair, 0.0)) == bits(pair[0])
    assert bits(interpolate_tensor(*pair, 1.0)) == bits(pair[1])


@given(tensors(n=1, dtypes=[*DTYPES, torch.float64]), alphas, positive, positive)
@example([torch.tensor([-0.0, 0.0, 1 / 3])], 0.3, 1.0, 2.0)
def test_equal_values_stay_bit_for_bit(one, alpha, first_fisher, second_fisher):
    fishers = tuple(torch.full(one[0].shape, value) for value in (first_fisher, second_fisher))
    assert bits(interpolate_tensor(one[0], one[0].clone(), alpha)) == bits(one[0])
    assert bits(interpolate_tensor(one[0], one[0].clone(), alpha, fishers)) == bits(one[0])


@given(tensors(), st.floats(0.5, 1))
def test_exchanging_the_models_and_the_shares_changes_nothing(pair, alpha):
    forth = interpolate_tensor(*pair, alpha)
    back = interpolate_tensor(*reversed(pair), 1 - alpha)
    assert torch.equal(forth, back)


@settings(max_examples=200)
@given(tensors(), alphas)
@example([torch.tensor([1e30]), torch.tensor([1.0])], 1 - 2**-53)
@example([torch.tensor([60000.0], dtype=torch.float16), torch.tensor([60000.0], dtype=torch.float16)], 0.5)
def test_at_most_one_ulp_from_the_exact_mean(pair, alpha):
    merged = interpolate_tensor(*pair, alpha)
    assert merged.dtype == pair[0].dtype
    for first, second, got in zip(*(tensor.double().tolist() for tensor in (*pair, merged)), strict=True):
        exact = (1 - Fraction(alpha)) * Fraction(first) + Fraction(alpha) * Fraction(second)
        cancelled = Fraction(2) ** -51 * max(abs(Fraction(first)), abs(Fraction(second)))  # what float64 cannot hold
        assert abs(Fraction(got) - exact) <= ulp(exact, merged.dtype) + cancelled


def test_the_official_formula():
    first, second = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for alpha in (0.1, 0.5, 0.9):
        expected = (1 - alpha) * first + alpha * second
        torch.testing.assert_close(interpolate_tensor(first, second, alpha), expected, rtol=1e-14, atol=1e-14)


@given(inner_alphas)
def test_the_official_formula_with_fisher_information(alpha):
    first, second = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fishers = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).square()
    fishers[0, 0], fishers[1, 0], fishers[:, 1] = 0.0, 2.0, 0.0  # the floor
    first_fisher, second_fisher = (fisher.maximum(torch.tensor(1e-8, dtype=torch.float64)) for fisher in fishers)
    above = (1 - alpha) * first_fisher * first + alpha * second_fisher * second
    expected = above / ((1 - alpha) * first_fisher + alpha * second_fisher)
    merged = interpolate_tensor(first, second, alpha, (fishers[0], fishers[1]))
    torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)
    plain = interpolate_tensor(first[1], second[1], alpha)
    torch.testing.assert_close(merged[1], plain, rtol=1e-12, atol=1e-12)  # weights that are equal
    interpolate_tensor(first, second, alpha, (fishers[0], fishers[1]))
    assert fishers[0, 0, 0] == 0  # the caller's tensors stay


@given(tensors(n=3))
def test_a_mean_of_several_is_at_most_one_ulp_from_the_exact_one(several):
    merged = mean_tensor(tensor for tensor in several)
    assert merged.dtype == several[0].dtype
    for *values, got in zip(*(tensor.double().tolist() for tensor in (*several, merged)), strict=True):
        exact = sum(map(Fraction, values)) / 3
        cancelled = Fraction(2) ** -50 * max(abs(Fraction(value)) for value in values)  # what float64 cannot hold
        assert abs(Fraction(got) - exact) <= ulp(exact, merged.dtype) + cancelled


@given(tensors(dtypes=[*DTYPES, torch.float64]), st.integers(1, 7))
@example([torch.tensor([-0.0, 0.0, 1 / 3]), torch.tensor([0.0, -0.0, 0.0])], 3)
def test_a_mean_of_equal_ones_and_of_two(pair, count):
    assert bits(mean_tensor([pair[0]] * count)) == bits(pair[0])
    assert bits(mean_tensor(pair)) == bits(interpolate_tensor(*pair, 0.5))


def test_a_mean_leaves_its_tensors_alone_and_in_place_takes_no_memory():
    parameters = [torch.nn.Parameter(torch.full((3,), value).double()) for value in (1.0, 2.0, 6.0)]
    merged = mean_tensor(parameters)
    assert merged.tolist() == [3, 3, 3] and not merged.requires_grad
    assert [parameter[0].item() for parameter in parameters] == [1, 2, 6]
    first = torch.ones(3).double()
    assert mean_(first, [torch.zeros(3).double()]) is first


def test_inputs_and_gradients_are_left_alone():
    first, second = torch.nn.Parameter(torch.ones(3).double()), torch.nn.Parameter(torch.zeros(3).double())
    for alpha in (0, 0.25, 1):
        merged = interpolate_tensor(first, second, alpha)
        assert torch.equal(merged, torch.full((3,), 1.0 - alpha).double()) and not merged.requires_grad
        merged.zero_()
        assert torch.equal(first, torch.ones(3).double()) and torch.equal(second, torch.zeros(3).double())


def test_in_place_uses_no_memory_but_that_given():
    pair = [torch.ones(3).double(), torch.zeros(3).double()]
    assert interpolate_(*pair, 0.25).data_ptr() in [tensor.data_ptr() for tensor in pair]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.uint8])
def test_integers_are_not_averaged(dtype):
    first, second = torch.tensor([0, 0, 1]).to(dtype), torch.tensor([1, 1, 1]).to(dtype)
    assert torch.equal(interpolate_tensor(first, second, 0.0), first)
    for alpha in (0.1, 0.5, 1.0):
        assert torch.equal(interpolate_tensor(first, second, alpha), second)


@pytest.mark.parametrize("alpha", [-1e-9, 1.0000001, float("nan"), float("inf"), "0.5", None, True, [0.5]])
def test_alpha_is_a_fraction(alpha):
    with pytest.raises(ConfigError, match=r"alpha.*allowed a number in \[0, 1\]"):
        check_alpha(alpha)


def test_alpha_is_given_back_as_a_float():
    assert [check_alpha(alpha) for alpha in (0, 0.5, 1)] == [0.0, 0.5, 1.0]
    assert type(check_alpha(1)) is float


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_counted(dtype, bad):
    tensor = torch.zeros(1000, dtype=dtype)
    check_finite(tensor, "w")
    assert is_finite(tensor) and is_finite(tensor[:0])
    tensor[[7, 993]] = bad
    assert not is_finite(tensor)
    with pytest.raises(NonFiniteError, match=r"NaN or infinity \(at w\): got '2 of 1000 values'"):
        check_finite(tensor, "w")
    check_finite(torch.tensor([1, 2]), "integers")
