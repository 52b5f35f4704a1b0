# SPDX-License-Identifier: Apache-2.0
"""SAFT's fast paths against full fine-tuning with a dense mask, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from hf_robust import SAFTConfig, mask_summary, select_saft
from hf_robust.tuners.saft.forward import tuned_tensors
from hf_robust.tuners.saft.plan import Plan

from .zoo import batches, exact_loss, oracle_masks, oracle_train, zoo

STEPS = 20
ROOT = ("scale",)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The effective weights of a model, by the names they have without wrappers."""
    return {
        name.replace("base_model.model.", "").replace("base_layer.", ""): parameter.detach()
        for name, parameter in model.named_parameters()
        if "saft_values" not in name
    }


def train(model: nn.Module, steps: list, clip: float | None = None) -> None:
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.0)
    model.train()
    for backward in steps:
        optimizer.zero_grad()
        backward(model)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(trainable, clip)
        optimizer.step()
    with torch.no_grad():
        exact_loss(model, batches()[0])  # a forward writes the last step's values into the base


@pytest.fixture
def out_of_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plan, "is_writable", lambda plan, base_layer: False)


def compare(density: float, steps: list, checkpointing: bool | None = None, clip: float | None = None) -> nn.Module:
    """Trains both ways and compares every effective weight after 20 steps."""
    base = zoo()
    base.tower.checkpointing = checkpointing
    masks = oracle_masks(base, batches(), density, ROOT)
    expected = oracle_train(base, masks, steps, clip=clip)
    model = get_peft_model(copy.deepcopy(base), SAFTConfig(density=density))
    select_saft(model, batches(), exact_loss)
    assert mask_summary(model).selected == sum(int(mask.sum()) for mask in masks.values())
    train(model, steps, clip)
    expected_weights, base_weights = weights(expected), weights(base)
    with torch.no_grad():
        logits = [m(batches()[0]["pixel_values"], batches()[0]["ids"]) for m in (model, expected, base)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-6, atol=1e-9)
    assert (logits[0] - logits[2]).abs().max() > 1e-2  # training has moved something
    moved = set()
    for name, weight in effective(model).items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=1e-6, atol=1e-9, msg=name)
        if not torch.equal(weight, base_weights[name]):
            moved.add(name)
    assert moved == {name for name, mask in masks.items() if mask.any()}
    return model


def effective(model: nn.Module) -> dict[str, torch.Tensor]:
    """The effective weights, whichever path is taken: those of a merged copy made by hand."""
    found = weights(model)
    for unit, layer in model.base_model.model.named_modules():
        if "default" in getattr(layer, "saft_values", {}) and not layer.resident.changed:
            tuned = tuned_tensors(layer.base_layer, layer.resident.plan, layer.saft_values["default"], in_place=False)
            found.update({f"{unit}.{name}": tensor.detach() for name, tensor in tuned.items()})
    return found


def plain(batch: dict) -> list:
    return lambda model: exact_loss(model, batch).backward()


def steps_plain() -> list:
    return [plain(batches()[i % 3]) for i in range(STEPS)]


# 0.5 takes entries of every tensor (but not the bias of the keys, whose true gradient is zero).
@pytest.mark.parametrize("density", [0.02, 0.5])
def test_every_module_type_in_place(density: float) -> None:
    model = compare(density, steps_plain())
    if density == 0.5:
        kinds = {kind.kind for kind in mask_summary(model).kinds}
        assert len(kinds) == sum(1 for name, _ in zoo().named_parameters() if name not in ROOT)


@pytest.mark.parametrize("density", [0.02, 0.5])
def test_every_module_type_out_of_place(density: float, out_of_place: None) -> None:
    compare(density, steps_plain())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("writable", [True, False])
def test_gradient_checkpointing(reentrant: bool, writable: bool, request: pytest.FixtureRequest) -> None:
    if not writable:
        request.getfixturevalue("out_of_place")
    compare(0.5, steps_plain(), checkpointing=reentrant)


@pytest.mark.parametrize("writable", [True, False])
def test_gradient_accumulation(writable: bool, request: pytest.FixtureRequest) -> None:
    if not writable:
        request.getfixturevalue("out_of_place")

    def accumulated(model: nn.Module) -> None:
        for batch in batches():
            (exact_loss(model, batch) / 3).backward()

    compare(0.5, [accumulated] * STEPS)


def test_norm_clipping_sees_the_selected_entries_only() -> None:
    compare(0.5, steps_plain(), clip=0.05)


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("writable", [True, False])
def test_reference_forward_between_forward_and_backward(
    reentrant: bool | None, writable: bool, request: pytest.FixtureRequest
) -> None:
    """The pre-trained weights return for the reference and leave again, and the pending backward stays legal."""
    if not writable:
        request.getfixturevalue("out_of_place")
    base = zoo()
    references = []

    def with_reference(model: nn.Module) -> None:
        loss = exact_loss(model, batches()[0])
        if hasattr(model, "disable_adapter"):
            with model.disable_adapter(), torch.no_grad():
                references.append(exact_loss(model, batches()[0]))
        loss.backward()

    compare(0.5, [with_reference] * STEPS, checkpointing=reentrant)
    assert len(references) == STEPS
    assert all(torch.equal(reference, exact_loss(base, batches()[0])) for reference in references)
