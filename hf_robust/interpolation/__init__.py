# SPDX-License-Identifier: Apache-2.0
"""WiSE-FT, how far to go from zero-shot weights to fine-tuned ones, and soups, the mean of several fine-tunings."""

from .adapters import wise_ft, zero_shot_copy
from .callback import WiSEFTCallback
from .checkpoints import interpolate_checkpoints
from .fisher import diagonal_fisher
from .models import interpolate
from .soup_files import soup_checkpoints
from .soups import GreedySoup, greedy_soup, uniform_soup
from .sweep import AlphaSweep, alpha_sweep
from .tpgm import ProjectionTable, tpgm

__all__ = [
    "AlphaSweep",
    "GreedySoup",
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
