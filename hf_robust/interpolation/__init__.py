# SPDX-License-Identifier: Apache-2.0
"""Between the zero-shot and the fine-tuned model: along the change to the weights, or image by image."""

from .adapters import wise_ft, zero_shot_copy
from .callback import WiSEFTCallback
from .checkpoints import interpolate_checkpoints
from .fisher import diagonal_fisher
from .models import interpolate
from .per_image import PerImageEnsemble
from .sweep import AlphaSweep, alpha_sweep

__all__ = [
    "AlphaSweep",
    "PerImageEnsemble",
    "WiSEFTCallback",
    "alpha_sweep",
    "diagonal_fisher",
    "interpolate",
    "interpolate_checkpoints",
    "wise_ft",
    "zero_shot_copy",
]
