# SPDX-License-Identifier: Apache-2.0
"""The choice of α."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_robust.errors import ConfigError, NonFiniteError
from hf_robust.interpolation import adapters, sweep
from hf_robust.interpolation.adapters import wise_ft
from hf_robust.interpolation.sweep import AlphaSweep, alpha_sweep
from hf_robust.tasks.class_names import ZeroShotClassifier
from tests.methods import same_bits
from tests.tiny_models import tiny_lora, tiny_model, tiny_processor

METRIC = "validation_accuracy"


@pytest.fixture
def model():
    """A LoRA of one weight: its B is α at α."""
    wrapped = get_peft_model(nn.Sequential(nn.Linear(1, 1)), LoraConfig(r=1, target_modules=["0"]))
    wrapped.base_model.model[0].lora_B["default"].weight.data.fill_(1)
    return wrapped


def value(model):
    return model.base_model.model[0].lora_B["default"].weight.item()


def metrics(values, other=0.0):
    """Metrics that depend on where the model stands."""
    return lambda model: {METRIC: values[value(model)], "test_accuracy": other}


def test_the_best_on_validation_data_is_picked_and_the_model_stays_there(model):
    seen = []

    def evaluate(given):
        seen.append((given is model, value(model)))
        return {METRIC: {0: 0.1, 0.25: 0.7, 1: 0.5}[value(model)], "test_accuracy": value(model)}

    found = alpha_sweep(model, [1, 0.25, 0], evaluate, METRIC)
    assert seen == [(True, 1), (True, 0.25), (True, 0)]
    assert found.best_alpha == 0.25 and found.metric == METRIC and value(model) == 0.25
    assert found.rows == [
        {"alpha": 1.0, METRIC: 0.5, "test_accuracy": 1.0},
        {"alpha": 0.25, METRIC: 0.7, "test_accuracy": 0.25},
        {"alpha": 0.0, METRIC: 0.1, "test_accuracy": 0.0},
    ]
    wise_ft(model, 1)
    assert value(model) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.best_alpha = 1


@pytest.mark.parametrize("alphas", [[0, 0.25, 0.5, 1], [1, 0.5, 0.25, 0]])
def test_the_smaller_of_equally_good_alphas_is_picked(model, alphas):
    accuracies = metrics({0: 0.1, 0.25: 0.7, 0.5: 0.7, 1: 0.2})
    assert alpha_sweep(model, alphas, accuracies, METRIC).best_alpha == 0.25
    losses = metrics({0: 0.9, 0.25: 0.3, 0.5: 0.3, 1: 0.8})
    assert alpha_sweep(model, alphas, losses, METRIC, greater_is_better=False).best_alpha == 0.25


LOSSES = {0: 2.0, 0.25: 1.0, 0.5: 1.0, 1: 3.0}


@pytest.mark.parametrize(
    ("metric", "losses", "best"),
    [
        (METRIC, {"validation_loss": LOSSES}, 0.25),  # the lowest loss, and of two with it the smaller
        (METRIC, {"validation_loss": {**LOSSES, 0.5: 0.9}}, 0.5),
        (METRIC, {"validation_loss": {**LOSSES, 0: float("nan")}}, 0.25),
        (METRIC, {"test_loss": LOSSES}, 0),  # of another set
        (METRIC, {"validation_loss": {**LOSSES, 0: 0.1}, "validation_b_loss": LOSSES}, 0),
        ("validation_b_accuracy", {"validation_loss": {**LOSSES, 0: 0.1}, "validation_b_loss": LOSSES}, 0.25),
        ("validation_worst_class_accuracy", {"validation_loss": LOSSES}, 0.25),
    ],
)
def test_ties_are_broken_by_the_loss_on_the_same_set(model, metric, losses, best):
    def evaluate(given):
        return {metric: 0.5, **{name: of_alpha[value(given)] for name, of_alpha in losses.items()}}

    assert alpha_sweep(model, [1, 0.5, 0.25, 0], evaluate, metric).best_alpha == best


def test_the_loss_has_no_say_without_a_tie(model):
    def evaluate(given):
        return {METRIC: value(given), "validation_loss": value(given)}

    assert alpha_sweep(model, [0, 0.5, 1], evaluate, METRIC).best_alpha == 1


@pytest.mark.parametrize(("tolerance", "best"), [(0.0, 0.75), (0.04, 0.75), (0.06, 0.5), (0.21, 0.25), (1.0, 0.0)])
def test_within_the_tolerance_the_smallest_is_picked(model, tolerance, best):
    values = {0: 0.1, 0.25: 0.6, 0.5: 0.75, 0.75: 0.8, 1: 0.79}
    assert alpha_sweep(model, list(values), metrics(values), METRIC, tolerance=tolerance).best_alpha == best
    losses = {alpha: -value for alpha, value in values.items()}
    found = alpha_sweep(model, list(values), metrics(losses), METRIC, greater_is_better=False, tolerance=tolerance)
    assert found.best_alpha == best


@pytest.mark.parametrize("tolerance", [-0.1, float("nan"), float("inf")])
def test_a_tolerance_that_is_none_is_refused(model, tolerance):
    with pytest.raises(ConfigError, match="tolerance.*numbers from 0"):
        alpha_sweep(model, [0, 1], never, METRIC, tolerance=tolerance)


def test_the_table():
    rows = [{"alpha": alpha, METRIC: alpha / 2, "loss": 12.5} for alpha in (0.0, 0.25, 1.0)]
    assert str(AlphaSweep(rows, METRIC, 0.25)).splitlines() == [
        " alpha  validation_accuracy     loss",
        "     0               0.0000  12.5000",
        "* 0.25               0.1250  12.5000",
        "     1               0.5000  12.5000",
    ]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_evaluate_leaves_the_fine_tuned_model(model, error):
    def evaluate(given):
        raise error("stop")

    with pytest.raises(error, match="stop"):
        alpha_sweep(model, [0.5, 0], evaluate, METRIC)
    assert value(model) == 1


def never(model):
    raise AssertionError("evaluated")


@pytest.mark.parametrize(
    "alphas, metric, match",
    [
        ([], METRIC, "alphas are none"),
        ([0.5, 0, 0.5], METRIC, "one is there twice"),
        ([0, 1, 1.0], METRIC, "one is there twice"),
        ([0, 1.5], METRIC, "alpha is no share.*1.5"),
        ([0, 1], "test_accuracy", "chosen on validation data, never on a test set.*metric.*'test_accuracy'"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_evaluated(model, alphas, metric, match):
    with pytest.raises(ConfigError, match=match):
        alpha_sweep(model, alphas, never, metric)
    assert value(model) == 1


def test_a_model_that_cannot_be_scaled_is_refused_before_anything_is_evaluated():
    with pytest.raises(ConfigError, match="θ₀ of trained parameters is not known"):
        alpha_sweep(nn.Linear(1, 1), [0, 1], never, METRIC)


def test_a_missing_or_broken_metric_is_refused(model):
    with pytest.raises(ConfigError, match="does not return the metric.*'validation_f1'.*validation_accuracy, test"):
        alpha_sweep(model, [0, 0.5], metrics({0: 0.5}), "validation_f1")
    assert value(model) == 1
    with pytest.raises(NonFiniteError, match="validation_accuracy is nan .at alpha 0.5"):
        alpha_sweep(model, [0, 0.5], metrics({0: 0.5, 0.5: float("nan")}), METRIC)
    assert value(model) == 1


def test_a_model_trained_whole():
    model = nn.Linear(1, 1, bias=False)
    zero_shot = {"weight": torch.zeros(1, 1)}
    model.weight.data.fill_(1)
    found = alpha_sweep(model, [0, 0.5, 1], lambda m: {METRIC: -abs(m.weight.item() - 0.6)}, METRIC, zero_shot)
    assert found.best_alpha == 0.5 and model.weight.item() == 0.5


def test_the_zero_shot_head_is_not_built_for_every_alpha(monkeypatch):
    model = ZeroShotClassifier(tiny_lora(tiny_model("clip")), tiny_processor("clip"), ["a", "b"], head="trainable")
    start = model.class_head.weight.detach().clone()
    model.class_head.weight.data.add_(1)
    calls = []
    encode = ZeroShotClassifier.encode_prompts
    monkeypatch.setattr(ZeroShotClassifier, "encode_prompts", lambda self: calls.append(1) or encode(self))
    found = alpha_sweep(model, [0, 0.25, 0.5, 0.75, 1], lambda m: {METRIC: 0.5}, METRIC)
    assert found.best_alpha == 0 and same_bits(model.class_head.weight.detach(), start)
    assert len(calls) == 2 and sweep.wise_ft is adapters.wise_ft


def test_a_table_of_many_metrics_shows_the_chosen_one_and_the_losses():
    names = [
        f"{one}_{metric}" for one in ("validation", "id") for metric in ("recall@1", "a_recall@1", "b", "c", "loss")
    ]
    shown = str(AlphaSweep([{"alpha": 0.5, **dict.fromkeys(names, 0.25)}], "validation_recall@1", 0.5))
    expected = ["alpha", "validation_recall@1", "validation_loss", "id_recall@1", "id_loss"]
    assert shown.splitlines()[0].split() == expected
