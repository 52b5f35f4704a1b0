# SPDX-License-Identifier: Apache-2.0
"""What would make a run worthless is an error before its first step."""

from __future__ import annotations

import pytest
import torch
from datasets import DatasetDict
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainingArguments

from hf_robust import RobustTrainer, context_prompt
from hf_robust.errors import ConfigError, DataError
from tests.tiny_models import image_dataset, tiny_model, tiny_processor
from tests.trainers import METHODS, NAMES, build, same, weights

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT's own LN tuning


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_not_trained_themselves(tmp_path, dtype):
    trainer = build(tmp_path, model=tiny_model("clip").to(dtype))
    before = weights(trainer)
    with pytest.raises(ConfigError, match=f"16 bits are trained.*got '{dtype}'.*dtype=torch.float32"):
        trainer.train()
    assert same(weights(trainer), before)


@pytest.mark.parametrize("method", ["saft", "aclip", "lora"])
def test_adapters_on_weights_of_16_bits_are_trained_in_32(tmp_path, method):
    trainer = build(tmp_path, method, model=tiny_model("clip").bfloat16())
    trainer.train()
    assert {tensor.dtype for tensor in weights(trainer).values()} == {torch.float32}


@pytest.mark.parametrize("head", ["trainable", "live", "frozen"])
@pytest.mark.parametrize("method", ["saft", "aclip", "lora"])
def test_a_frozen_adapter_is_refused(tmp_path, method, head):
    trained = build(tmp_path / "first", method)
    trained.train()
    trained.save_model(str(tmp_path / "adapter"))
    model = PeftModel.from_pretrained(tiny_model("clip"), tmp_path / "adapter")
    trainer = build(tmp_path / "second", head=head, model=model)
    trainer.evaluate()  # it can be evaluated
    with pytest.raises(ConfigError, match="adapter is frozen.*is_trainable=True"):
        trainer.train()
    again = PeftModel.from_pretrained(tiny_model("clip"), tmp_path / "adapter", is_trainable=True)
    build(tmp_path / "third", head=head, model=again, max_steps=1).train()


@pytest.mark.parametrize("head", ["trainable", "live"])
def test_a_merged_adapter_is_refused(tmp_path, head):
    trainer = build(tmp_path, "aclip", head=head, max_steps=1)
    trainer.model.model.merge_adapter()
    with pytest.raises(ConfigError, match="adapters are merged.*unmerge_adapter"):
        trainer.train()
    trainer.model.model.unmerge_adapter()
    trainer.train()


def test_an_adapter_of_transformers_own_is_looked_at_too(tmp_path):
    model = tiny_model("clip")
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="adapter is frozen"):
        build(tmp_path, head="trainable", model=model).train()


def test_an_adapter_of_a_tower_that_is_not_run_is_refused(tmp_path):
    model, _ = context_prompt(tiny_model("clip"), tiny_processor("clip"), 4, None, NAMES)
    with pytest.raises(ConfigError, match="adapter is frozen.*text tower alone needs head='live'"):
        build(tmp_path, head="trainable", model=model).train()


def test_weights_beside_an_adapter_are_refused(tmp_path):
    """A checkpoint would lack them, and so would the saved adapter."""
    run = build(tmp_path, "lora")
    run.model.model.base_model.model.visual_projection.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match="saved without: .*visual_projection.*weight.*modules_to_save"):
        run.train()
    for settings in ({"bias": "all"}, {"modules_to_save": ["visual_projection"]}):
        config = LoraConfig(target_modules=["q_proj"], **settings)
        build(tmp_path, model=get_peft_model(tiny_model("clip"), config), max_steps=1).train()


def test_nothing_to_train_is_refused_and_a_linear_probe_is_not(tmp_path):
    with pytest.raises(ConfigError, match="no weight of the model is trained"):
        build(tmp_path, model=tiny_model("clip").requires_grad_(False)).train()
    probe = build(tmp_path, head="trainable", model=tiny_model("clip").requires_grad_(False), max_steps=1)
    probe.train()
    assert list(weights(probe)) == ["class_head.weight", "class_head.bias"]


@pytest.mark.parametrize("names", [["red"], NAMES])
def test_one_class_is_nothing_to_tell_apart(tmp_path, names):
    one = image_dataset(18, NAMES).filter(lambda row: row["label"] == 0)
    one = image_dataset(6, ["red"]) if len(names) == 1 else one
    trainer = build(tmp_path, train_dataset=one, eval_dataset=None)
    with pytest.raises(DataError, match="nothing to tell apart.*train_dataset.*got 1"):
        trainer.train()


BAD_CONSTRUCTION = {
    "stock arguments": ({"args": TrainingArguments}, ConfigError, "'TrainingArguments'; allowed RobustTrainingArg"),
    "image processor": ({"processing_class": tiny_processor("clip").image_processor}, ConfigError, "AutoProcessor"),
    "tokenizer": ({"processing_class": tiny_processor("clip").tokenizer}, ConfigError, "AutoProcessor"),
    "nothing": ({"processing_class": None}, ConfigError, "needs the model's processor"),
    "splits": ({"train_dataset": DatasetDict(train=image_dataset(3, NAMES))}, DataError, "several splits.*'train'"),
    "splits to evaluate": ({"eval_dataset": DatasetDict(test=image_dataset(3, NAMES))}, DataError, "several splits"),
}


@pytest.mark.parametrize("name", BAD_CONSTRUCTION)
def test_wrong_arguments_are_refused_when_the_trainer_is_built(tmp_path, name):
    given, error, message = BAD_CONSTRUCTION[name]
    good = build(tmp_path)
    args = given.get("args", type(good.args))(str(tmp_path), use_cpu=True)
    settings = {"train_dataset": image_dataset(6, NAMES), "processing_class": tiny_processor("clip"), **given}
    with pytest.raises(error, match=message):
        RobustTrainer(tiny_model("clip"), **{**settings, "args": args})


BEST = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}


@pytest.mark.parametrize(
    ("metric", "several", "message"),
    [
        (None, True, "got 'loss'; allowed eval_id_accuracy, eval_id_loss, eval_new_accuracy, eval_new_loss"),
        ("accuracy", True, "got 'accuracy'; allowed eval_id_accuracy"),
        ("eval_ood_accuracy", True, "eval_ood_accuracy"),
        ("f1", False, "got 'f1'; allowed eval_accuracy, eval_loss"),
    ],
)
def test_a_metric_that_will_not_exist_is_refused(tmp_path, metric, several, message):
    sets = {} if several else {"eval_dataset": image_dataset(3, NAMES)}
    with pytest.raises(ConfigError, match=message):
        build(tmp_path, metric_for_best_model=metric, **BEST, **sets)


def test_metrics_that_will_exist_are_taken(tmp_path):
    for metric in ("id_accuracy", "eval_new_loss"):
        build(tmp_path, metric_for_best_model=metric, **BEST)
    build(tmp_path, eval_dataset=image_dataset(3, NAMES), **BEST)
    own = {"compute_metrics": lambda prediction: {"f1": 0.5}}
    build(tmp_path, metric_for_best_model="eval_id_f1", **BEST, **own)
    with pytest.raises(ConfigError, match="no evaluation gives the metric"):
        build(tmp_path, metric_for_best_model="f1", **BEST, **own)


def test_evaluation_without_a_set_is_an_error(tmp_path):
    trainer = build(tmp_path, eval_dataset=None)
    with pytest.raises(ConfigError, match="no set to evaluate on.*Pass eval_dataset"):
        trainer.evaluate()
    with pytest.raises(ConfigError, match="no evaluation set of this name: got 'ood'; allowed id, new"):
        build(tmp_path).evaluate("ood")
    with pytest.raises(ConfigError, match="no set to train on"):
        build(tmp_path, train_dataset=None, class_names=NAMES).train()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_passes(tmp_path, method):
    build(tmp_path, method, max_steps=1).train()
