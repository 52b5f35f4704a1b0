# SPDX-License-Identifier: Apache-2.0
"""SAFT: train only the entries of the weights with the largest gradients."""

from ...peft_types import RobustPeftType, register
from .config import SAFTConfig
from .export import export_shira, exports_to_shira
from .layer import SAFTLayer
from .model import SAFTModel
from .selection import saft_unselected, select_saft
from .summary import MaskSummary, mask_summary

__all__ = [
    "MaskSummary",
    "SAFTConfig",
    "SAFTLayer",
    "SAFTModel",
    "export_shira",
    "exports_to_shira",
    "mask_summary",
    "saft_unselected",
    "select_saft",
]
register(RobustPeftType.SAFT, config_cls=SAFTConfig, model_cls=SAFTModel)
