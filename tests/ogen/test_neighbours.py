# SPDX-License-Identifier: Apache-2.0
"""Which classes OGEN takes for similar."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_robust.errors import ConfigError, DataError
from hf_robust.ogen.neighbours import nearest_base_classes, nearest_new_classes

small_integers = st.integers(-3, 3)


def best(scores: dict[int, float], k: int) -> list[int]:
    return sorted(scores, key=lambda index: (-scores[index], index))[:k]


def nearest_base_by_hand(mean: Tensor, k: int) -> list[list[int]]:
    rows = mean.tolist()
    found = []
    for own, row in enumerate(rows):
        dots = {i: sum(a * b for a, b in zip(row, other, strict=True)) for i, other in enumerate(rows) if i != own}
        found.append(best(dots, k))
    return found


def nearest_new_by_hand(base: Tensor, new: Tensor, k: int) -> list[list[int]]:
    found = []
    for row in base:
        found.append(best({i: (row @ other / row.norm() / other.norm()).item() for i, other in enumerate(new)}, k))
    return found


def test_a_long_prototype_wins_by_dot_product_though_not_by_cosine() -> None:
    mean = torch.tensor([[1.0, 0.0], [0.9, 0.1], [3.0, 3.0]])
    assert nearest_base_classes(mean, 1).tolist() == [[2], [2], [0]]
    assert nearest_base_classes(mean, 2).tolist() == [[2, 1], [2, 0], [0, 1]]


def test_a_long_embedding_does_not_win_among_new_classes() -> None:
    base = torch.tensor([[2.0, 0.0], [0.0, 0.5]])
    new = torch.tensor([[9.0, 9.0], [0.9, 0.1], [-9.0, 0.0]])
    assert nearest_new_classes(base, new, 3).tolist() == [[1, 0, 2], [0, 1, 2]]


def test_a_class_is_not_its_own_neighbour_even_if_all_others_are_opposite() -> None:
    mean = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-2.0, 0.0]])
    assert nearest_base_classes(mean, 2).tolist() == [[1, 2], [2, 0], [1, 0]]


def test_a_new_class_with_the_index_of_the_base_class_is_not_left_out() -> None:
    assert nearest_new_classes(torch.eye(3), torch.eye(3), 1).tolist() == [[0], [1], [2]]


@pytest.mark.parametrize("k", [1, 3, 19])
def test_base_neighbours_are_those_of_a_loop(k: int) -> None:
    mean = torch.randn(20, 6, dtype=torch.float64)
    found = nearest_base_classes(mean, k)
    assert found.dtype == torch.long and found.shape == (20, k)
    assert found.tolist() == nearest_base_by_hand(mean, k)


@pytest.mark.parametrize("k", [1, 3, 15])
def test_new_neighbours_are_those_of_a_loop(k: int) -> None:
    base, new = torch.randn(20, 6, dtype=torch.float64), torch.randn(15, 6, dtype=torch.float64)
    new *= torch.logspace(-2, 2, 15, dtype=torch.float64)[:, None]
    found = nearest_new_classes(base, new, k)
    assert found.dtype == torch.long and found.shape == (20, k)
    assert found.tolist() == nearest_new_by_hand(base, new, k)


def test_all_equal_base_classes_come_in_order() -> None:
    found = nearest_base_classes(torch.ones(40, 2), 5)
    assert found[0].tolist() == [1, 2, 3, 4, 5] and found[2].tolist() == [0, 1, 3, 4, 5]
    assert (found[5:] == torch.arange(5)).all()


def test_all_equal_new_classes_come_in_order() -> None:
    new = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(20, 1)  # odd ones resemble the base class
    assert nearest_new_classes(torch.tensor([[1.0, 0.0]]), new, 5).tolist() == [[1, 3, 5, 7, 9]]


@settings(max_examples=60)
@given(
    rows=st.lists(st.tuples(small_integers, small_integers, small_integers), min_size=2, max_size=30), data=st.data()
)
def test_ties_go_to_the_lower_index(rows: list[tuple[int, ...]], data: st.DataObject) -> None:
    """Dot products of small integers are exact, so equal ones are equal."""
    mean = torch.tensor(rows, dtype=torch.float32)
    k = data.draw(st.integers(1, len(rows) - 1))
    assert nearest_base_classes(mean, k).tolist() == nearest_base_by_hand(mean, k)


def test_embeddings_with_gradients_are_taken() -> None:
    mean, new = torch.randn(4, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    assert nearest_base_classes(mean, 2).shape == nearest_new_classes(mean, new, 2).shape == (4, 2)


def test_too_few_base_classes_are_refused_with_both_numbers() -> None:
    with pytest.raises((ConfigError, DataError)) as caught:
        nearest_base_classes(torch.randn(7, 4), 7)
    assert "7" in str(caught.value) and "8" in str(caught.value)  # has 7, needs k + 1
    assert nearest_base_classes(torch.randn(7, 4), 6).shape == (7, 6)


def test_too_few_new_classes_are_refused_with_both_numbers() -> None:
    with pytest.raises((ConfigError, DataError)) as caught:
        nearest_new_classes(torch.randn(9, 4), torch.randn(5, 4), 6)
    assert "5" in str(caught.value) and "6" in str(caught.value)
    assert nearest_new_classes(torch.randn(9, 4), torch.randn(5, 4), 5).shape == (9, 5)
