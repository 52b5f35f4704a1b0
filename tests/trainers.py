# SPDX-License-Identifier: Apache-2.0
"""Trainers on a handful of tiny pictures, by every kind of fine-tuning."""

from __future__ import annotations

import inspect

import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from torch import nn

from hf_robust import ACLIPConfig, RAdapterConfig, SAFTConfig
from hf_robust.training.arguments import RobustTrainingArguments
from hf_robust.training.trainer import RobustTrainer
from tests.tiny_models import image_dataset, tiny_model, tiny_processor

NAMES = ["red", "green", "blue"]
OTHER_NAMES = ["cat", "dog"]


def layer_norms(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]


METHODS = {
    "full": lambda model: model,
    "saft": lambda model: get_peft_model(model, SAFTConfig(density=0.01)),
    "aclip": lambda model: get_peft_model(model, ACLIPConfig()),
    "radapter": lambda model: get_peft_model(model, RAdapterConfig(drop_path=0.0, average_decay=0.9)),
    "lora": lambda model: get_peft_model(model, LoraConfig(target_modules="all-linear")),
    "ln_tuning": lambda model: get_peft_model(model, LNTuningConfig(target_modules=layer_norms(model))),
}


def build(folder, method="full", family="clip", model=None, **settings):
    """A trainer on 18 pictures of three classes, with an evaluation set of the same and one of two other classes."""
    cls, callbacks = settings.pop("cls", RobustTrainer), settings.pop("callbacks", None)
    datasets = {
        "train_dataset": settings.pop("train_dataset", image_dataset(18, NAMES)),
        "eval_dataset": {"id": image_dataset(7, NAMES, seed=50), "new": image_dataset(9, OTHER_NAMES, seed=90)},
    }
    datasets["eval_dataset"] = settings.pop("eval_dataset", datasets["eval_dataset"])
    processor = settings.pop("processing_class", None) or tiny_processor(family)
    arguments = inspect.signature(RobustTrainer.__init__).parameters
    given = {"callbacks": callbacks, **{name: settings.pop(name) for name in [*settings] if name in arguments}}
    defaults = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-2, "save_strategy": "no"}
    quiet = {"use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    args = RobustTrainingArguments(str(folder), **{**defaults, **quiet, **settings})
    torch.manual_seed(0)  # LoRA's first weights
    if "model_init" not in given:
        model = METHODS[method](tiny_model(family) if model is None else model)
    return cls(model, args, **datasets, processing_class=processor, **given)


def trained(folder, method="full", **settings):
    """A trainer after its training."""
    trainer = build(folder, method, **settings)
    trainer.train()
    return trainer


def weights(trainer):
    """The trained tensors and their averages; those of a model with SAFT show its values from the next forward on."""
    named = [(name, parameter) for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    averages = [(name, buffer) for name, buffer in trainer.model.named_buffers() if "_average_" in name]
    return {name: tensor.detach().clone() for name, tensor in named + averages}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def entries(trainer):
    return {name: buffer for name, buffer in trainer.model.named_buffers() if "saft_indices" in name}
