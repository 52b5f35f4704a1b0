# SPDX-License-Identifier: Apache-2.0
"""L2-SP: its value and gradient, that it is ‖Δ‖² for what it takes, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LNTuningConfig, ShiraConfig, get_peft_model
from torch import nn

from hf_robust import ACLIPConfig, SAFTConfig, WeightLoss, ZeroShotClassifier, add_terms, context_prompt, select_saft
from hf_robust.errors import ConfigError
from hf_robust.losses import Moved
from hf_robust.losses.weights import squared_distance
from hf_robust.training.losses import StartingPoint
from tests.losses.classifiers import NAMES, batch, check_zero_at_the_start, gradients, move, with_terms
from tests.tiny_models import FAMILIES, tiny_lora, tiny_model, tiny_processor

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT's own LN tuning


def plain(moved):
    """As it is written."""
    return torch.stack([(pair.tuned - pair.start).square().sum() for pair in moved]).sum()


def pairs(dtype=torch.float64):
    shapes = [(3, 4), (5,), (), (70_000,)]
    starts = [torch.randn(shape).to(dtype) for shape in shapes]
    return [Moved((one + 0.1 * torch.randn(one.shape)).to(dtype).requires_grad_(), one) for one in starts]


def test_it_is_the_sum_of_squares_and_so_is_its_gradient():
    moved = pairs()
    value, expected = squared_distance(moved), plain(moved)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    tuned = [pair.tuned for pair in moved]
    for one, other in zip(*(torch.autograd.grad(3 * v, tuned) for v in (value, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_long_sums_are_exact_and_of_half_precision_in_float32():
    long = Moved(1e-4 * torch.randn(3_000_000), torch.zeros(3_000_000))
    assert squared_distance([long]).item() == pytest.approx(long.tuned.double().square().sum().item(), rel=2e-6)
    moved = pairs(torch.bfloat16)
    value = squared_distance(moved)
    expected = plain([Moved(pair.tuned.double(), pair.start.double()) for pair in moved])
    assert value.dtype == torch.float32 and value.item() == pytest.approx(expected.item(), rel=1e-6)
    value.backward()
    assert all(pair.tuned.grad.dtype == torch.bfloat16 for pair in moved)


def test_a_second_backward_is_refused_and_not_wrong():
    value = squared_distance(pairs())
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_zero_at_the_start_in_every_family(family):
    check_zero_at_the_start(with_terms(WeightLoss(), family=family), "weights", family)


def test_head_scale_and_bias_are_free():
    for family, head in (("clip", "trainable"), ("siglip", "live")):
        task = with_terms(WeightLoss(), family=family, head=head)
        with torch.no_grad():
            task.model.logit_scale.add_(1)
            for parameter in task.class_head.parameters() if head == "trainable" else [task.model.logit_bias]:
                parameter.add_(1)
        value = task(**batch(family)).terms["weights"]
        found = gradients(task, value)
        assert value == 0 and found and all(name.startswith("model.") and "logit" not in name for name in found)


def adapted(method):
    """θ₀ with an adapter that trains entries of Δ."""
    norms = [name for name, one in tiny_model("clip").named_modules() if isinstance(one, nn.LayerNorm)]
    configs = {
        "saft": SAFTConfig(density=0.01, score="random"),
        "aclip": ACLIPConfig(modules_to_save=["text_projection"]),
        "shira": ShiraConfig(r=2, target_modules=["q_proj", "fc1"]),
        "ln_tuning": LNTuningConfig(target_modules=norms),
    }
    model = get_peft_model(tiny_model("clip"), configs[method])
    if method == "saft":
        select_saft(model)
    return model


@pytest.mark.parametrize("method", ["saft", "aclip", "shira", "ln_tuning"])
def test_of_an_adapter_it_is_the_squared_norm_of_its_change(method):
    task = ZeroShotClassifier(adapted(method), tiny_processor("clip"), NAMES)
    add_terms(task, {"weights": WeightLoss()}, weights=StartingPoint(None))
    check_zero_at_the_start(task.train(), "weights")
    value = task(**batch()).terms["weights"].item()
    merged = copy.deepcopy(task.model).merge_and_unload()
    before = dict(tiny_model("clip").named_parameters())
    changes = [parameter - before[name] for name, parameter in merged.named_parameters()]
    assert value == pytest.approx(0.5 * sum(one.square().sum().item() for one in changes), rel=1e-4)


REFUSED = {
    "lora": lambda: tiny_lora(tiny_model("clip")),
    "lora, modules_to_save": lambda: tiny_lora(tiny_model("clip"), modules_to_save=["text_projection"]),
    "context": lambda: context_prompt(tiny_model("clip"), tiny_processor("clip"), 2, None)[0],
}


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_train_something_else_are_refused(name):
    task = ZeroShotClassifier(REFUSED[name](), tiny_processor("clip"), NAMES)
    got = "TRAINABLE_TOKENS" if name == "context" else "LORA"
    with pytest.raises(
        ConfigError, match=f"not differences of weights.*losses, weights.*{got}.*allowed full fine-tun"
    ):
        add_terms(task, {"weights": WeightLoss()}, weights=StartingPoint(None))


def test_an_encoder_that_is_not_trained_is_refused():
    model = tiny_model("clip").requires_grad_(False)
    task = ZeroShotClassifier(model, tiny_processor("clip"), NAMES, head="trainable")
    add_terms(
        task,
        {"weights": WeightLoss()},
        weights=lambda task: {"class_head.weight": Moved(*2 * [task.class_head.weight])},
    )
    with pytest.raises(ConfigError, match="no weight of the encoder is trained.*class_head.weight"):
        task.train()(**batch())


def test_it_pulls_back():
    ends = []
    for weight in (0.0, 100.0):
        task = with_terms(WeightLoss(weight))
        optimizer = torch.optim.SGD(task.parameters(), lr=1e-3)
        for _ in range(4):
            output = task(**batch())
            optimizer.zero_grad()
            (output.loss + output.terms["weights"]).backward()
            optimizer.step()
        ends.append(plain(task.reference.weights(task).values()).item())
    assert 0 < ends[1] < 0.8 * ends[0]


def test_moving_is_seen_whole():
    task = move(with_terms(WeightLoss(1.0)))
    found = task.reference.weights(task)
    expected = plain([pair for name, pair in found.items() if "logit" not in name]).item()
    assert task(**batch()).terms["weights"].item() == pytest.approx(expected, rel=1e-5)
