# SPDX-License-Identifier: Apache-2.0
"""The numbers in the examples of formulas."""

from __future__ import annotations

import doctest

import pytest
import torch

from hf_robust.losses.context import context_divergence
from hf_robust.losses.divergence import divergence
from hf_robust.losses.features import feature_distance
from hf_robust.losses.lipsum import lipsum_penalty
from hf_robust.losses.reference import Moved
from hf_robust.losses.spuriosity import spuriosity_divergence, surrounded
from hf_robust.losses.weights import squared_distance

FORMULAS = context_divergence, divergence, feature_distance, lipsum_penalty, spuriosity_divergence, squared_distance


@pytest.mark.parametrize("function", [*FORMULAS, surrounded], ids=lambda function: function.__name__)
def test_an_example_is_what_comes_out(function):
    names = {"torch": torch, "Moved": Moved, function.__name__: function}
    (example,) = doctest.DocTestFinder(recurse=False).find(function, function.__name__, globs=names)
    assert doctest.DocTestRunner().run(example) == (0, len(example.examples)) and example.examples
