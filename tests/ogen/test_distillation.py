# SPDX-License-Identifier: Apache-2.0
"""The local mean teacher: its window over time and its averages."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_robust.ogen.distillation import LocalMeanTeacher, distillation_loss, window_size

both_averages = pytest.mark.parametrize("average", ["ema", "mean"])
windows = st.tuples(st.integers(1, 20), st.integers(0, 20)).map(lambda pair: (pair[0] + pair[1], pair[0]))


def teacher(average: str = "mean", largest: int = 9, smallest: int = 2, decay: float = 0.9) -> LocalMeanTeacher:
    return LocalMeanTeacher(largest=largest, smallest=smallest, average=average, decay=decay)


def epoch_tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"context": (4, 3), "generator.attention.in_proj_weight": (2, 5), "scale": ()}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def averaged(kept: list[dict[str, Tensor]], average: str, decay: float) -> dict[str, Tensor]:
    """By hand in float64, the oldest first."""
    result = {}
    for name in kept[0]:
        values = [tensors[name].double() for tensors in kept]
        if average == "mean":
            result[name] = sum(values) / len(values)
        else:
            result[name] = values[0]
            for value in values[1:]:
                result[name] = decay * result[name] + (1 - decay) * value
    return result


def check(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert set(found) == set(expected)
    for name in expected:
        assert found[name].shape == expected[name].shape
        torch.testing.assert_close(found[name].double(), expected[name].double(), rtol=0, atol=tolerance)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_window_of_ten_epochs_is_that_of_the_paper() -> None:
    assert [window_size(t, 10) for t in range(11)] == [2, 2, 2, 3, 4, 5, 6, 7, 8, 8, 9]


def test_the_window_is_the_formula() -> None:
    for epochs in (1, 3, 7, 50, 200):
        for t in range(epochs + 1):
            expected = math.floor((1 + math.cos((epochs + t) / epochs * math.pi)) * 0.5 * (9 - 2) + 2)
            assert window_size(t, epochs) == expected


def test_a_window_that_is_a_whole_number_does_not_lose_one_to_rounding() -> None:
    assert [window_size(t, 2, largest=6, smallest=2) for t in range(3)] == [2, 4, 6]
    assert [window_size(t, 6, largest=10, smallest=2) for t in (2, 3, 4)] == [4, 6, 8]  # cos 60 degrees is 1 / 2


@settings(max_examples=200)
@given(epochs=st.integers(1, 300), window=windows)
def test_the_window_grows_from_the_smallest_to_the_largest(epochs: int, window: tuple[int, int]) -> None:
    largest, smallest = window
    sizes = [window_size(t, epochs, largest, smallest) for t in range(epochs + 1)]
    assert all(isinstance(size, int) for size in sizes)
    assert sizes[0] == smallest and sizes[-1] == largest
    assert sizes == sorted(sizes)


@both_averages
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_the_average_is_that_by_hand(average: str, decay: float) -> None:
    kept = [epoch_tensors(seed) for seed in range(6)]
    local = teacher(average, decay=decay)
    for count, tensors in enumerate(kept, start=1):
        local.keep(tensors)
        assert len(local) == count
    check(local.average(10, 10), averaged(kept, average, decay))


@both_averages
def test_only_the_window_of_the_epoch_is_averaged_or_what_there_is_of_it(average: str) -> None:
    local, kept = teacher(average), []
    for epoch, size in enumerate([2, 2, 2, 3, 4, 5, 6, 7, 8, 8, 9]):
        kept.append(epoch_tensors(epoch))
        local.keep(kept[-1])
        check(local.average(epoch, 10), averaged(kept[-size:], average, 0.9))
    check(local.average(0, 10), averaged(kept[-2:], average, 0.9))  # a full buffer, a small window


def test_the_window_is_the_teachers_own() -> None:
    local, kept = teacher(largest=5, smallest=1), [epoch_tensors(seed) for seed in range(5)]
    for tensors in kept:
        local.keep(tensors)
    for epoch, size in ((0, 1), (5, 3), (10, 5)):
        check(local.average(epoch, 10), averaged(kept[-size:], "mean", 0.9))


@both_averages
def test_the_oldest_are_forgotten(average: str) -> None:
    local, kept = teacher(average, largest=3, smallest=1), [epoch_tensors(seed) for seed in range(5)]
    for tensors in kept:
        local.keep(tensors)
    assert len(local) == 3
    check(local.average(10, 10), averaged(kept[-3:], average, 0.9))


def test_what_is_kept_is_a_copy() -> None:
    local, tensors = teacher(), {"context": torch.ones(3), "scale": torch.tensor(1.0)}
    local.keep(tensors)
    for tensor in tensors.values():
        tensor.add_(1)
    local.keep(tensors)
    del tensors["scale"]
    check(local.average(10, 10), {"context": torch.full((3,), 1.5), "scale": torch.tensor(1.5)})


def test_parameters_are_kept_without_gradient() -> None:
    local, parameter = teacher(), torch.nn.Parameter(torch.ones(2))
    local.keep({"context": parameter})
    local.keep({"context": parameter * 2})
    assert not local.average(10, 10)["context"].requires_grad
    assert not any(tensor.requires_grad for tensor in local.state_dict().values())


@both_averages
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_stay(average: str, dtype: torch.dtype) -> None:
    local, kept = teacher(average), [epoch_tensors(seed, dtype) for seed in range(4)]
    for tensors in kept:
        local.keep(tensors)
    found = local.average(10, 10)
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    check(found, averaged(kept, average, 0.9), tolerance)


def test_bfloat16_is_averaged_in_float32() -> None:
    """bfloat16 rounds 256 + 1 to 256, and (1 + 2^-8) to 1; float32 holds both."""
    step = 2**-7
    for average, values, expected in (("mean", (256.0, 1.0, 1.0), 86.0), ("ema", (1.0, 1 + step, 1 + step), 1 + step)):
        local = teacher(average, decay=0.5)
        for value in values:
            local.keep({"context": torch.tensor([value], dtype=torch.bfloat16)})
        assert local.average(10, 10)["context"].tolist() == [expected]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", [0.1, 0.9])
def test_no_step_of_the_moving_average_is_rounded_to_the_dtype_of_the_tensors(
    decay: float, dtype: torch.dtype
) -> None:
    local, kept = teacher("ema", decay=decay), [torch.randn(1000).to(dtype) for _ in range(3)]
    for tensor in kept:
        local.keep({"context": tensor})
    expected = kept[0].float()
    for tensor in kept[1:]:
        expected = decay * expected + (1 - decay) * tensor.float()
    assert torch.equal(local.average(10, 10)["context"], expected.to(dtype))


@both_averages
def test_state_goes_through_a_file_and_training_goes_on_as_if_nothing_had_happened(
    average: str, tmp_path: Path
) -> None:
    """With twelve epochs, so that an order of "10" before "9" shows."""
    local, loaded = teacher(average, largest=12), teacher(average, largest=12)
    for seed in range(15):
        local.keep(epoch_tensors(seed))
    state = local.state_dict()
    assert set(state) == {f"{index}.{name}" for index in range(12) for name in epoch_tensors(0)}
    save_file(state, tmp_path / "teacher.safetensors")
    loaded.keep(epoch_tensors(99))  # replaced
    loaded.load_state_dict(load_file(tmp_path / "teacher.safetensors"))
    assert len(loaded) == 12
    for epoch in range(11):
        assert same(loaded.average(epoch, 10), local.average(epoch, 10))
    for seed in range(20, 25):
        local.keep(epoch_tensors(seed))
        loaded.keep(epoch_tensors(seed))
        assert len(loaded) == 12
        assert same(loaded.average(10, 10), local.average(10, 10))


def test_an_empty_teacher_has_an_empty_state() -> None:
    local = teacher()
    assert len(local) == 0 and local.state_dict() == {}
    local.keep(epoch_tensors(0))
    local.load_state_dict({})
    assert len(local) == 0


def test_distillation_is_the_mean_squared_error_of_the_probabilities() -> None:
    student = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    teacher_logits = torch.randn(3, 5, dtype=torch.float64)
    total = 0.0
    for s, t in zip(student.tolist(), teacher_logits.tolist(), strict=True):
        p, q = ([math.exp(x) / math.fsum(map(math.exp, row)) for x in row] for row in (s, t))
        total += math.fsum((a - b) ** 2 for a, b in zip(p, q, strict=True))
    found = distillation_loss(student, teacher_logits)
    assert found.shape == () and found.item() == pytest.approx(total / 15, rel=1e-12)
    found.backward()
    assert student.grad.any()
    assert distillation_loss(student, student.detach()).item() == 0
