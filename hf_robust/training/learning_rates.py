# SPDX-License-Identifier: Apache-2.0
"""The learning rate of a training whose arguments name none: that of its method."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import TrainingArguments

from ..peft_types import method_name
from ..tasks.task import Task
from .arguments import RobustTrainingArguments

# What the comparison chose, with AdamW and a cosine, for photographs and a pretrained encoder; by PEFT's names. That
# of learned context it chose for the demo's icons.
OF_ADAPTERS = {"SAFT": 3e-4, "ACLIP": 3e-4, "RADAPTER": 3e-3, "LORA": 1e-3, "TRAINABLE_TOKENS": 1e-1}
FULL, HEAD_ALONE = 1e-5, 1e-1
OTHERS: float = TrainingArguments.learning_rate


def with_learning_rate(args: RobustTrainingArguments, model: nn.Module) -> RobustTrainingArguments:
    """Returns arguments that have a learning rate: those given, or a copy of them with that of the method.

    Args:
        args: of the training.
        model: what is trained, a dual encoder or a task around one.

    Example:
        >>> with_learning_rate(RobustTrainingArguments("out"), get_peft_model(clip, SAFTConfig())).learning_rate
        0.0003
    """
    if args.learning_rate is not None:
        return args
    found = copy.copy(args)  # another training may have another method
    found.learning_rate = method_rate(model)
    return found


def method_rate(model: nn.Module) -> float:
    """Returns the learning rate of a method, from `examples/benchmarks/compare_methods.md`; for others `Trainer`'s.

    Args:
        model: what is trained, a dual encoder or a task around one.

    Example:
        >>> method_rate(get_peft_model(clip, ACLIPConfig())), method_rate(clip)
        (0.0003, 1e-05)
    """
    encoder = model.model if isinstance(model, Task) else model
    configs = _active_configs(encoder)
    if configs and not all(config.inference_mode for config in configs):
        return OF_ADAPTERS.get(method_name(configs[0]), OTHERS)
    return FULL if any(parameter.requires_grad for parameter in encoder.parameters()) else HEAD_ALONE


def _active_configs(encoder: Any) -> list[Any]:
    if isinstance(encoder, PeftModel):
        return [encoder.peft_config[name] for name in encoder.active_adapters]
    if any(isinstance(module, BaseTunerLayer) for module in encoder.modules()):  # injected, by transformers or by PEFT
        return list(encoder.peft_config.values())
    return []
