# SPDX-License-Identifier: Apache-2.0
"""TPGM: shares of the way, tensor by tensor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hf_robust import RobustTrainer, RobustTrainingArguments
from hf_robust.errors import ConfigError, DataError, NonFiniteError
from hf_robust.interpolation.adapters import linear_tensors, wise_ft
from hf_robust.interpolation.tpgm import ProjectionTable, tpgm
from tests.interpolation.tuned import ACLIP, LORA, METHODS, SAFT, SHIRA, own, tuned
from tests.methods import CLIP, assert_same, batch, loss_fn, outputs
from tests.tiny_models import image_dataset, tiny_model, tiny_processor

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT's own LN tuning
BATCHES = [batch(CLIP, 5), batch(CLIP, 6)]
NAMES = ["cat", "dog"]
RADAPTERS = [method for method in METHODS if method.name.startswith("R-Adapter")]


def small():
    """A model that was trained whole, and its weights from before."""
    model, generator = nn.Linear(3, 2).double(), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    start = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    return model, start


def never(model, given):
    raise AssertionError("evaluated")


@pytest.mark.parametrize("method", [SAFT, ACLIP, LORA, SHIRA, METHODS[-1]], ids=lambda method: method.name)
def test_without_steps_it_is_wise_ft_at_one_half(method):
    model, other = tuned(method), tuned(method)
    table = tpgm(model, BATCHES, never, steps=0)
    wise_ft(other, 0.5)
    for name, tensor in own(other).items():
        torch.testing.assert_close(own(model)[name], tensor, rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs(model), outputs(other), rtol=0, atol=1e-5)
    assert list(table.ratios.values()) == pytest.approx([0.5] * len(table.ratios), abs=1e-6) and table.losses == []
    trained = [tensor for tensor in linear_tensors(tuned(method)) if not tensor.parameter.equal(tensor.start)]
    assert len(table.ratios) == len(trained) > 5


def test_of_a_whole_model_too():
    model, start = small()
    tuned_values = own(model)
    tpgm(model, [0], never, start, steps=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.data, (start[name] + tuned_values[name]) / 2, rtol=0, atol=1e-6)


def test_a_step_is_that_of_adam_by_hand():
    """With a gradient of the projected weights that does not depend on them."""
    model, start = small()
    slopes = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    expected = {}
    for name, parameter in model.named_parameters():
        delta = (parameter - start[name]).detach()
        norm = delta.norm()
        radius = norm / 2
        slope = (slopes[name] * delta).sum() / (norm + 1e-8)  # of the loss, in the radius
        mean, square = 0.1 * slope, 0.001 * slope**2  # Adam's moments, of which the bias is then corrected
        radius = radius - 1e-2 * (mean / 0.1) / ((square / 0.001).sqrt() + 1e-8)
        expected[name] = start[name] + (radius / (norm + 1e-8)).clamp(0, 1) * delta

    def linear_loss(given, _):
        return sum((slopes[name] * parameter).sum() for name, parameter in given.named_parameters())

    table = tpgm(model, [0], linear_loss, start, steps=1)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.data, expected[name], rtol=1e-12, atol=1e-12)
    halves = {name: (start[name] + own(small()[0])[name]) / 2 for name in start}
    assert table.losses == [pytest.approx(float(sum((slopes[name] * halves[name]).sum() for name in start)), abs=1e-6)]


@pytest.mark.parametrize("goal", [0, 1])
def test_radii_stay_between_nothing_and_all(goal):
    model, start = small()
    before = own(model)
    target = (start, before)[goal]

    def distance(given, _):
        return sum((parameter - target[name]).square().sum() for name, parameter in given.named_parameters())

    table = tpgm(model, [0], distance, start, steps=30, learning_rate=0.5)
    if goal == 1:
        assert_same(own(model), before)  # bit for bit
        assert set(table.ratios.values()) == {1.0}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.data, target[name], rtol=1e-6, atol=1e-6)
    wise_ft(model, 1.0, start)
    assert_same(own(model), before)


@pytest.mark.parametrize("method", [SAFT, ACLIP, LORA, *RADAPTERS], ids=lambda method: method.name)
def test_it_learns_and_can_be_undone(method):
    model = tuned(method)
    before, base = own(model), outputs(model)
    model.train()
    table = tpgm(model, BATCHES[:1], loss_fn, steps=6, learning_rate=0.01)
    assert model.training
    model.eval()
    assert table.losses[5] < table.losses[0] and len(table.losses) == 6
    assert len({round(ratio, 4) for ratio in table.ratios.values()}) > 3 and not torch.equal(outputs(model), base)
    found = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for tensor in linear_tensors(model):
        ratio = table.ratios.get(found[id(tensor.parameter)], 1.0)
        value = before[found[id(tensor.parameter)]]
        torch.testing.assert_close(tensor.parameter.data, tensor.start + ratio * (value - tensor.start))
    wise_ft(model, 1.0)
    assert_same(own(model), before)
    assert torch.equal(outputs(model), base)


def test_a_tensor_that_has_not_changed_has_no_share():
    model, start = small()
    start["bias"] = model.bias.detach().clone()
    table = tpgm(model, [0], lambda given, _: given.weight.sum() + given.bias.sum(), start, steps=3)
    assert list(table.ratios) == ["weight"] and model.bias.equal(start["bias"])
    model, _ = small()
    with pytest.raises(ConfigError, match="nothing has changed"):
        tpgm(model, [0], never, {name: parameter.detach().clone() for name, parameter in model.named_parameters()})


def test_the_table():
    assert str(ProjectionTable({"a.weight": 0.25, "b": 1.0}, [])).splitlines() == [
        "tensor    share of the way",
        "a.weight            0.2500",
        "b                   1.0000",
    ]


@pytest.mark.parametrize(
    ("given", "function", "steps", "error", "match"),
    [
        ([], loss_fn, 1, DataError, "there are no batches"),
        (iter(BATCHES), loss_fn, 3, DataError, "gone through once alone.*Give a list"),
        (BATCHES, never, -1, ConfigError, "out of range.*steps=-1"),
        (BATCHES, lambda model, given: loss_fn(model, given) * float("nan"), 1, NonFiniteError, "loss on validation"),
        (BATCHES, lambda model, given: loss_fn(model, given).detach(), 1, ConfigError, "does not depend on"),
        (BATCHES, lambda model, given: loss_fn(model, given).item(), 1, ConfigError, "no loss.*'float'.*0-dim"),
        (BATCHES, lambda model, given: loss_fn(model, given)[None], 1, ConfigError, r"no loss.*\(1,\).*0-dim"),
    ],
)
def test_after_an_error_the_model_is_the_fine_tuned_one(given, function, steps, error, match):
    model = tuned(SAFT)
    before, shown = own(model), copy.deepcopy(dict(model.named_parameters()))
    wise_ft(model, 0.3)
    with pytest.raises(error, match=match):
        tpgm(model, given, function, steps=steps)
    wise_ft(model, 1.0)
    assert_same(own(model), before)
    assert_same(dict(model.named_parameters()), shown)  # also what the base shows of SAFT


def trainer(tmp_path, **settings):
    how = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    args = RobustTrainingArguments(tmp_path, max_steps=4, learning_rate=1e-2, **how)
    settings |= {"train_dataset": image_dataset(8, NAMES), "processing_class": tiny_processor(CLIP)}
    model = RobustTrainer(tiny_model(CLIP), args, **settings)
    model.train()
    return model


def test_of_a_trainer(tmp_path):
    validation = image_dataset(8, NAMES, seed=9)
    first = trainer(tmp_path, eval_dataset={"validation": validation})
    before = own(first.model)
    table = first.tpgm_sweep(steps=3)
    assert len(table.losses) == 3 and len(set(table.ratios.values())) > 3
    after = own(first.model)
    wise_ft(first.model, 1.0, first.zero_shot)
    assert_same(own(first.model), before)
    assert first.tpgm_sweep(validation, steps=3) == table  # it draws nothing from elsewhere
    assert_same(own(first.model), after)
    assert first.tpgm_sweep(validation, steps=3, learning_rate=1e-4) != table
    first.eval_dataset = {"test": validation}
    with pytest.raises(ConfigError, match=r"validation data.*\['test'\]"):
        first.tpgm_sweep()
