# SPDX-License-Identifier: Apache-2.0
"""What a PEFT user does with an adapter, for every method: one list of checks, as in PEFT's own testing_common.py."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn

from .methods import (
    CLIP,
    Method,
    adapter_tensors,
    all_families,
    assert_same,
    base_tensors,
    batch,
    logits,
    loss_fn,
    outputs,
    prefix_of,
    prepared,
    same_bits,
    shown_tensors,
    train,
    trained,
)
from .tiny_models import FAMILIES, recompute_activations, tiny_model

HALVES = [torch.bfloat16, torch.float16]


# --- at the start ---


@all_families
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_untrained_adapter_is_the_base(method: Method, family: str, dtype: torch.dtype) -> None:
    base = tiny_model(family).to(dtype)
    expected = outputs(base, family)
    torch.manual_seed(7)
    expected_in_training = logits(base.train(), batch(family)).detach()
    model = prepared(method, tiny_model(family).to(dtype), family)
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert same_bits(outputs(model.eval(), family), expected)
    torch.manual_seed(7)  # of the dropout
    in_training = logits(model.train(), batch(family))
    assert in_training.requires_grad
    assert same_bits(in_training.detach(), expected_in_training)


def test_untrained_adapter_keeps_negative_zeros(method: Method) -> None:
    base = tiny_model(CLIP)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                parameter.fill_(-0.0)
    expected = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = prepared(method, base, CLIP).eval()
    outputs(model)
    assert_same(shown_tensors(model), {name: expected[name] for name in shown_tensors(model)})
    assert_same(model.merge_and_unload().state_dict(), expected)


def test_only_the_adapter_is_trainable(method: Method, capsys: pytest.CaptureFixture[str]) -> None:
    base_size = sum(parameter.numel() for parameter in tiny_model(CLIP).parameters())
    model = prepared(method, tiny_model(CLIP), CLIP)
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(prefix_of(model) in name for name in trainable)
    size = sum(trainable.values())
    assert model.get_nb_trainable_parameters() == (size, base_size + size)
    model.print_trainable_parameters()
    assert f"trainable params: {size:,} || all params: {base_size + size:,}" in capsys.readouterr().out


def test_status(method: Method) -> None:
    model = prepared(method, tiny_model(CLIP), CLIP)
    status = model.get_model_status()
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.available_adapters == ["default"]
    assert status.merged_adapters == []
    assert status.requires_grad == {"default": True}
    assert status.peft_types == {"default": model.peft_config["default"].peft_type.value}
    assert status.devices == {"default": ["cpu"]}
    assert (status.trainable_params, status.total_params) == model.get_nb_trainable_parameters()
    layers = model.get_layer_status()
    assert len(layers) == status.num_adapter_layers > 0
    with_adapter = [layer for layer in layers if layer.available_adapters]
    assert with_adapter and all(layer.available_adapters == ["default"] for layer in with_adapter)
    assert all(layer.active_adapters == ["default"] and layer.enabled for layer in layers)
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


# --- training ---


@all_families
def test_first_step(method: Method, family: str) -> None:
    model = prepared(method, tiny_model(family), family)
    loss_fn(model.train(), batch(family)).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.any() != any(kind in name for kind in method.no_first_gradient), name
        else:
            assert parameter.grad is None, name
    losses = train(model, batch(family), steps=10)
    assert loss_fn(model, batch(family)) < losses[0] - 0.1


@pytest.mark.parametrize(
    ("family", "dtype", "steps"),
    [(family, torch.float32, 10) for family in FAMILIES]
    + [(CLIP, torch.float32, 100), (CLIP, torch.bfloat16, 100), ("siglip", torch.bfloat16, 20)],
    ids=str,
)
def test_base_is_bit_identical_after_training(method: Method, family: str, dtype: torch.dtype, steps: int) -> None:
    base = tiny_model(family).to(dtype)
    expected, modules = outputs(base, family), [(name, type(module)) for name, module in base.named_modules()]
    tensors = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = prepared(method, base, family)
    train(model, batch(family), steps)
    assert not torch.equal(outputs(model, family), expected)
    assert_same(base_tensors(model), tensors)
    with model.disable_adapter():
        shown = shown_tensors(model)  # before any forward
        assert_same(shown, {name: tensor for name, tensor in tensors.items() if name in shown})
        assert_same(base_tensors(model), tensors)
        assert same_bits(outputs(model, family), expected)
    unloaded = model.unload()
    assert same_bits(outputs(unloaded, family), expected)
    assert list(unloaded.state_dict()) == list(tensors)
    assert_same(unloaded.state_dict(), tensors)
    assert [(name, type(module)) for name, module in unloaded.named_modules()] == modules


def test_two_runs_give_the_same_adapter(method: Method) -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(adapter_tensors(trained(method, "vision-text-dual-encoder")))  # the family with dropout
        torch.rand(3)
    assert runs[0] and all(tensor.any() for tensor in runs[0].values())
    assert_same(runs[0], runs[1])


@all_families
def test_gradient_checkpointing_gives_the_same_gradients(method: Method, family: str) -> None:
    model = trained(method, family).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            base = model.get_base_model()
            parts = [base] if base.supports_gradient_checkpointing else [base.vision_model, base.text_model]
            for part in parts:
                recompute_activations(part, {"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(7)
        calls = _count_calls(model)
        loss = loss_fn(model, batch(family))
        in_forward = len(calls)
        loss.backward()
        assert (len(calls) > in_forward) == checkpointing  # the blocks have run again
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0]
    assert_same(gradients[1], gradients[0])


def _count_calls(model: nn.Module) -> list[nn.Module]:
    calls: list[nn.Module] = []
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.register_forward_pre_hook(lambda module, args: calls.append(module))
    return calls


# --- number formats ---


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@all_families
def test_values_stay_float32(method: Method, dtype: torch.dtype, family: str, tmp_path: Path) -> None:
    model = trained(method, family)
    values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    model.to(dtype)
    assert {p.dtype for p in values.values()} == {torch.float32}
    assert_same({name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, values)
    assert_same(base_tensors(model), tiny_model(family).to(dtype).state_dict())
    # the same as the adapter put on a base that has been in that format all along
    for low_memory in (False, True):
        base = tiny_model(family).to(dtype)
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_memory)
        assert_same({name: p.detach() for name, p in loaded.named_parameters() if name in values}, values)
        assert same_bits(outputs(model, family), outputs(loaded, family))
    with model.disable_adapter():
        assert same_bits(outputs(model, family), outputs(tiny_model(family).to(dtype), family))


def test_double(method: Method, tmp_path: Path) -> None:
    model = trained(method)
    expected = outputs(model)
    model.double()
    assert_same(base_tensors(model), tiny_model(CLIP).double().state_dict())
    found = outputs(model)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-4)
    before = loss_fn(model, batch(CLIP))
    train(model, batch(CLIP))
    assert loss_fn(model, batch(CLIP)) < before
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(tiny_model(CLIP).double(), tmp_path)
    assert same_bits(outputs(loaded), outputs(model))


# --- modules_to_save ---


def test_modules_to_save(method: Method, tmp_path: Path) -> None:
    model = trained(method, modules_to_save=["visual_projection"])
    inside = [name for name, p in model.named_parameters() if "visual_projection" in name and p.requires_grad]
    assert inside == ["base_model.model.visual_projection.modules_to_save.default.weight"]
    assert not any("visual_projection" in name for name in adapter_tensors(model))
    weight = model.get_parameter(inside[0])
    assert not torch.equal(weight, tiny_model(CLIP).visual_projection.weight)
    expected = outputs(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    names = [name for name in load_file(tmp_path / "adapter_model.safetensors") if prefix_of(model) not in name]
    assert names == ["base_model.model.visual_projection.weight"]
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(tiny_model(CLIP), tmp_path, low_cpu_mem_usage=low_memory)
        assert same_bits(outputs(loaded), expected)
    assert_same(base_tensors(model), tiny_model(CLIP).state_dict())
    with model.disable_adapter():
        assert same_bits(outputs(model), outputs(tiny_model(CLIP)))
    assert same_bits(outputs(model), expected)
    merged = model.merge_and_unload()
    assert same_bits(outputs(merged), expected)
    assert list(merged.state_dict()) == list(tiny_model(CLIP).state_dict())


# --- copies ---


def through_pickle(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("family", [CLIP, "siglip"])
@pytest.mark.parametrize("clone", [copy.deepcopy, through_pickle])
def test_copies_are_independent(method: Method, family: str, clone: Callable[[nn.Module], nn.Module]) -> None:
    model = trained(method, family)
    expected, base = outputs(model, family), outputs(tiny_model(family), family)
    twin = clone(model)
    assert_same(twin.state_dict(), model.state_dict())
    assert same_bits(outputs(twin, family), expected)
    train(twin, batch(family))
    further = outputs(twin, family)
    assert not torch.equal(further, expected)
    assert same_bits(outputs(model, family), expected)
    train(model, batch(family, seed=1))
    assert same_bits(outputs(twin, family), further)
    for one in (model, twin):
        assert_same(base_tensors(one), tiny_model(family).state_dict())
        with one.disable_adapter():
            assert same_bits(outputs(one, family), base)
    assert same_bits(outputs(twin, family), further)


def test_copy_of_a_disabled_and_of_a_merged_model(method: Method) -> None:
    model = trained(method)
    expected, base = outputs(model), outputs(tiny_model(CLIP))
    with model.disable_adapter():
        twin = copy.deepcopy(model)
        assert same_bits(outputs(twin), base)
    twin.base_model.enable_adapter_layers()
    assert same_bits(outputs(twin), expected)
    model.merge_adapter()
    twin = through_pickle(model)
    assert same_bits(outputs(twin), expected)
    twin.unmerge_adapter()
    assert same_bits(outputs(twin), expected)
    assert_same(base_tensors(twin), tiny_model(CLIP).state_dict())


# --- the whole forward ---


@all_families
def test_forward_of_the_wrapped_model(method: Method, family: str) -> None:
    model = trained(method, family)
    inputs = {name: tensor for name, tensor in batch(family).items() if name != "labels"}
    with torch.no_grad():
        found = model(**inputs).logits_per_image
    torch.testing.assert_close(found, outputs(model, family))
