# SPDX-License-Identifier: Apache-2.0
"""How robustly fine-tuned models are compared: the protocols of the CoOp family, and a plot over epochs."""

from .plots import plot_over_epochs as plot_over_epochs
from .protocols import base_to_new as base_to_new
from .protocols import few_shot as few_shot
from .protocols import harmonic_mean as harmonic_mean
