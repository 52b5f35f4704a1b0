# SPDX-License-Identifier: Apache-2.0
"""How errors show values and text of any size and content."""

from __future__ import annotations

import pickle
import time
import tracemalloc
from collections import OrderedDict, deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel
from transformers import IntervalStrategy

from hf_robust.errors import ConfigError, DataError, close_matches
from hf_robust.shown import printable, shown

SHORT = [
    *(None, True, 1.5, -3, "cat", "it's", "ü 犬", b"cat", [], (), {}, [1, "a", None], {"a": [1, (2,)], 3: "b"}),
    *(Path("a/b"), int, range(3), torch.float32, IntervalStrategy.NO),
]


@pytest.mark.parametrize("value", SHORT, ids=repr)
def test_short_values_are_shown_as_they_are(value):
    assert shown(value) == repr(value)


def nested(kind, depth):
    value = kind()
    for _ in range(depth):
        value = kind([value])
    return value


def bomb():
    value = ["x"] * 10
    for _ in range(30):
        value = [value] * 10
    return value


@dataclass
class Row:
    image: object
    label: int


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError("no")


LARGE = {
    "list": (lambda: [0] * 10**7, "[0, 0, 0, 0"),
    "tuple": (lambda: (0,) * 10**7, "(0, 0, 0, 0"),
    "deque": (lambda: deque([0] * 10**6), "[0, 0, 0, 0"),
    "set": (lambda: set(range(10**6)), "{0, 1, 2, 3"),
    "dict": (lambda: dict.fromkeys(range(10**6)), "{0: None, 1: None"),
    "subclass": (lambda: OrderedDict.fromkeys(range(10**6)), "{0: None, 1: None"),
    "text": (lambda: "x" * 10**8, "'xxx"),
    "hidden text": (lambda: [{"a": "x" * 10**8}], "[{'a': 'xxx"),
    "bytes": (lambda: b"x" * 10**8, "b'xxx"),
    "integer": (lambda: 1 << 10**7, "an integer of 10000001 bits"),
    "lists in lists": (lambda: nested(list, 100_000), "[[[["),
    "bomb": (bomb, "[[["),
    "tensor": (lambda: torch.zeros(1000, 1000), "Tensor of shape (1000, 1000) and torch.float32"),
    "array": (lambda: np.zeros((1000, 1000)), "ndarray of shape (1000, 1000) and float64"),
    "dataclass": (lambda: Row([0] * 10**7, 3), "Row(image=[0, 0, 0"),
    "feature": (lambda: ClassLabel(names=[f"class {index}" for index in range(10**5)]), "ClassLabel("),
    "broken": (Broken, "an object of Broken"),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_values_cost_nothing(name):
    make, beginning = LARGE[name]
    value = make()
    tracemalloc.start()
    start = time.perf_counter()
    error = DataError("wrong", got=value)
    copy = pickle.loads(pickle.dumps(error))
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 1 and peak < 2**20, (seconds, peak)
    assert str(error).startswith(f"wrong: got {beginning}") and len(str(error)) <= len("wrong: got ") + 80
    assert str(copy) == str(error) == str(pickle.loads(pickle.dumps(copy)))


def test_small_tensors_and_sets_are_shown_in_one_line_and_one_order():
    assert shown(torch.tensor([[1, 2], [3, 4]])) == "tensor([[1, 2], [3, 4]])"
    assert shown({"c", "a", "b"}) == shown(frozenset("abc")) == "{'a', 'b', 'c'}"


def test_long_text_keeps_both_ends():
    text = shown("/home/me/" + "x" * 200 + "/model.safetensors")
    assert len(text) == 80 and text.startswith("'/home/me/xxx") and text.endswith("xxx/model.safetensors'")


HOSTILE = "\x1b[2J\x07\r\n\u202egnp.exe\u2066\ud800"
ESCAPED = r"\x1b[2J\x07\r\n\u202egnp.exe\u2066\ud800"


@pytest.mark.parametrize("part", ["what", "where", "got", "allowed", "remedy"])
@pytest.mark.parametrize("wrap", [str, lambda text: [text], lambda text: {1: text}])
def test_no_part_of_a_message_reaches_the_terminal_raw(part, wrap):
    parts = {"what": "wrong", part: wrap(HOSTILE) if part == "got" else HOSTILE}
    message = str(ConfigError(parts.pop("what"), **parts))
    assert (ESCAPED if part == "got" else ESCAPED.replace(r"\r\n", "  ")) in message and message.isprintable()
    message.encode()


@pytest.mark.parametrize("part", ["what", "where", "allowed", "remedy"])
def test_no_part_of_a_message_is_long(part):
    parts = {"what": "wrong", part: "x" * 10**7}
    error = ConfigError(parts.pop("what"), **parts)
    assert len(str(error)) < 520 and len(pickle.dumps(error)) < 1000
    assert len(str(ConfigError("\x00" * 1000))) <= 500


def test_printable_text_is_not_changed():
    text = "Größe 犬, “it's” — …"
    assert printable(text, 80) == text and printable(printable(HOSTILE, 80), 80) == printable(HOSTILE, 80)


def test_an_error_with_a_value_that_has_no_pickle_has_one():
    error = DataError("wrong", got=[lambda: None])
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_names_of_any_length_are_compared_in_no_time():
    start = time.perf_counter()
    remedy = close_matches("x" * 10**6, ["y" * 10**6] * 10 + [f"class {index}" for index in range(100_000)])
    assert time.perf_counter() - start < 5 and len(remedy) < 500
