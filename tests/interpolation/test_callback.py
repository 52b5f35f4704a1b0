# SPDX-License-Identifier: Apache-2.0
"""WiSE-FT at the end of a training."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from hf_robust.errors import ConfigError
from hf_robust.interpolation.adapters import wise_ft
from hf_robust.interpolation.callback import WiSEFTCallback
from hf_robust.tasks.class_names import ZeroShotClassifier
from tests.methods import CLIP, outputs, same_bits
from tests.tiny_models import image_dataset, tiny_batch, tiny_model, tiny_processor
from tests.trainers import METHODS, NAMES, build

TWO_STEPS = {"max_steps": 2}
EVERY_STEP = {**TWO_STEPS, "save_strategy": "steps", "save_steps": 1, "eval_steps": 1}
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT, of LN tuning


def tensors(model):
    """Parameters would show what SAFT wrote at its last forward; the state dict holds θ₀ and the values."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def worse_every_time():
    """Makes the first checkpoint the best one."""
    counter = itertools.count()
    return lambda prediction: {"score": -next(counter)}


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_at_alpha_after_training(method, tmp_path: Path):
    plain = build(tmp_path, method, **TWO_STEPS)
    plain.train()
    callback = WiSEFTCallback(0.5)
    trainer = build(tmp_path, method, callbacks=[callback], **TWO_STEPS)
    before = tensors(trainer.model)
    trainer.train()
    zero_shot = {name: before[name] for name in callback.zero_shot} if method == "full" else None
    assert (callback.zero_shot is not None) == (method == "full")
    found = tensors(trainer.model)
    wise_ft(trainer.model, 1, callback.zero_shot)
    tuned = tensors(plain.model)
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in tensors(trainer.model).items())
    wise_ft(plain.model, 0.5, zero_shot)
    expected = tensors(plain.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert any(not torch.equal(tensor, tuned[name]) for name, tensor in found.items())


def test_a_trainable_head_goes_along(tmp_path: Path):
    trainer = build(tmp_path, "lora", callbacks=[WiSEFTCallback(0)], head="trainable", **TWO_STEPS)
    before = trainer.model.class_head.weight.detach().clone()
    trainer.train()
    assert torch.equal(trainer.model.class_head.weight, before)
    wise_ft(trainer.model, 1)
    assert not torch.equal(trainer.model.class_head.weight, before)


@pytest.mark.parametrize("method", ["full", "saft", "lora"])
def test_a_resumed_training_knows_the_model_it_began_with(method, tmp_path: Path):
    """A checkpoint is the fine-tuned model, and is loaded before training begins."""
    whole = build(tmp_path / "whole", method, callbacks=[WiSEFTCallback(0.5)], **EVERY_STEP)
    whole.train()
    resumed = build(tmp_path / "resumed", method, callbacks=[WiSEFTCallback(0.5)], **EVERY_STEP)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    expected = tensors(whole.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(resumed.model).items())


@pytest.mark.parametrize("method", ["full", "saft", "lora"])
def test_the_best_checkpoint_is_what_is_interpolated(method, tmp_path: Path):
    settings = {**EVERY_STEP, "eval_strategy": "steps", "load_best_model_at_end": True}
    settings |= {"metric_for_best_model": "eval_id_score", "greater_is_better": True}
    settings |= {"eval_dataset": {"id": image_dataset(2, NAMES)}}
    plain = build(tmp_path / "plain", method, compute_metrics=worse_every_time(), **settings)
    start = tensors(plain.model)
    plain.train()
    assert plain.state.best_model_checkpoint.endswith("-1")  # not the last
    callback = WiSEFTCallback(0.5)
    settings["compute_metrics"] = worse_every_time()
    trainer = build(tmp_path / "wise", method, callbacks=[callback], **settings)
    trainer.train()
    wise_ft(plain.model, 0.5, start if method == "full" else None)
    expected = tensors(plain.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(trainer.model).items())
    wise_ft(trainer.model, 0, callback.zero_shot)
    assert same_bits(outputs(trainer.model.model.eval()), outputs(tiny_model(CLIP)))


def test_what_is_saved_after_training_is_the_adapter_at_alpha(tmp_path: Path):
    trainer = build(tmp_path, "lora", callbacks=[WiSEFTCallback(0.5)], **TWO_STEPS)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(tiny_model(CLIP), tmp_path / "saved").eval()
    assert same_bits(outputs(loaded), outputs(trainer.model.model.eval()))


def test_a_second_training_goes_on_from_alpha(tmp_path: Path):
    trainer = build(tmp_path, "lora", callbacks=[WiSEFTCallback(0.5)], **TWO_STEPS)
    trainer.train()
    first = tensors(trainer.model)
    trainer.train()
    half = tensors(trainer.model)
    wise_ft(trainer.model, 1)
    for name, tensor in tensors(trainer.model).items():
        if "lora_B" in name:
            torch.testing.assert_close(half[name], tensor / 2)
            assert not torch.equal(tensor, first[name])


@pytest.mark.parametrize("is_peft", [False, True])
def test_a_stock_trainer(is_peft, tmp_path: Path):
    model = tiny_model(CLIP)
    if is_peft:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    classifier = ZeroShotClassifier(model, tiny_processor(CLIP), NAMES, "a {}.")
    rows = [
        {"pixel_values": image, "labels": index % 3} for index, image in enumerate(tiny_batch(CLIP, 6)["pixel_values"])
    ]
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, disable_tqdm=True, save_strategy="no", logging_strategy="no", max_steps=2,
        learning_rate=1e-2, report_to=[], remove_unused_columns=False,
    )  # fmt: skip
    callback = WiSEFTCallback(0)
    Trainer(classifier, args, train_dataset=rows, callbacks=[callback]).train()
    assert same_bits(outputs(classifier.model.eval()), outputs(tiny_model(CLIP)))
    wise_ft(classifier, 1, callback.zero_shot)
    assert not torch.equal(outputs(classifier.model), outputs(tiny_model(CLIP)))


def test_what_cannot_be_scaled_is_refused_before_training(tmp_path: Path):
    with pytest.raises(ConfigError, match="alpha is no share"):
        WiSEFTCallback(2)
    model = get_peft_model(tiny_model(CLIP), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    trainer = build(tmp_path, model=model, callbacks=[WiSEFTCallback(0.5)])
    before = tensors(trainer.model)
    with pytest.raises(ConfigError, match="DoraLinearVariant"):
        trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(trainer.model).items())
