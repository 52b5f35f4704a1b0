# SPDX-License-Identifier: Apache-2.0
"""R-Adapter against hooks behind attention and MLP of a plain model, written from the formulas alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import get_peft_model
from torch.nn import functional as F

from hf_robust import RAdapterConfig, wise_ft
from tests.methods import batch, logits
from tests.tiny_models import tiny_model

TOWERS, LAYERS, WIDTH = ("vision_model", "text_model"), 2, 32
PLACES = {"self_attn": "self_attn.out_proj", "mlp": "mlp.fc2"}  # of the branch, and the projection that ends it
BRANCHES = [f"{tower}.encoder.layers.{index}.{name}" for tower in TOWERS for index in range(LAYERS) for name in PLACES]


# --- helpers ---


def projection(branch):
    parent, name = branch.rsplit(".", 1)
    return f"{parent}.{PLACES[name]}"


def inputs():
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch("clip").items()}


def loss_of(model):
    return F.cross_entropy(logits(model, inputs()), inputs()["labels"])


class Adapter:
    """F as a whole, or U and D, and σ, with their averages."""

    def __init__(self, down, scale):
        whole = down is None
        self.tensors = [torch.zeros(WIDTH, WIDTH if whole else len(down)), torch.tensor(scale)]
        self.tensors = [tensor.double() for tensor in self.tensors] + ([] if whole else [down.detach().clone()])
        for tensor in self.tensors:
            tensor.requires_grad_()
        self.averages = [tensor.detach().clone() for tensor in self.tensors]

    def matrix(self, averaged):
        """σ F."""
        up, scale, *down = self.averages if averaged else self.tensors
        return scale * (up @ down[0] if down else up)

    def average(self, decay):
        self.averages = [
            decay * old + (1 - decay) * new.detach() for old, new in zip(self.averages, self.tensors, strict=True)
        ]


class Oracle:
    """A plain model with A(z) = z + σ F z behind every branch, α times."""

    def __init__(self, model, adapters):
        self.model, self.adapters, self.averaged, self.alpha = copy.deepcopy(model), adapters, False, 1.0
        self.model.requires_grad_(False)
        for name, adapter in adapters.items():
            self.model.get_submodule(name).register_forward_hook(self.hook(adapter))

    def hook(self, adapter):
        def behind(module, args, output):
            first, *rest = output if isinstance(output, tuple) else (output,)
            matrix = self.alpha * adapter.matrix(self.averaged)
            first = first + torch.einsum("ij,btj->bti", matrix, first)
            return (first, *rest) if rest or isinstance(output, tuple) else first

        return behind


def part(model, branch, name):
    layer = model.get_base_model().get_submodule(projection(branch))
    tensors = getattr(layer, name)
    return tensors["default"] if "default" in tensors else None


def both(rank, drop_path=0.0, decay=0.7, **settings):
    start = tiny_model("clip").double()
    config = RAdapterConfig(r=rank, drop_path=drop_path, average_decay=decay, **settings)
    model = get_peft_model(copy.deepcopy(start), config)
    adapters = {branch: Adapter(part(model, branch, "radapter_down"), 0.1) for branch in BRANCHES}
    return model, Oracle(start, adapters)


def trained(rank, steps=4, decay=0.7, lr=0.3):
    model, oracle = both(rank, decay=decay)
    ours = [tensor for adapter in oracle.adapters.values() for tensor in adapter.tensors]
    theirs = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizers = [torch.optim.SGD(tensors, lr=lr) for tensors in (theirs, ours)]
    model.train()
    for _ in range(steps):
        for one, optimizer in zip((model, oracle.model), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(one).backward()
            optimizer.step()
        for adapter in oracle.adapters.values():
            adapter.average(decay)
    return model, oracle


# --- tests ---


@pytest.mark.parametrize("rank", [None, 4])
def test_training_averages_and_outputs(rank):
    model, oracle = trained(rank)
    close = {"rtol": 1e-4, "atol": 1e-6}
    for branch, adapter in oracle.adapters.items():
        named = ["radapter_weight", "radapter_scale", *([] if rank is None else ["radapter_down"])]
        for name, expected, average in zip(named, adapter.tensors, adapter.averages, strict=True):
            found = part(model, branch, name)
            torch.testing.assert_close(found.double().reshape(expected.shape), expected, **close)
            found = part(model, branch, name.replace("radapter_", "radapter_average_"))
            torch.testing.assert_close(found.double().reshape(average.shape), average, **close)
    moved = loss_of(oracle.model)
    torch.testing.assert_close(loss_of(model).double(), moved, **close)
    oracle.averaged = True
    assert abs(loss_of(oracle.model) - moved) > 1e-3 * moved
    torch.testing.assert_close(logits(model.eval(), inputs()), logits(oracle.model, inputs()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("rank", [None, 4])
def test_merged_weights(rank, alpha):
    model, oracle = trained(rank)
    start = tiny_model("clip").double()
    wise_ft(model.eval(), alpha)
    merged = copy.deepcopy(model).merge_and_unload()
    for branch, adapter in oracle.adapters.items():
        linear, found = start.get_submodule(projection(branch)), merged.get_submodule(projection(branch))
        matrix = torch.eye(WIDTH).double() + alpha * adapter.matrix(averaged=True).detach()
        torch.testing.assert_close(found.weight.double(), matrix @ linear.weight, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.bias.double(), matrix @ linear.bias, rtol=1e-4, atol=1e-6)
    oracle.averaged, oracle.alpha = True, alpha
    for one in (model, merged):
        torch.testing.assert_close(logits(one, inputs()), logits(oracle.model, inputs()), rtol=1e-4, atol=1e-5)


def test_the_start_is_the_base_and_what_is_trained_is_counted():
    model, _ = both(None)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * LAYERS * 2 * WIDTH**2 + 4 * LAYERS
    merged, start = model.eval().merge_and_unload().state_dict(), tiny_model("clip").double().state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in start.items())


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_the_average_of_a_constant_lacks_a_power_of_the_decay(decay):
    model, _ = both(None, decay=decay)
    constant = torch.randn(WIDTH, WIDTH)
    weight = part(model, BRANCHES[0], "radapter_weight")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with torch.no_grad():
        weight.copy_(constant)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model.train()).backward()
        optimizer.step()
    found = part(model, BRANCHES[0], "radapter_average_weight")
    torch.testing.assert_close(found.double(), (1 - decay**5) * constant.double(), rtol=1e-4, atol=1e-7)
    assert part(model, BRANCHES[0], "radapter_average_scale").item() == pytest.approx(0.1)


@pytest.mark.parametrize("unit", ["sample", "token"])
@pytest.mark.parametrize("rank", [None, 4])
def test_dropping(rank, unit, p=0.3):
    model, _ = both(rank, drop_path=p, drop_unit=unit)
    layer = model.get_base_model().get_submodule(projection(BRANCHES[0])).train()
    with torch.no_grad():
        part(model, BRANCHES[0], "radapter_weight").normal_()
    up, down = (part(model, BRANCHES[0], name) for name in ("radapter_weight", "radapter_down"))
    n, other = 2000, 3
    states = torch.randn(*((n, other) if unit == "sample" else (other, n)), WIDTH).double()
    plain = states @ layer.base_layer.weight.T + layer.base_layer.bias
    matrix = 0.1 * (up if down is None else up @ down).double().detach()
    expected = torch.einsum("ij,btj->bti", matrix, plain) / (1 - p)
    added = (layer(states) - plain).detach()
    axis = (1, 2) if unit == "sample" else (0, 2)  # what is dropped together
    kept, dropped = (
        ((added - one).abs() < 1e-4 * (1 + one.abs())).all(axis[1]).all(axis[0]) for one in (expected, 0 * expected)
    )
    assert (kept ^ dropped).all()
    assert abs(dropped.double().mean() - p) < 5 * math.sqrt(p * (1 - p) / n)
