# SPDX-License-Identifier: Apache-2.0
"""How a method enters PEFT: our own names, and the one function that writes them into PEFT's mappings."""

from __future__ import annotations

import enum

from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner


class RobustPeftType(str, enum.Enum):
    """The methods hf_robust adds to PEFT.

    Each name equals its value: an Enum hashes by its name, and PEFT looks its mappings up with the plain string that
    it read from `adapter_config.json`.
    """

    SAFT = "SAFT"
    ACLIP = "ACLIP"
    RADAPTER = "RADAPTER"


def register(peft_type: RobustPeftType, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Enters a method into PEFT, so that `get_peft_model` and `from_pretrained` know it.

    Args:
        peft_type: the name of the method.
        config_cls: its config.
        model_cls: its tuner; its `prefix` marks the method's tensors in a state dict.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = model_cls.prefix


def method_name(config: PeftConfig) -> str:
    """Returns what PEFT calls the method of a config; one that was read from a file may have it as plain text.

    Args:
        config: of an adapter.

    Example:
        >>> method_name(LoraConfig())
        'LORA'
    """
    return str(getattr(config.peft_type, "value", config.peft_type))
