# SPDX-License-Identifier: Apache-2.0
"""R-Adapter's averages: they follow every step of an optimizer, and nothing else."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import TrainerCallback

from hf_robust import OGENConfig, OGENLoss, RAdapterConfig, wise_ft
from hf_robust.errors import ConfigError
from hf_robust.training.losses import StartingPoint
from hf_robust.tuners.radapter import averages
from tests.methods import CLIP, adapter_tensors, assert_same, batch, loss_fn, outputs, same_bits, train
from tests.tiny_models import tiny_model
from tests.trainers import build, same, weights
from tests.tuners.test_radapter import INNER, adapted, fill, linear


@pytest.mark.parametrize(("decay", "told"), [(0.999, "In 3 steps .*'default'.* comes 0 % of the way"), (0.5, None)])
def test_an_average_that_a_training_is_too_short_for_is_told(tmp_path, caplog, decay, told):
    model = get_peft_model(tiny_model(CLIP), RAdapterConfig(average_decay=decay))
    build(tmp_path, model=model, max_steps=3).train()
    found = [record.getMessage() for record in caplog.records if "of the way" in record.getMessage()]
    assert len(found) == (told is not None) and all(re.search(told, message) for message in found)


@given(steps=st.integers(1, 6), decay=st.floats(0, 0.99))
@settings(max_examples=15)
def test_average_of_a_constant(steps: int, decay: float) -> None:
    """After t steps it is (1 - mᵗ) F, and σ's has stayed where it was."""
    model = get_peft_model(nn.Sequential(nn.Linear(3, 2)).double(), RAdapterConfig(target_modules=["0"]))
    layer = model.base_model.model[0]
    layer.configs["default"].average_decay = decay
    weight, scale = layer.radapter_weight["default"], layer.radapter_scale["default"]
    with torch.no_grad():
        weight.copy_(torch.tensor([[1.0, -2.0], [0.5, 3.0]]))
    optimizer = torch.optim.SGD([weight, scale], lr=0.0)
    for _ in range(steps):
        weight.grad, scale.grad = torch.ones_like(weight), torch.ones_like(scale)
        optimizer.step()
    expected = (1 - decay**steps) * weight.detach()
    torch.testing.assert_close(layer.radapter_average_weight["default"], expected, rtol=1e-10, atol=1e-12)
    assert same_bits(layer.radapter_average_scale["default"], scale.detach())


@pytest.mark.parametrize("r", [None, 2])
@pytest.mark.parametrize("kind", ["foreach", "fused", "sgd"])
def test_average_follows_any_loop(r: int | None, kind: str) -> None:
    """With accumulated gradients, evaluations in between, and another optimizer in the same process."""
    model = adapted(r=r, average_decay=0.8).train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    options: dict[str, Any] = {} if kind == "sgd" else {kind: True}
    make: Any = torch.optim.SGD if kind == "sgd" else torch.optim.AdamW
    optimizer, other = make(trained.values(), lr=0.01, **options), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1)
    expected = {name: p.detach().clone() for name, p in trained.items()}
    for _ in range(3):
        optimizer.zero_grad()
        for seed in (0, 1):
            loss_fn(model, batch(CLIP, seed)).backward()
        optimizer.step()
        other.step()
        outputs(model.eval())
        model.train()
        expected = {name: 0.8 * mean + 0.2 * trained[name].detach() for name, mean in expected.items()}
    state = model.state_dict()
    for name, mean in expected.items():
        torch.testing.assert_close(state[name.replace("radapter_", "radapter_average_")], mean, rtol=1e-6, atol=1e-8)
    assert all(mean.any() for mean in expected.values())


def through_pickle(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_nothing_but_a_step_moves_the_average(tmp_path: Path) -> None:
    model = adapted(r=2, average_decay=0.5)
    train(model, batch(CLIP))
    expected = adapter_tensors(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert any(
        not torch.equal(t, expected[n.replace("r_average", "r")]) for n, t in expected.items() if "_average_" in n
    )
    model.train().eval().to(torch.bfloat16)
    model.merge_adapter()
    model.unmerge_adapter()
    with model.disable_adapter():
        outputs(model)
    model.load_state_dict(model.state_dict())
    wise_ft(model, 0.5)
    wise_ft(model, 1.0)
    model.set_adapter("default")
    loss_fn(model.train(), batch(CLIP)).backward()
    assert_same(adapter_tensors(model), expected)
    for twin in (copy.deepcopy(model), through_pickle(model)):
        assert_same(adapter_tensors(twin), expected)
        train(twin, batch(CLIP), steps=1)
        assert all(not torch.equal(t, expected[n]) for n, t in adapter_tensors(twin).items())
        assert_same(adapter_tensors(model), expected)
    loaded = PeftModel.from_pretrained(tiny_model(CLIP).to(torch.bfloat16), tmp_path, is_trainable=True)
    assert_same(adapter_tensors(loaded), expected)
    assert same_bits(outputs(loaded.eval()), outputs(model.eval()))


@pytest.mark.parametrize("use", ["eval", "merge_adapter", "save_pretrained"])
def test_steps_that_nobody_hears_of_are_refused(use: str, tmp_path: Path) -> None:
    """As DeepSpeed's, which has flat copies of the parameters. Else what is evaluated would be the untrained model."""
    found = []
    for decay in (None, 0.9):
        model = adapted(average_decay=decay).train()
        loss_fn(model, batch(CLIP)).backward()
        model.eval()
        model.train()
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data -= 0.1 * parameter.grad
        try:
            getattr(model, use)(*([tmp_path] if use == "save_pretrained" else []))
        except ConfigError as error:
            found.append(f"{error}")
    assert len(found) == 1 and "outside of torch.optim" in found[0] and "average_decay=None" in found[0]


def test_without_average_the_trained_values_count() -> None:
    model, layer = linear(average_decay=None, drop_path=0.0)
    assert not list(layer.radapter_average_weight)
    x = torch.randn(2, INNER, dtype=torch.float64)
    torch.testing.assert_close(model.eval()(x), model.train()(x), rtol=1e-12, atol=1e-12)
    assert not any("_average_" in name for name in model.state_dict())


class Following(TrainerCallback):
    """Computes the averages once more, after every step."""

    def __init__(self) -> None:
        self.steps, self.expected = 0, {}

    def on_train_begin(self, args, state, control, model=None, **kwargs: Any) -> None:
        self.expected = {n: p.detach().double() for n, p in model.named_parameters() if p.requires_grad}

    def on_optimizer_step(self, args, state, control, model=None, **kwargs: Any) -> None:
        parameters, self.steps = dict(model.named_parameters()), self.steps + 1
        self.expected = {n: 0.9 * mean + 0.1 * parameters[n].detach() for n, mean in self.expected.items()}


def test_average_counts_every_step_of_a_trainer_once(tmp_path: Path) -> None:
    """Accelerate wraps the optimizer, and in most micro-batches its step does nothing."""
    following = Following()
    settings: dict[str, Any] = {"gradient_accumulation_steps": 2, "callbacks": [following]}
    trainer = build(tmp_path, "radapter", per_device_train_batch_size=3, **settings)
    trainer.train()
    assert following.steps == trainer.state.global_step == 6
    averages = {name: buffer for name, buffer in trainer.model.named_buffers() if "_average_" in name}
    assert len(averages) == len(following.expected) == 16
    for name, mean in following.expected.items():
        found = averages[name.replace("radapter_", "radapter_average_")]
        torch.testing.assert_close(found.double(), mean, rtol=1e-5, atol=1e-8)


def test_losses_of_weights_refuse_averages(tmp_path: Path) -> None:
    starting_point = StartingPoint(None)
    with pytest.raises(ConfigError, match="these are averages.*average_decay=None"):
        starting_point(build(tmp_path, "radapter").model)
    model = adapted(average_decay=None)
    moved = StartingPoint(None)(build(tmp_path, model=model).model)
    assert len(moved) == 8 and all(tensor.tuned.requires_grad for tensor in moved.values())


def test_teacher_of_ogen_is_of_the_averages(tmp_path: Path) -> None:
    """Its values are written into the model, which is evaluated by its averages alone."""
    ogen = OGENLoss(OGENConfig(["goat", "otter", "heron"], neighbours=2, heads=1))
    trainer = build(tmp_path, model=adapted(towers="text", average_decay=0.5), losses=[ogen], max_steps=2)
    trainer.train()
    task = trainer.model.eval()
    ogen = task.terms["ogen"]
    trained = {name: p for name, p in task.named_parameters() if p.requires_grad}
    kept = {name: tensor.detach().clone() for name, tensor in (trained | averages(task)).items()}
    with torch.no_grad():
        expected = task.encode_prompts()
        fill(task.model)
        ogen.set_teacher(task, kept)
        assert same_bits(ogen.teacher.class_embeds, expected)
        assert not torch.allclose(task.encode_prompts(), expected, atol=1e-2)


def test_a_resumed_run_ends_bit_identical(tmp_path: Path) -> None:
    """With dropping, an average that is far behind, accumulated gradients and an evaluation in between."""
    saving = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2, "eval_strategy": "steps"}
    whole, resumed = (
        build(tmp_path, model=adapted(average_decay=0.9, drop_path=0.5), eval_steps=2, **saving) for _ in range(2)
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    found = weights(whole)
    assert same(found, weights(resumed))
    assert any(not torch.equal(t, found[n.replace("r_average", "r")]) for n, t in found.items() if "_average_" in n)
