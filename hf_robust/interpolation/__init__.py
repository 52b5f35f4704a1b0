# SPDX-License-Identifier: Apache-2.0
"""Between the zero-shot and the fine-tuned model: along the change to the weights, or image by image; and soups."""

from .adapters import wise_ft, zero_shot_copy
from .callback import WiSEFTCallback
from .checkpoints import interpolate_checkpoints
from .fisher import diagonal_fisher
from .models import interpolate
from .per_image import PerImageEnsemble
from .soup_files import soup_checkpoints
from .soups import GreedySoup, greedy_soup, uniform_soup
from .sweep import AlphaSweep, alpha_sweep
from .tpgm import ProjectionTable, tpgm

__all__ = [
    "AlphaSweep",
    "GreedySoup",
    "PerImageEnsemble",
    "ProjectionTable",
    "WiSEFTCallback",
    "alpha_sweep",
    "diagonal_fisher",
    "greedy_soup",
    "interpolate",
    "interpolate_checkpoints",
    "soup_checkpoints",
    "tpgm",
    "uniform_soup",
    "wise_ft",
    "zero_shot_copy",
]
