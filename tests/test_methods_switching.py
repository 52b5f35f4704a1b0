# SPDX-License-Identifier: Apache-2.0
"""Two adapters, disabling and merging, for every method."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from .methods import (
    CLIP,
    Method,
    adapter_tensors,
    add,
    all_families,
    assert_same,
    base_tensors,
    batch,
    logits,
    merged_tensors,
    outputs,
    prefix_of,
    prepared,
    same_bits,
    shown_tensors,
    spoil,
    train,
    trained,
)
from .tiny_models import tiny_model

# --- two adapters ---


@pytest.fixture
def two(method: Method) -> tuple[PeftModel, Tensor, Tensor]:
    """A model with two trained adapters, the first active, and the outputs of each."""
    model = trained(method)
    first, tensors = outputs(model), adapter_tensors(model)
    add(method, model, CLIP, "second")
    assert same_bits(outputs(model), first)  # it is not active yet
    assert all(".default" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    model.set_adapter("second")
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and all(".second" in name for name in trainable)
    assert same_bits(outputs(model), outputs(tiny_model(CLIP)))
    train(model, batch(CLIP, seed=1))
    second = outputs(model)
    assert not torch.allclose(second, first, atol=1e-2)
    assert_same({name: adapter_tensors(model)[name] for name in tensors}, tensors)
    model.set_adapter("default")
    return model, first, second


def test_switching(two: tuple[PeftModel, Tensor, Tensor]) -> None:
    model, first, second = two
    assert same_bits(outputs(model), first)
    for name, expected in (("second", second), ("second", second), ("default", first), ("second", second)):
        model.set_adapter(name)
        assert same_bits(outputs(model), expected)
        assert_same(base_tensors(model), tiny_model(CLIP).state_dict())
    assert model.get_model_status().active_adapters == ["second"]


def test_both_active_are_the_sum(two: tuple[PeftModel, Tensor, Tensor]) -> None:
    model, first, _ = two
    base = tiny_model(CLIP).state_dict()
    one, other = merged_tensors(model, ["default"]), merged_tensors(model, ["second"])
    model.base_model.set_adapter(["default", "second"])
    with_both, both = outputs(model), merged_tensors(model, ["default", "second"])
    assert any(((one[n] != base[n]) & (other[n] != base[n])).any() for n in base)  # some entries belong to both
    for name in base:
        torch.testing.assert_close(both[name], one[name] + other[name] - base[name], msg=name)
    by_hand = tiny_model(CLIP)
    by_hand.load_state_dict({name: one[name] + other[name] - base[name] for name in base})
    torch.testing.assert_close(with_both, outputs(by_hand), rtol=1e-4, atol=1e-4)
    model.set_adapter("default")
    assert same_bits(outputs(model), first)


def test_training_both_at_once(two: tuple[PeftModel, Tensor, Tensor]) -> None:
    model, first, second = two
    model.base_model.set_adapter(["default", "second"])
    before = adapter_tensors(model)
    train(model, batch(CLIP))
    moved = [name for name, tensor in adapter_tensors(model).items() if not torch.equal(tensor, before[name])]
    assert any(".default" in name for name in moved) and any(".second" in name for name in moved)
    for name, old in (("default", first), ("second", second)):
        model.set_adapter(name)
        assert not torch.equal(outputs(model), old)
    with model.disable_adapter():
        assert same_bits(outputs(model), outputs(tiny_model(CLIP)))


@pytest.mark.parametrize("active", ["default", "second"])
@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning")
def test_deleting(two: tuple[PeftModel, Tensor, Tensor], active: str) -> None:
    """Deletes the inactive adapter, or the active one, whose place the other takes."""
    model, first, _ = two
    model.set_adapter(active)
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    assert not any(".second" in name for name in model.state_dict())
    assert same_bits(outputs(model), first)
    with model.disable_adapter():
        assert same_bits(outputs(model), outputs(tiny_model(CLIP)))
    assert_same(base_tensors(model), tiny_model(CLIP).state_dict())


def test_two_adapters_saved(two: tuple[PeftModel, Tensor, Tensor], tmp_path: Path) -> None:
    model, first, second = two
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(tiny_model(CLIP), tmp_path)
    loaded.load_adapter(str(tmp_path / "second"), "second")
    assert same_bits(outputs(loaded), first)
    loaded.set_adapter("second")
    assert same_bits(outputs(loaded), second)


# --- disabling and merging ---


def test_disabling(method: Method) -> None:
    model, base = trained(method), outputs(tiny_model(CLIP))
    expected = outputs(model)
    with torch.no_grad(), model.disable_adapter():
        assert same_bits(logits(model, batch(CLIP)), base)
    with model.disable_adapter(), torch.no_grad():
        assert same_bits(logits(model, batch(CLIP)), base)
    with torch.inference_mode():
        assert same_bits(logits(model, batch(CLIP)).clone(), expected)
        with model.disable_adapter():
            assert same_bits(logits(model, batch(CLIP)).clone(), base)
    with pytest.raises(KeyError, match="stop"), model.disable_adapter():
        raise KeyError("stop")
    assert same_bits(outputs(model), expected)
    assert same_bits(logits(model, batch(CLIP)).detach(), expected)  # with gradients
    assert all(p.requires_grad == (prefix_of(model) in name) for name, p in model.named_parameters())


def test_merging_and_unmerging(method: Method) -> None:
    model, theta0 = trained(method), tiny_model(CLIP).state_dict()
    expected, adapter, shown = outputs(model), adapter_tensors(model), shown_tensors(model)
    model.merge_adapter()
    merged = base_tensors(model)
    assert same_bits(outputs(model), expected)
    assert any(not torch.equal(merged[name], theta0[name]) for name in theta0)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert_same(base_tensors(model), merged)
    assert same_bits(outputs(model), expected)
    model.unmerge_adapter()
    assert_same(base_tensors(model), theta0)
    assert_same(adapter_tensors(model), adapter)
    assert_same(shown_tensors(model), shown)
    assert same_bits(outputs(model), expected)


def test_disabling_while_merged_unmerges(method: Method) -> None:
    model = trained(method)
    expected = outputs(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert_same(base_tensors(model), tiny_model(CLIP).state_dict())  # before any forward
        assert same_bits(outputs(model), outputs(tiny_model(CLIP)))
    assert same_bits(outputs(model), expected)
    assert model.get_model_status().merged_adapters == []


@all_families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_and_unload(method: Method, family: str, dtype: torch.dtype) -> None:
    base = tiny_model(family).to(dtype)
    model = trained(method, family, dtype)
    expected = outputs(model, family)
    merged = model.merge_and_unload()
    assert [(n, type(m)) for n, m in merged.named_modules()] == [(n, type(m)) for n, m in base.named_modules()]
    theta0 = base.state_dict()
    assert {n: t.dtype for n, t in merged.state_dict().items()} == {n: t.dtype for n, t in theta0.items()}
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in merged.modules())
    assert same_bits(outputs(merged, family), expected)
    again = prepared(method, merged, family)  # PEFT warns when it finds its own traces
    assert same_bits(outputs(again.eval(), family), expected)


def test_merging_the_inactive_adapter(two: tuple[PeftModel, Tensor, Tensor]) -> None:
    model, _, second = two
    expected = merged_tensors(model, ["second"])
    merged = model.merge_and_unload(adapter_names=["second"])
    assert_same(merged.state_dict(), expected)
    assert same_bits(outputs(merged), second)


def test_safe_merge_of_finite_values(method: Method) -> None:
    model = trained(method)
    expected = outputs(model)
    model.merge_adapter(safe_merge=True)
    assert model.get_model_status().merged_adapters == ["default"]
    assert same_bits(outputs(model), expected)
    model.unmerge_adapter()
    assert same_bits(outputs(model.merge_and_unload(safe_merge=True)), expected)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_refuses_nan(method: Method, merge: str) -> None:
    model, base = trained(method), tiny_model(CLIP)
    spoil(model, torch.nan)
    with pytest.raises((ValueError, ArithmeticError), match="(?i)nan"):
        getattr(model, merge)(safe_merge=True)
    assert_same(base_tensors(model), base.state_dict())
    with model.disable_adapter():
        assert same_bits(outputs(model), outputs(base))
    assert same_bits(outputs(model.unload()), outputs(base))
