# SPDX-License-Identifier: Apache-2.0
"""The hidden states of layers, taken from the forwards that a training runs anyway."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..encoders.dual_encoder import base_model, tower_modules
from ..errors import ConfigError, close_matches


def check_layers(model: nn.Module, layers: Sequence[str]) -> None:
    """Refuses layers that are none of the vision tower.

    Args:
        model: a dual encoder, plain or wrapped by PEFT.
        layers: names of modules.

    Raises:
        ConfigError: one is none.
    """
    base, towers = base_model(model), tower_modules(model, "vision")
    known = [f"{t}.{name}".rstrip(".") for t in towers for name, _ in base.get_submodule(t).named_modules()]
    for layer in layers:
        if layer not in known:
            remedy = close_matches(layer, known)
            raise ConfigError("no such layer in the vision tower", where="losses, layers", got=layer, remedy=remedy)


class HiddenStates:
    """Keeps what layers of a model return while it is trained, until it is taken or the model runs again.

    The layers are watched as long as this object is in use. Copies of the model show theirs here, too.

    Args:
        model: a dual encoder, plain or wrapped by PEFT.
        layers: names of modules of the base model.

    Example:
        >>> states = HiddenStates(clip.train(), ["vision_model.encoder.layers.5"])
        >>> _ = clip.get_image_features(pixel_values)
        >>> states.pop()["vision_model.encoder.layers.5"].shape
        torch.Size([1, 50, 768])
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self.layers, self.found = tuple(layers), dict[str, Tensor]()
        for layer in self.layers:
            hook = partial(_keep_of_training, weakref.ref(self), layer)
            handle = base_model(model).get_submodule(layer).register_forward_hook(hook)
            weakref.finalize(self, handle.remove)

    def pop(self) -> dict[str, Tensor]:
        """Returns what the layers returned last, by name, and forgets it.

        Raises:
            ConfigError: a layer has not run, or without gradient.
        """
        found, self.found = self.found, {}
        missing = [layer for layer in self.layers if layer not in found]
        if missing and torch.is_grad_enabled():
            what = "hidden states are compared of layers that ran without gradient, or not at all"
            remedy = "Recompute activations with {'use_reentrant': False}, and train on images, not on embeddings."
            raise ConfigError(what, where="losses, layers", got=missing, remedy=remedy)
        return found


@contextmanager
def showing(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Inside the context what layers return is in the dictionary that it gives.

    Args:
        model: a dual encoder, plain or wrapped by PEFT.
        layers: names of modules of the base model.
    """
    found: dict[str, Tensor] = {}
    base = base_model(model)
    handles = [base.get_submodule(layer).register_forward_hook(partial(_keep, found, layer)) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _keep(found: dict[str, Tensor], layer: str, module: nn.Module, inputs: Any, output: Any) -> None:
    found[layer] = output[0] if isinstance(output, tuple) else output  # of towers whose layers return tuples


def _keep_of_training(
    states: weakref.ref[HiddenStates], layer: str, module: nn.Module, inputs: Any, output: Any
) -> None:
    alive = states()
    if alive is None or not module.training:  # θ₀ and evaluations run in eval mode
        return
    if torch.is_grad_enabled():
        _keep(alive.found, layer, module, inputs, output)
    else:
        alive.found.pop(layer, None)  # of the backward before, which has recomputed it
