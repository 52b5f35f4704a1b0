# SPDX-License-Identifier: Apache-2.0
"""A-CLIP: train only the query, key and value projections of attention."""

from ...peft_types import RobustPeftType, register
from .config import ACLIPConfig
from .layer import ACLIPLayer
from .model import ACLIPModel

__all__ = ["ACLIPConfig", "ACLIPLayer", "ACLIPModel"]
register(RobustPeftType.ACLIP, config_cls=ACLIPConfig, model_cls=ACLIPModel)
