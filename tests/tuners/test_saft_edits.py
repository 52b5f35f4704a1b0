# SPDX-License-Identifier: Apache-2.0
"""Values and weights that are changed behind the adapter's back: right where θ₀ is known, refused where it is not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from torch.multiprocessing import get_context

from hf_robust.errors import BaseWeightsError
from hf_robust.tuners.saft import plan, resident
from hf_robust.tuners.saft.layer import SAFTLayer

from .zoo import batches, exact_loss, outputs, randomise, tuned, zoo

HEAD = "base_model.model.tower.head"
Edit = Callable[[Tensor], None]


def head(model: nn.Module) -> SAFTLayer:
    return model.get_submodule(HEAD)


def values(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def shown(model: nn.Module) -> dict[str, Tensor]:
    """The base's weights as they can be read by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if "saft_" not in n}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


# --- values edited as .data ---------------------------------------------------------------------------------------


@pytest.fixture
def edited() -> PeftModel:
    """A model whose values stood in the base, and were doubled afterwards without a trace."""
    model = tuned().eval()
    outputs(model)
    for value in values(model):
        value.data.mul_(2)
    return model


@pytest.fixture(scope="module")
def doubled() -> PeftModel:
    """What the same model should be."""
    model = tuned().eval()
    with torch.no_grad():
        for value in values(model):
            value.mul_(2)
    outputs(model)
    assert not torch.equal(outputs(model), outputs(tuned()))
    return model


def test_edited_values_are_used_and_shown(edited: PeftModel, doubled: PeftModel) -> None:
    assert torch.equal(outputs(edited), outputs(doubled))
    assert_same(shown(edited), shown(doubled))


@pytest.mark.parametrize("mode", [True, False])
def test_edited_values_are_shown_after_a_mode_was_set(edited: PeftModel, doubled: PeftModel, mode: bool) -> None:
    edited.train(mode)
    assert_same(shown(edited), shown(doubled))


def test_edited_values_are_merged(edited: PeftModel, doubled: PeftModel) -> None:
    merged = copy.deepcopy(edited)
    merged.merge_adapter()
    assert torch.equal(outputs(merged), outputs(doubled))
    assert_same(shown(merged), shown(doubled))
    assert torch.equal(outputs(edited.merge_and_unload()), outputs(doubled))


@pytest.mark.filterwarnings("ignore:Found missing adapter keys.*tower.alias")  # the second name of one module
def test_edited_values_are_saved(edited: PeftModel, doubled: PeftModel, tmp_path: Path) -> None:
    assert_same(edited.state_dict(), doubled.state_dict())
    assert_same(get_peft_model_state_dict(edited), get_peft_model_state_dict(doubled))
    edited.save_pretrained(tmp_path, save_embedding_layers=False)
    assert torch.equal(outputs(PeftModel.from_pretrained(zoo(), tmp_path)), outputs(doubled))
    assert_same(edited.unload().state_dict(), zoo().state_dict())


# --- weights of the base edited ----------------------------------------------------------------------------------


def in_place(weight: Tensor) -> None:
    with torch.no_grad():
        weight.add_(1)


def as_data(weight: Tensor) -> None:
    weight.data.add_(1)


def next_write(model: PeftModel) -> None:
    randomise(model, seed=2)
    outputs(model)


def mode_after_a_step(model: PeftModel) -> None:
    randomise(model, seed=2)
    model.train(model.training)


LEAVING = [
    lambda model: model.base_model.disable_adapter_layers(),
    lambda model: model.unload(),
    lambda model: model.merge_and_unload(),
    lambda model: model.merge_adapter(),
    lambda model: model.set_adapter("second"),
    lambda model: model.eval(),
    lambda model: model.state_dict(),
    next_write,
    mode_after_a_step,
]
NAMES = [
    "disable",
    "unload",
    "merge_and_unload",
    "merge_adapter",
    "set_adapter",
    "eval",
    "state_dict",
    "write",
    "train",
]


@pytest.fixture(scope="module")
def two_adapters() -> PeftModel:
    model = tuned()
    model.add_adapter("second", model.peft_config["default"])
    outputs(model)
    return model


@pytest.mark.parametrize("edit", [in_place, as_data])
@pytest.mark.parametrize("leave", LEAVING, ids=NAMES)
def test_edits_of_the_base_at_entries_are_refused(
    two_adapters: PeftModel, edit: Edit, leave: Callable[[PeftModel], object]
) -> None:
    model = copy.deepcopy(two_adapters)
    if leave is LEAVING[5]:
        randomise(model, seed=2)  # else nothing would be lost
    edit(head(model).base_layer.weight)
    before, modules = shown(model), [(name, type(module)) for name, module in model.named_modules()]
    status = model.get_model_status()
    with pytest.raises(BaseWeightsError, match="changed while they held.*tower.head.*'default'.*Edit, shard"):
        leave(model)
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert (status.enabled, status.merged_adapters) == (True, [])
    assert model.get_model_status() == status and model.base_model.training
    assert_same({HEAD: shown(model)[f"{HEAD}.base_layer.weight"]}, {HEAD: before[f"{HEAD}.base_layer.weight"]})
    with pytest.raises(BaseWeightsError):  # it stays so
        leave(model)


@pytest.mark.parametrize("edit", [in_place, as_data])
def test_a_layer_by_itself_refuses_too(edit: Edit) -> None:
    """As transformers' `disable_adapters` asks them, one after the other; the model cannot be used half-way."""
    model = tuned()
    outputs(model)
    edit(head(model).base_layer.weight)
    with pytest.raises(BaseWeightsError, match="tower.head"):
        head(model).enable_adapters(False)
    with pytest.raises(BaseWeightsError, match="tower.head"):
        outputs(model)


@pytest.mark.parametrize("edit", [in_place, as_data])
def test_edits_of_the_base_elsewhere_are_kept(edit: Edit) -> None:
    model = tuned()
    outputs(model)
    layer = head(model)
    entries = layer.changed_entries("default")["weight"]
    free = torch.ones(layer.base_layer.weight.numel(), dtype=torch.bool)
    free[entries] = False
    expected = zoo().tower.head.weight.detach().clone()
    expected.view(-1)[free] += 1
    assert free.any() and len(entries)

    class AtOthers:
        def add_(self, number: int) -> None:
            layer.base_layer.weight.data.view(-1)[free] += number

    if edit is in_place:
        with torch.no_grad():
            layer.base_layer.weight.view(-1)[free] += 1
    else:
        AtOthers().add_(1)
    with model.disable_adapter():
        assert torch.equal(layer.base_layer.weight, expected)
    randomise(model, seed=2)
    outputs(model)
    assert torch.equal(model.state_dict()[f"{HEAD}.base_layer.weight"], expected)
    assert torch.equal(model.unload().tower.head.weight, expected)


@pytest.mark.parametrize("edit", [in_place, as_data])
def test_edits_while_the_adapter_is_off_or_merged_are_the_new_base(edit: Edit) -> None:
    model = tuned()
    outputs(model)
    with model.disable_adapter():
        edit(head(model).base_layer.weight)
    outputs(model)
    assert torch.equal(model.unload().tower.head.weight, zoo().tower.head.weight + 1)


def test_loading_a_whole_base_over_an_edited_one_works() -> None:
    model = tuned()
    expected, state = outputs(model), copy.deepcopy(model.state_dict())
    as_data(head(model).base_layer.weight)
    model.load_state_dict(state)
    assert torch.equal(outputs(model), expected)
    assert_same(model.unload().state_dict(), zoo().state_dict())


# --- what is read right after a step -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [True, False])
def test_weights_are_up_to_date_once_a_mode_was_set(mode: bool) -> None:
    model = tuned().train()
    optimizer = torch.optim.AdamW(values(model), lr=0.1)
    exact_loss(model, batches()[0]).backward()
    before = shown(model)
    optimizer.step()
    model.train(mode)
    found = shown(model)
    outputs(model)
    assert_same(found, shown(model))
    assert any(not torch.equal(found[name], before[name]) for name in found)


def test_a_training_step_waits_for_no_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each comparison waits for the device: all units are compared at once, a few times a step."""
    model = tuned().train()
    optimizer = torch.optim.SGD(values(model), lr=0.1)  # AdamW's steps are tensors that it reads
    calls: list[int] = []

    def counting(function: Callable[..., object]) -> Callable[..., object]:
        def count(*args: object) -> object:
            calls.append(1)
            return function(*args)

        return count

    def step() -> int:
        calls.clear()
        model.train()
        exact_loss(model, batches()[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
        return len(calls)

    step()
    monkeypatch.setattr(resident, "same_bits", counting(plan.same_bits))
    monkeypatch.setattr(torch, "equal", counting(torch.equal))
    monkeypatch.setattr(Tensor, "item", counting(Tensor.item))
    units = sum(len(layer.saft_values) for layer in model.modules() if isinstance(layer, SAFTLayer))
    fixed = step()
    assert 0 < fixed <= 4 and units > 6  # two comparisons, each counted twice
    assert step() == fixed
    calls.clear()
    model.eval()  # here each unit may
    assert len(calls) > fixed


# --- two processes -----------------------------------------------------------------------------------------------


def toggle(model: PeftModel, inputs: dict, ready: object) -> None:
    torch.set_num_threads(1)
    with model.disable_adapter(), torch.no_grad():
        model(inputs["pixel_values"], inputs["ids"])
        ready.send(None)
        ready.recv()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_with_shared_weights_does_not_change_anothers_predictions() -> None:
    model = tuned().eval()
    with torch.no_grad():
        expected = outputs(model)
        model.share_memory()
        torch.testing.assert_close(outputs(model), expected, rtol=1e-12, atol=1e-12)
        shared = outputs(model)
        here, there = get_context("fork").Pipe()
        process = get_context("fork").Process(target=toggle, args=(model, batches(1)[0], there), daemon=True)
        process.start()
        assert here.poll(60)
        here.recv()
        assert torch.equal(outputs(model), shared)  # while the adapter is off over there
        here.send(None)
        process.join(60)
    assert process.exitcode == 0
    with model.disable_adapter():
        assert torch.equal(outputs(model), outputs(zoo()))


def test_weights_shared_while_they_hold_values_cannot_be_taken_back() -> None:
    model = tuned()
    outputs(model)
    head(model).base_layer.weight.share_memory_()
    with pytest.raises(BaseWeightsError, match="replaced or shared.*tower.head"):
        model.unload()


def test_an_error_of_the_base_survives_a_pickle() -> None:
    model = tuned()
    outputs(model)
    as_data(head(model).base_layer.weight)
    with pytest.raises(BaseWeightsError) as error:
        model.unload()
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
