# SPDX-License-Identifier: Apache-2.0
"""OGEN's settings: what is refused, and the released weights."""

from __future__ import annotations

import math

import pytest

from hf_robust.errors import ConfigError, DataError
from hf_robust.ogen.config import OGENConfig

NAMES = ["lynx", "otter", "heron"]
WEIGHTS = [
    "generation_weight",
    "base_as_unknown_weight",
    "reverse_weight",
    "new_weight",
    "cross_entropy_weight",
    "distillation_weight",
]
TERMS = {"cross_entropy", "base_as_unknown", "reverse", "new", "distillation_known", "distillation_new"}


def test_the_defaults_are_the_released_values() -> None:
    config = OGENConfig(new_class_names=NAMES)
    assert (config.neighbours, config.heads, config.dropout, config.layer_norm) == (3, 4, 0.1, False)
    assert (config.noise, config.warmup) == ("batch", 0.2)
    weights = [config.generation_weight, config.base_as_unknown_weight, config.reverse_weight, config.new_weight]
    assert [*weights, config.cross_entropy_weight] == [1.0, 0.25, 0.25, 0.5, 0.25]
    assert (config.largest_window, config.smallest_window, config.average, config.decay) == (9, 2, "ema", 0.9)


def refusal(**settings: object) -> str:
    with pytest.raises(ConfigError) as caught:
        OGENConfig(new_class_names=NAMES, **settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("neighbours", 0),
        ("neighbours", -1),
        ("neighbours", 1.5),
        ("heads", 0),
        ("smallest_window", 0),
        ("dropout", -0.1),
        ("dropout", 1.5),
        ("decay", -0.1),
        ("decay", 1.5),
        ("warmup", -0.1),
        ("warmup", 1.01),
        ("warmup", math.nan),
        ("noise", "image"),
        ("average", "median"),
        *((name, -0.5) for name in WEIGHTS),
        *((name, math.nan) for name in WEIGHTS),
        *((name, math.inf) for name in WEIGHTS),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name_and_value(name: str, value: object) -> None:
    message = refusal(**{name: value})
    assert name in message and str(value) in message


def test_a_largest_window_below_the_smallest_is_refused() -> None:
    message = refusal(largest_window=3, smallest_window=4)
    assert "3" in message and "4" in message
    OGENConfig(new_class_names=NAMES, largest_window=4, smallest_window=4)


@pytest.mark.parametrize("names", [[], "lynx", ["lynx", " "], ["lynx", "Lynx "], ["lynx", 3]])
def test_names_that_are_none_are_refused(names: object) -> None:
    with pytest.raises(DataError):
        OGENConfig(new_class_names=names)


@pytest.mark.parametrize("settings", [{"warmup": 0.0}, {"warmup": 1.0}, *({name: 0.0} for name in WEIGHTS)])
def test_the_ends_of_the_ranges_are_allowed(settings: dict[str, float]) -> None:
    OGENConfig(new_class_names=NAMES, **settings)


@pytest.mark.parametrize("epochs", [1, 4, 5, 9, 10, 50, 200])
def test_the_generator_alone_is_trained_in_the_first_fifth_of_the_epochs_rounded_down(epochs: int) -> None:
    config = OGENConfig(new_class_names=NAMES)
    for epoch in range(epochs):
        weights = config.weights(epoch, epochs)
        assert weights["generation_base"] == weights["generation_reverse"] == 1.0
        assert {name for name, weight in weights.items() if weight == 0} == (TERMS if epoch < epochs // 5 else set())


@pytest.mark.parametrize("k", [1, 3, 5])
def test_after_the_warm_up_the_weights_are_the_released_ones(k: int) -> None:
    weights = OGENConfig(new_class_names=NAMES, neighbours=k).weights(9, 10)
    assert weights["base_as_unknown"] == weights["cross_entropy"] == 0.25
    assert weights["reverse"] == pytest.approx(0.25 / k) and weights["new"] == pytest.approx(0.5 / k)
