# SPDX-License-Identifier: Apache-2.0
"""What a PEFT user does with an adapter, for every method: one list of checks, as in PEFT's own testing_common.py."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModel, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from .methods import (
    METHODS,
    Method,
    adapter_tensors,
    add,
    assert_same,
    base_names,
    base_tensors,
    batch,
    logits,
    loss_fn,
    merged_tensors,
    outputs,
    prefix_of,
    prepared,
    same_bits,
    shown_tensors,
    train,
    trained,
)
from .tiny_models import FAMILIES, tiny_model

CLIP = "clip"
HALVES = [torch.bfloat16, torch.float16]
all_families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module", params=METHODS, ids=lambda method: method.name)
def method(request: pytest.FixtureRequest) -> Method:
    return request.param


@pytest.fixture
def saft() -> Method:
    return next(method for method in METHODS if method.name == "SAFT")


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
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
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
                part.activation_checkpointing_enable({"use_reentrant": False})
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


# --- saving and loading ---


@dataclass(frozen=True)
class Saved:
    family: str
    base: Path
    adapter: Path
    config: PeftConfig
    prefix: str
    logits: Tensor
    base_logits: Tensor


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, method: Method, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    family, folder = request.param, tmp_path_factory.mktemp("saved")
    base = tiny_model(family)
    base.save_pretrained(folder / "base")
    base_logits = outputs(base, family)
    torch.manual_seed(0)
    model = prepared(method, type(base).from_pretrained(folder / "base"), family)
    train(model, batch(family))
    model.save_pretrained(folder / "adapter")
    found = outputs(model, family)
    assert (found - base_logits).abs().max() > 1e-2
    config = model.peft_config["default"]
    return Saved(family, folder / "base", folder / "adapter", config, prefix_of(model), found, base_logits)


def fresh_base(saved: Saved) -> nn.Module:
    return type(tiny_model(saved.family)).from_pretrained(saved.base)


def by_peft(saved: Saved) -> nn.Module:
    return PeftModel.from_pretrained(fresh_base(saved), saved.adapter)


def by_peft_without_memory(saved: Saved) -> nn.Module:
    return PeftModel.from_pretrained(fresh_base(saved), saved.adapter, low_cpu_mem_usage=True)


def by_auto_class(saved: Saved) -> nn.Module:
    return AutoPeftModel.from_pretrained(str(saved.adapter))


def as_second_adapter(saved: Saved) -> nn.Module:
    model = by_peft(saved)
    model.load_adapter(str(saved.adapter), "second")
    model.set_adapter("second", inference_mode=True)
    model.delete_adapter("default")
    return model


def as_second_adapter_without_memory(saved: Saved) -> nn.Module:
    model = by_peft(saved)
    model.load_adapter(str(saved.adapter), "second", low_cpu_mem_usage=True)
    model.set_adapter("second", inference_mode=True)
    return model


def by_transformers(saved: Saved) -> nn.Module:
    model = fresh_base(saved)
    model.load_adapter(str(saved.adapter))
    return model


@pytest.mark.parametrize(
    "load",
    [
        by_peft,
        by_peft_without_memory,
        by_auto_class,
        as_second_adapter,
        as_second_adapter_without_memory,
        by_transformers,
    ],
)
def test_reloaded_adapter_gives_the_same_logits(saved: Saved, load: Callable[[Saved], nn.Module]) -> None:
    torch.manual_seed(123)
    model = load(saved).eval()
    assert same_bits(outputs(model, saved.family), saved.logits)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_transformers_can_disable_a_loaded_adapter(saved: Saved) -> None:
    model = by_transformers(saved).eval()
    model.disable_adapters()
    assert same_bits(outputs(model, saved.family), saved.base_logits)
    model.enable_adapters()
    assert same_bits(outputs(model, saved.family), saved.logits)


def test_training_goes_on_after_loading(saved: Saved) -> None:
    model = PeftModel.from_pretrained(fresh_base(saved), saved.adapter, is_trainable=True)
    before = loss_fn(model.eval(), batch(saved.family))
    train(model, batch(saved.family))
    assert loss_fn(model, batch(saved.family)) < before
    with model.disable_adapter():
        assert same_bits(outputs(model, saved.family), saved.base_logits)


def test_saving_again_gives_the_same_bytes(saved: Saved, tmp_path: Path) -> None:
    model = by_peft(saved)
    model.save_pretrained(tmp_path / "again")
    with model.disable_adapter():
        model.save_pretrained(tmp_path / "disabled")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    for folder in ("again", "disabled", "merged"):
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / folder / file).read_bytes() == (saved.adapter / file).read_bytes(), (folder, file)


def test_files_hold_the_adapter_alone(saved: Saved) -> None:
    tensors = load_file(saved.adapter / "adapter_model.safetensors")
    assert tensors and all(saved.prefix in name for name in tensors)
    written = json.loads((saved.adapter / "adapter_config.json").read_text())
    assert written["peft_type"] == saved.config.peft_type.value
    reloaded = PeftConfig.from_pretrained(saved.adapter)
    assert type(reloaded) is type(saved.config)
    assert reloaded == replace(saved.config, inference_mode=True, auto_mapping=written["auto_mapping"])  # PEFT's own


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
    values = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        values[-1].view(-1)[0] = torch.nan  # in the last layer: those before it can be merged
    with pytest.raises((ValueError, ArithmeticError), match="(?i)nan"):
        getattr(model, merge)(safe_merge=True)
    assert_same(base_tensors(model), base.state_dict())
    with model.disable_adapter():
        assert same_bits(outputs(model), outputs(base))
    assert same_bits(outputs(model.unload()), outputs(base))


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


# --- the state dict ---


@all_families
def test_state_dict_goes_back_in(method: Method, family: str) -> None:
    model = trained(method, family)
    state, expected = copy.deepcopy(model.state_dict()), outputs(model, family)
    train(model, batch(family, seed=1))
    assert not torch.equal(outputs(model, family), expected)
    model.load_state_dict(state)
    assert same_bits(outputs(model, family), expected)
    assert_same(model.state_dict(), state)


@all_families
def test_loading_another_base_keeps_the_adapter(method: Method, family: str, tmp_path: Path) -> None:
    model, other = trained(method, family), tiny_model(family, seed=1)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    before, adapter = outputs(model, family), adapter_tensors(model)
    names = base_names(model)
    assert set(names) == set(other.state_dict())
    report = model.load_state_dict({names[name]: t for name, t in other.state_dict().items()}, strict=False)
    assert report.unexpected_keys == []
    assert_same(base_tensors(model), other.state_dict())
    assert_same(adapter_tensors(model), adapter)
    assert not torch.equal(outputs(model, family), before)
    expected = PeftModel.from_pretrained(tiny_model(family, seed=1), tmp_path)
    assert same_bits(outputs(model, family), outputs(expected, family))
    with model.disable_adapter():
        assert same_bits(outputs(model, family), outputs(other, family))


@all_families
def test_saft_shows_effective_weights_as_parameters(saft: Method, family: str) -> None:
    """The state dict holds the base's own numbers; `named_parameters` those the forward uses."""
    model, base = trained(saft, family), tiny_model(family)
    shown = shown_tensors(model)
    add(saft, model, family, "second")
    model.set_adapter("second")  # untrained; shown at once, before any forward
    assert_same(shown_tensors(model), {name: base.state_dict()[name] for name in shown})
    model.set_adapter("default")
    merged = merged_tensors(model, ["default"])
    assert_same(shown, {name: merged[name] for name in shown})
    assert any(not torch.equal(tensor, base.state_dict()[name]) for name, tensor in shown.items())
    base.load_state_dict(merged)
    assert same_bits(outputs(model, family), outputs(base, family))
    assert_same(base_tensors(model), tiny_model(family).state_dict())


# --- the whole forward ---


@all_families
def test_forward_of_the_wrapped_model(method: Method, family: str) -> None:
    model = trained(method, family)
    inputs = {name: tensor for name, tensor in batch(family).items() if name != "labels"}
    with torch.no_grad():
        found = model(**inputs).logits_per_image
    torch.testing.assert_close(found, outputs(model, family))
