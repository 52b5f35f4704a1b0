# SPDX-License-Identifier: Apache-2.0
"""Mean and standard deviation of every class's image embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_robust.errors import DataError, NonFiniteError
from hf_robust.ogen.prototypes import Prototypes, class_prototypes
from tests.training.test_trainer_ranks import run_on_two_ranks

NAMES = ["lynx", "otter", "heron"]
LABELS = torch.tensor([0, 1, 2, 2, 1, 0, 0, 2, 1, 1, 0, 0, 2])


def embeds(mean: float = 0.3, std: float = 1.0, seed: int = 0, dim: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn(len(LABELS), dim, generator=generator)


def batches(embeds: Tensor, labels: Tensor, size: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    """An iterator, which can be passed through once only."""
    return zip(embeds.split(size), labels.split(size), strict=True)


def check(found: Prototypes, embeds: Tensor, labels: Tensor, rtol: float = 1e-6, atol: float = 1e-6) -> None:
    rows = embeds.double().numpy()
    for index in range(len(NAMES)):
        own = rows[labels.numpy() == index]
        np.testing.assert_allclose(found.mean[index].numpy(), own.mean(axis=0), rtol=rtol, atol=atol)
        np.testing.assert_allclose(found.std[index].numpy(), own.std(axis=0, ddof=0), rtol=rtol, atol=atol)
        assert found.counts[index] == len(own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_they_are_mean_population_standard_deviation_and_count_in_float32(dtype: torch.dtype) -> None:
    rows = embeds().to(dtype)
    found = class_prototypes(batches(rows, LABELS), NAMES)
    assert found.mean.shape == found.std.shape == (3, 5) and found.counts.shape == (3,)
    assert found.mean.dtype == found.std.dtype == torch.float32
    check(found, rows, LABELS)


def test_they_cannot_be_changed_by_accident() -> None:
    found = class_prototypes(batches(embeds(), LABELS), NAMES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.mean = found.std


@settings(max_examples=40)
@given(order=st.permutations(range(len(LABELS))), cuts=st.sets(st.integers(1, len(LABELS) - 1)))
def test_neither_the_order_nor_the_batches_matter(order: list[int], cuts: set[int]) -> None:
    rows = embeds()
    parts = torch.tensor(order).tensor_split(sorted(cuts))
    found = class_prototypes([(rows[part], LABELS[part]) for part in parts], NAMES)
    check(found, rows, LABELS)


def test_a_spread_far_smaller_than_the_mean_is_found() -> None:
    """Sums of squares in float32 would hold nothing of it."""
    rows = embeds(mean=1.0, std=1e-4)
    check(class_prototypes(batches(rows, LABELS), NAMES), rows, LABELS, rtol=1e-6, atol=0)


def test_many_images_of_one_class_lose_nothing() -> None:
    labels = torch.cat([torch.zeros(20_000, dtype=torch.long), LABELS])
    rows = torch.cat([1.0 + 1e-3 * torch.randn(20_000, 5), embeds()])
    check(class_prototypes(batches(rows, labels, size=512), NAMES), rows, labels, rtol=1e-6, atol=1e-9)


def test_a_class_of_one_image_or_of_equal_images_has_no_spread() -> None:
    rows = torch.nn.functional.normalize(torch.randn(3, 512, dtype=torch.float64), dim=-1)
    labels = torch.tensor([0] + [1] * 7 + [2] * 3)
    found = class_prototypes([(rows[labels], labels)], NAMES)
    torch.testing.assert_close(found.mean, rows.float(), rtol=1e-6, atol=1e-8)
    assert found.std.min() >= 0 and found.std.max() <= 1e-7  # a NaN would fail both
    assert found.counts.tolist() == [1, 7, 3]


def test_they_take_no_part_in_autograd() -> None:
    found = class_prototypes(batches(embeds().requires_grad_(), LABELS), NAMES)
    assert not found.mean.requires_grad and not found.std.requires_grad


def test_a_class_without_image_is_named() -> None:
    kept = LABELS != 1
    with pytest.raises(DataError, match="otter"):
        class_prototypes(batches(embeds()[kept], LABELS[kept]), NAMES)


def test_a_last_class_without_image_is_named() -> None:
    with pytest.raises(DataError, match="ibis"):
        class_prototypes(batches(embeds(), LABELS), [*NAMES, "ibis"])


def test_no_image_at_all_is_a_data_error() -> None:
    with pytest.raises(DataError):
        class_prototypes([], NAMES)


def test_a_mean_of_zero_is_named() -> None:
    rows = torch.ones(4, 5)
    rows[2:] = torch.tensor([[1.0], [-1.0]])
    with pytest.raises(DataError, match="otter"):
        class_prototypes([(rows, torch.tensor([0, 0, 1, 1]))], NAMES[:2])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_embeddings_that_are_not_finite_are_refused(value: float) -> None:
    rows = embeds()
    rows[8, 3] = value
    with pytest.raises(NonFiniteError):
        class_prototypes(batches(rows, LABELS), NAMES)


TWO_RANKS = """
import os

import torch
import torch.distributed as dist

from hf_robust.errors import DataError, NonFiniteError
from hf_robust.ogen.prototypes import class_prototypes
from tests.ogen.test_prototypes import LABELS, NAMES, batches, embeds

def main(folder):
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    kept = LABELS != 1
    result = {}
    for name, mean, std in (("plain", 0.3, 1.0), ("hard", 1.0, 1e-4)):
        rows, labels = embeds(mean, std), LABELS
        order = labels.argsort(stable=True)  # the first rank holds all of class 0, the second all of class 2
        share = order[:7] if rank == 0 else order[7:]
        found = class_prototypes(batches(rows[share], labels[share], size=2), NAMES)
        result[name] = {"mean": found.mean, "std": found.std, "counts": found.counts}

    half = slice(0, 6) if rank == 0 else slice(6, None)
    for name, error, rows, labels in (
        ("absent", DataError, embeds()[kept][half], LABELS[kept][half]),
        ("not finite", NonFiniteError, embeds()[half] * (torch.nan if rank == 1 else 1.0), LABELS[half]),
    ):
        try:
            class_prototypes(batches(rows, labels), NAMES)
        except error as caught:
            result[name] = str(caught)
    torch.save(result, f"{folder}/rank{rank}.pt")
"""


def test_two_ranks_with_uneven_shares_get_what_one_gets(tmp_path: Path) -> None:
    """Also the errors reach both ranks, else one would wait for the other for ever."""
    first, second = run_on_two_ranks(TWO_RANKS, tmp_path)
    for name, rows in (("plain", embeds()), ("hard", embeds(1.0, 1e-4))):
        assert all(torch.equal(first[name][key], second[name][key]) for key in ("mean", "std", "counts"))
        one = class_prototypes(batches(rows, LABELS), NAMES)
        for key in ("mean", "std"):
            torch.testing.assert_close(first[name][key], getattr(one, key), rtol=1e-6, atol=1e-9)
        assert torch.equal(first[name]["counts"], one.counts)
        check(Prototypes(**first[name]), rows, LABELS)
    assert "otter" in first["absent"] and "otter" in second["absent"]
    assert first["not finite"] and second["not finite"]
