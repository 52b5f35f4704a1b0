# SPDX-License-Identifier: Apache-2.0
"""WiSE-FT: how far along the change to a model to go, from its zero-shot weights to the fine-tuned ones."""

from .adapters import wise_ft, zero_shot_copy
from .callback import WiSEFTCallback
from .checkpoints import interpolate_checkpoints
from .fisher import diagonal_fisher
from .models import interpolate
from .sweep import AlphaSweep, alpha_sweep

__all__ = [
    "AlphaSweep",
    "WiSEFTCallback",
    "alpha_sweep",
    "diagonal_fisher",
    "interpolate",
    "interpolate_checkpoints",
    "wise_ft",
    "zero_shot_copy",
]
