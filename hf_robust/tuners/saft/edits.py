# SPDX-License-Identifier: Apache-2.0
"""Looks for changed values and changed weights in all units of a model at once: each look waits for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .layer import saft_layers
from .resident import ResidentValues, see_edits


def show_values(model: nn.Module) -> None:
    """Makes the base's weights in a model hold what its active SAFT adapters say now.

    Args:
        model: any module.

    Raises:
        BaseWeightsError: weights of the base were changed where they held values.
    """
    see_edits(residents(model))
    for layer in saft_layers(model):
        layer.show_values()


def residents(model: nn.Module) -> list[ResidentValues]:
    """What the bases of the units in a model show."""
    return [layer.resident for layer in saft_layers(model)]


class DataEdits:
    """Looks for changes behind autograd's back before the forward of a tower.

    Args:
        tower: a module with SAFT layers.
    """

    def __init__(self, tower: nn.Module) -> None:
        self.layers = saft_layers(tower)

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Called before the forward."""
        if not torch.compiler.is_compiling():
            see_edits([layer.resident for layer in self.layers])


def remove_hooks(model: nn.Module) -> None:
    """Takes the hooks of `DataEdits` away from the towers of a model."""
    for child in model.children():
        for key in [key for key, hook in child._forward_pre_hooks.items() if isinstance(hook, DataEdits)]:
            del child._forward_pre_hooks[key]
