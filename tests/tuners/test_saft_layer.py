# SPDX-License-Identifier: Apache-2.0
"""What the generic checks cannot know: where the values live, and what autograd, compilers and files do to them."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from hf_robust import SAFTConfig, export_shira, select_saft
from hf_robust.errors import AdapterFileError, BaseWeightsError, ConfigError
from hf_robust.tuners.saft import exports_to_shira, resident
from hf_robust.tuners.saft.plan import Plan, same_bits

from ..programs import run_programs
from ..tiny_models import tiny_batch, tiny_model
from .zoo import batches, outputs, randomise, tuned, zoo


def gradients(model: nn.Module) -> list[Tensor]:
    for parameter in model.parameters():
        parameter.grad = None
    outputs(model).square().sum().backward()
    return [p.grad.clone() for n, p in model.named_parameters() if "saft_values" in n]


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten().view(torch.uint8)


# --- in place and out of place -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_both_paths_agree_bit_for_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned(dtype=dtype)
    with torch.no_grad():
        in_place = outputs(model, dtype)
        assert not torch.equal(in_place, outputs(zoo(dtype), dtype))
        monkeypatch.setattr(Plan, "is_writable", lambda plan, base_layer: False)
        other = get_peft_model(zoo(dtype), SAFTConfig(density=0.3, score="random"))
        select_saft(other)
        randomise(other)
        assert torch.equal(outputs(other, dtype), in_place)
    for (name, parameter), original in zip(
        other.base_model.model.named_parameters(), zoo(dtype).parameters(), strict=False
    ):
        if "saft_values" not in name and name == "scale":
            assert torch.equal(parameter, original)


def test_the_base_is_not_written_out_of_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plan, "is_writable", lambda plan, base_layer: False)
    model = tuned()
    outputs(model)
    base = dict(zoo().named_parameters())
    for name, parameter in model.base_model.model.named_parameters():
        if "saft_values" not in name:
            assert torch.equal(parameter, base[name.replace("base_layer.", "")])


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function:DeprecationWarning")  # dynamo's own
def test_compiles_without_graph_breaks_to_the_same_numbers() -> None:
    model = tuned()
    expected, expected_gradients = outputs(model).detach(), gradients(model)
    compiled = torch.compile(model.base_model.model.tower, backend="aot_eager", fullgraph=True)
    batch = batches(1)[0]
    result = 1.5 * compiled(batch["pixel_values"], batch["ids"])
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    for parameter in model.parameters():
        parameter.grad = None
    result.square().sum().backward()
    found = [p.grad for n, p in model.named_parameters() if "saft_values" in n]
    for got, want in zip(found, expected_gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(1.5 * compiled(batch["pixel_values"], batch["ids"]).detach(), outputs(zoo()))


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = get_peft_model(zoo(), SAFTConfig(density=0.3, score="random"))
        select_saft(model)
        assert torch.equal(outputs(model), outputs(zoo()))
        randomise(model)
        found = outputs(model)
    torch.testing.assert_close(found.clone(), outputs(tuned()).detach(), rtol=1e-12, atol=1e-12)


def test_replacing_the_base_while_it_holds_values_is_an_error() -> None:
    model = tuned()
    outputs(model)
    head = model.base_model.model.tower.head.base_layer
    head.weight = nn.Parameter(head.weight.detach().clone())
    randomise(model, seed=2)
    with pytest.raises(BaseWeightsError, match="replaced or shared"):
        outputs(model)


# --- autograd ----------------------------------------------------------------------------------------------------


def test_a_backward_through_changed_values_is_refused_by_autograd() -> None:
    model = tuned()
    loss = outputs(model).sum()
    randomise(model, seed=2)
    outputs(model)  # writes the new values
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_backward_inside_disable_adapter_is_refused() -> None:
    model = tuned()
    loss = outputs(model).sum()
    with model.disable_adapter(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("writable", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputing_a_block_inside_disable_adapter_is_refused(
    writable: bool, reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpointed blocks would run as θ₀ and silently give no gradient."""
    if not writable:
        monkeypatch.setattr(Plan, "is_writable", lambda plan, base_layer: False)
    model = tuned()
    model.base_model.model.tower.checkpointing = reentrant
    loss = outputs(model).sum()
    with model.disable_adapter(), pytest.raises(RuntimeError, match="inside disable_adapter|inplace operation"):
        loss.backward()


def test_version_counters_come_back_with_the_bits() -> None:
    """The one private call of torch this rests on: counters of a state are those it had before."""
    model = tuned()
    outputs(model)
    weight = model.base_model.model.tower.head.base_layer.weight
    written = weight._version
    with model.disable_adapter():
        original = weight._version
        assert original != written
    assert weight._version == written
    with model.disable_adapter():
        assert weight._version == original
    randomise(model, seed=2)
    outputs(model)
    assert weight._version not in (original, written)


def test_data_edits_are_seen_at_the_next_forward() -> None:
    """They move no version counter; optimizers with kernels of their own write like this."""
    model, expected = tuned(), tuned()
    outputs(model)
    randomise(expected, seed=2)
    for (name, mine), (_, theirs) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        if "saft_values" in name:
            mine.data.copy_(theirs.data)
    assert torch.equal(outputs(model), outputs(expected))


def test_fused_optimizers_are_seen_with_two_comparisons_a_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default of `Trainer`: it moves no version counter, and each comparison waits for the device."""
    model, expected, calls = tuned(), tuned(), []
    for one, fused in ((model, True), (expected, False)):
        values = [p for n, p in one.named_parameters() if "saft_values" in n]
        optimizer = torch.optim.AdamW(values, lr=1e-2, fused=fused)
        for step in range(4):
            if step == 3:
                monkeypatch.setattr(
                    resident, "same_bits", lambda *_, fused=fused: calls.append(fused) or same_bits(*_)
                )
            optimizer.zero_grad()
            outputs(one).square().sum().backward()
            optimizer.step()
        monkeypatch.undo()
    assert calls == [True, True, False]  # of values, known without for the plain optimizer, and of the base
    torch.testing.assert_close(outputs(model), outputs(expected), rtol=1e-9, atol=1e-9)


def test_autocast_trains_in_the_low_precision_with_float32_gradients() -> None:
    model = tuned(dtype=torch.float32)
    exact = tuned(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = outputs(model, torch.float32)
    assert out.dtype == torch.bfloat16 or out.dtype == torch.float32
    out.float().square().sum().backward()
    gradients(exact)
    for (name, mine), (_, theirs) in zip(model.named_parameters(), exact.named_parameters(), strict=True):
        if "saft_values" in name:
            assert mine.grad.dtype == torch.float32
            cosine = torch.cosine_similarity(mine.grad.double(), theirs.grad, dim=0)
            assert cosine > 0.99, name


def test_a_linear_called_with_a_keyword_gets_the_same_gradient() -> None:
    grads = []
    for call in (lambda head, x: head(x), lambda head, x: head(input=x)):
        model = tuned()
        head = model.base_model.model.tower.head
        call(head, torch.ones(2, 8, dtype=torch.float64)).square().sum().backward()
        grads.append(head.saft_values["default"].grad)
    torch.testing.assert_close(grads[1], grads[0])
    assert grads[0].abs().sum() > 0


def test_hooks_on_a_base_layer_still_run() -> None:
    model = tuned()
    calls = []
    model.base_model.model.tower.head.base_layer.register_forward_hook(lambda *a: calls.append(1))
    gradients(model)
    assert calls == [1]


# --- the base ----------------------------------------------------------------------------------------------------


def test_negative_zero_keeps_its_sign() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight.fill_(-0.0)
    before = bits(model[0].weight).clone()
    wrapped = get_peft_model(model, SAFTConfig(density=1.0, score="random"))
    select_saft(wrapped)
    wrapped(torch.ones(1, 4))
    assert torch.equal(bits(wrapped.base_model.model[0].base_layer.weight), before)


def test_one_module_at_two_paths_has_one_wrapper_and_comes_back_at_both() -> None:
    model = tuned()
    tower = model.base_model.model.tower
    assert tower.alias is tower.block.twice
    plain = model.unload()
    assert plain.tower.alias is plain.tower.block.twice and type(plain.tower.alias) is nn.Linear


def test_unload_leaves_nothing_behind() -> None:
    model = tuned()
    outputs(model)
    plain = model.unload()
    assert not any(module._forward_pre_hooks for module in plain.modules())
    for (name, got), (expected_name, expected) in zip(
        plain.state_dict().items(), zoo().state_dict().items(), strict=True
    ):
        assert name == expected_name and torch.equal(bits(got), bits(expected))


def test_weights_that_are_not_contiguous_go_out_of_place() -> None:
    model, expected = tuned(dtype=torch.float32), tuned(dtype=torch.float32)
    model.to(memory_format=torch.channels_last)
    convolution = model.base_model.model.tower.patches.base_layer.convolution
    assert not convolution.weight.is_contiguous()
    with torch.no_grad():
        torch.testing.assert_close(outputs(model, torch.float32), outputs(expected, torch.float32))


def test_moving_to_another_type_moves_the_base_and_keeps_the_values() -> None:
    model = tuned(dtype=torch.float32)
    values = {n: p.detach().clone() for n, p in model.named_parameters() if "saft_values" in n}
    model.to(torch.bfloat16)
    expected = zoo(torch.float32).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "saft_values" in name:
            assert torch.equal(parameter, values[name])
    with model.disable_adapter():
        assert torch.equal(outputs(model, torch.bfloat16), outputs(expected, torch.bfloat16))


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda i: torch.cat([i[:-1], i[-1:] + 10**6]), "outside the module"),
        (lambda i: torch.cat([-1 - i[:1], i[1:]]), "outside the module"),
        (lambda i: torch.cat([i[1:2], i[1:]]), "not strictly increasing"),
        (lambda i: i.flip(0), "not strictly increasing|outside"),
        (lambda i: i.float(), "got 'torch.float32'; allowed int32 or int64"),
    ],
)
def test_indices_are_checked_before_use(damage: object, message: str) -> None:
    model = tuned()
    expected = outputs(model)
    tensors = get_peft_model_state_dict(model)
    del tensors["base_model.model.tower.tokens.saft_sha256"]
    key = next(k for k in tensors if k.endswith("twice.saft_indices"))
    tensors[key] = damage(tensors[key])
    with pytest.raises(AdapterFileError, match=message):
        set_peft_model_state_dict(model, tensors)
    assert torch.equal(outputs(model), expected)


LINEARS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def test_export_to_a_process_without_hf_robust(tmp_path: Path) -> None:
    base = tiny_model("clip")
    model = get_peft_model(
        copy.deepcopy(base), SAFTConfig(density=0.02, score="random", target_modules=LINEARS, exclude_modules=["bias"])
    )
    select_saft(model)
    randomise(model)
    batch = {"pixel_values": tiny_batch("clip", 3)["pixel_values"], "input_ids": torch.tensor([[5, 6, 2]] * 2)}
    with torch.no_grad():
        logits = model(**batch).logits_per_image
        assert not torch.allclose(logits, base(**batch).logits_per_image)
    base.save_pretrained(tmp_path / "base")
    assert exports_to_shira(model)
    export_shira(model, tmp_path / "shira")
    torch.save(batch, tmp_path / "batch.pt")
    script = """
import sys, torch
from peft import PeftModel
from transformers import CLIPModel
folder = sys.argv[1]
model = PeftModel.from_pretrained(CLIPModel.from_pretrained(folder + "/base"), folder + "/shira").eval()
with torch.no_grad():
    torch.save(model(**torch.load(folder + "/batch.pt")).logits_per_image, folder + "/logits.pt")
    torch.save(model.merge_and_unload()(**torch.load(folder + "/batch.pt")).logits_per_image, folder + "/merged.pt")
assert not any(name.startswith("hf_robust") for name in sys.modules)
"""
    run_programs([sys.executable, "-c", script, str(tmp_path)])
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.load(tmp_path / "merged.pt"), logits, rtol=1e-5, atol=1e-5)


def test_export_refuses_entries_outside_linear_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"only entries in the weights of Linear.*tower\.patches \(\d+ entries\)"):
        export_shira(tuned(), tmp_path / "shira")
    dense = tuned(density=0.9, target_modules=["twice", "head"], exclude_modules=["bias"])
    with pytest.raises(ConfigError, match="SHiRA needs as many entries"):
        export_shira(dense, tmp_path / "shira")
    unselected = get_peft_model(tiny_model("clip"), SAFTConfig(target_modules=LINEARS, exclude_modules=["bias"]))
    assert not any(map(exports_to_shira, (tuned(), dense, unselected, tiny_model("clip"))))
    assert not (tmp_path / "shira").exists()
