# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_robust.data.class_spaces import ClassSpace, class_space
from hf_robust.errors import DataError

WORDS = ["hot dog", "tea", "pie"]
RELATIONS = {
    "same": (["hot dog", "tea", "pie"], "same", [0, 1, 2]),
    "spelled otherwise": (["Hot_Dog ", "TEA", "pie"], "same", [0, 1, 2]),
    "reordered": (["pie", "hot_dog", "tea"], "reordered", [2, 0, 1]),
    "subset": (["pie", "hot_dog"], "subset", [2, 0, 1]),
    "first of them": (["hot_dog"], "subset", [0, 1, 2]),
    "more": (["hot_dog", "tea", "pie", "cake"], "foreign", None),
    "others": (["cat", "dog"], "foreign", None),
    "one twice": (["tea", "Tea"], "foreign", None),
}


@pytest.mark.parametrize("case", RELATIONS)
def test_relations(case):
    names, kind, order = RELATIONS[case]
    relation = ClassSpace(WORDS).relate(names)
    assert (relation.kind, relation.order) == (kind, order)
    if order is not None:
        assert relation.words == [WORDS[index] for index in order]


def test_classes_are_known_by_the_names_of_the_data_too():
    space = ClassSpace(["tench", "goldfish", "shark"], ["n01", "n02", "n03"])
    assert space.relate(["n03", "n01"]).words == ["shark", "tench", "goldfish"]
    assert space.relate(["goldfish", "n01", "shark"]).kind == "reordered"
    assert space.relate(["n02", "n_04"]).words == ["goldfish", "n 04"]


def test_words_and_names_of_the_data_are_not_taken_for_each_other():
    """A word may be what the data call another class."""
    space = ClassSpace(["right", "left", "up"], ["left", "right", "up"])
    assert space.relate(["left", "right", "up"]).kind == "same"
    cranes = ClassSpace(["crane bird", "crane", "tench"], ["crane", "construction_crane", "tench"])
    assert cranes.relate(["crane", "tench"]).order == [0, 2, 1]
    assert cranes.relate(["crane bird", "crane"]).order == [0, 1, 2]


def test_unicode_is_compared_by_what_it_shows():
    assert ClassSpace(["café", "tea"]).relate(["tea", "cafe\u0301"]).kind == "reordered"


@given(st.permutations(range(5)), st.integers(0, 5))
def test_the_order_takes_every_row_once_and_the_sets_own_first(order, n):
    words = [f"class {index}" for index in range(5)]
    relation = ClassSpace(words).relate([words[index] for index in order[:n]])
    assert relation.order is not None and sorted(relation.order) == list(range(5))
    assert relation.order[:n] == list(order[:n]) and relation.words == [words[index] for index in relation.order]


def test_words_are_the_datas_names_a_list_or_a_mapping():
    assert class_space(["hot_dog", "tea"], None, "class_names").words == ["hot dog", "tea"]
    assert class_space(["n01", "n02"], ["tench", "goldfish"], "class_names").words == ["tench", "goldfish"]
    mapping = {"n02": "goldfish", "n01": "tench", "n03": "shark"}
    assert class_space(["n01", "n02"], mapping, "class_names").words == ["tench", "goldfish"]
    assert class_space(None, ["tench", "goldfish"], "class_names") == ClassSpace(["tench", "goldfish"])
    assert class_space(None, {1: "goldfish", 0: "tench"}, "class_names").words == ["tench", "goldfish"]
    assert class_space(["cat", "dog"], ["cat", "dog", "owl"], "class_names").data_names == ["cat", "dog", "owl"]
    assert class_space(["1", "10", "2"], ["1", "10", "2"], "class_names").words == ["1", "10", "2"]


BAD_NAMES = {
    "none": (None, None, "class names are missing"),
    "repeated": (["hot_dog", "Hot dog"], None, "occurs twice"),
    "another order": (["cat", "dog"], ["dog", "cat"], "another order.*'cat': 'dog', 'dog': 'cat'.*mapping"),
    "another place": (["cat", "dog", "owl"], ["cat", "kite", "dog"], "another order"),
    "numbers as text": (["0", "1", "10", "2"], list("abcd"), "order of text.*'10': 'c', '2': 'd'.*mapping"),
    "numbers in text": (["c1", "c10", "c2"], list("abc"), "order of text"),
    "too few": (["cat", "dog", "owl"], ["tench", "shark"], "2 class_names for the data's 3 classes"),
    "too many": (["n01", "n02"], list("abc"), "3 class_names for the data's 2 classes"),
    "mapping lacks": (["n01", "n02"], {"n01": "tench", "n2": "x"}, "lack a class.*'n02'.*Did you mean 'n2'"),
    "mapping of numbers": (None, {1: "a", 2: "b"}, "lack a class.*'0'"),
    "mapping repeats": (["n01", "n02"], {"n01": "tench", "n02": "Tench"}, "occurs twice"),
}


@pytest.mark.parametrize("case", BAD_NAMES)
def test_names_that_may_be_meant_otherwise_are_refused(case):
    data_names, given_names, message = BAD_NAMES[case]
    with pytest.raises(DataError, match=message):
        class_space(data_names, given_names, "class_names")
