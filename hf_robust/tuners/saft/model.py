# SPDX-License-Identifier: Apache-2.0
"""SAFT as a PEFT tuner: wraps every unit of the model that may hold entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import AdapterFileError
from ..base import RobustTuner
from .config import SAFTConfig
from .eligible import eligible_parameters
from .layer import SAFTLayer


class SAFTModel(RobustTuner):
    """The tuner behind [`SAFTConfig`].

    SAFT: Sparse Adaptation for Fine-Tuning (Nguyen et al., ECCV 2024, https://huggingface.co/papers/2407.03036).

    Args:
        model: the model to adapt.
        peft_config: its config, or a dict of configs by adapter name.
        adapter_name: name of the first adapter.

    Example:
        >>> from hf_robust import SAFTConfig, select_saft
        >>> from peft import get_peft_model
        >>> model = get_peft_model(clip, SAFTConfig(density=0.001))  # doctest: +SKIP
        >>> select_saft(model, batches, loss_fn)  # doctest: +SKIP
        >>> model.print_trainable_parameters()  # doctest: +SKIP
    """

    prefix: str = "saft_"
    tuner_layer_cls = SAFTLayer

    def find_targets(self, model: nn.Module, config: SAFTConfig) -> dict[str, tuple[str, ...]]:
        """Returns the units an adapter may use, with the parameters it may select from.

        Args:
            model: the model without its PEFT wrapper.
            config: the settings of the adapter to add.

        Raises:
            ConfigError: the settings do not fit the model.
            AdapterFileError: the config tells of entries in modules that the adapter could not have.
        """
        units = eligible_parameters(model, config)
        unknown = sorted(set(config.entry_counts or {}) - set(units))
        if unknown:
            raise AdapterFileError("an adapter has entries in modules that the model does not have", got=unknown)
        return units

    @classmethod
    def settings_of_adapter(cls, model: nn.Module, adapter_name: str) -> dict[str, Any]:
        """How many entries an adapter has in each unit."""
        layers = [layer for layer in model.modules() if isinstance(layer, SAFTLayer)]
        counts = {
            layer.unit: len(layer.saft_values[adapter_name]) for layer in layers if layer.has_entries(adapter_name)
        }
        return {"entry_counts": counts or None}

    @classmethod
    def make_room(cls, layers: Any, adapter_name: str, tensors: Mapping[str, dict[str, Tensor]]) -> None:
        """Gives an adapter that has no entries yet as many as are about to be loaded.

        Args:
            layers: by unit.
            adapter_name: the adapter.
            tensors: by unit and name.
        """
        for unit, found in tensors.items():
            if not layers[unit].has_entries(adapter_name):
                device = next(layers[unit].base_layer.parameters()).device
                layers[unit].allocate(adapter_name, torch.empty(len(found["saft_values"]), device=device))
        for layer in layers.values() if tensors else ():
            layer.has_selected(adapter_name)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Wraps the units of an adapter.

        Args:
            model: the model without its PEFT wrapper.
            adapter_name: the adapter to add.
        """
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        _remove_hooks(model)
        for child in model.children():  # the towers: a user may call one of them, or get_image_features
            child.register_forward_pre_hook(DataEdits(child))

    def _create_and_replace(
        self,
        peft_config: SAFTConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        layer = target if isinstance(target, SAFTLayer) else SAFTLayer(target, current_key)
        layer.update_layer(adapter_name, self._config, self._targets[current_key])
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # A module may be registered at several paths; all of them must see the same wrapper.
        for module in self.model.modules():
            for name, submodule in module._modules.items():
                if submodule is child and module is not new_module:
                    module._modules[name] = new_module

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        _remove_hooks(model)
        return model


class DataEdits:
    """Writes values again that were changed behind autograd's back (`.data` edits, fused optimizers).

    Called before a tower's forward. One comparison a device and tower, since each one waits for the device.

    Args:
        tower: a module with SAFT layers.
    """

    def __init__(self, tower: nn.Module) -> None:
        self.layers = [module for module in tower.modules() if isinstance(module, SAFTLayer)]

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Compares, and writes what was changed."""
        if torch.compiler.is_compiling():
            return
        by_device: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        for values, copy in (pair for layer in self.layers for pair in layer.written_values()):
            by_device.setdefault(values.device, []).append((values, copy))
        pairs = (zip(*found, strict=True) for found in by_device.values())
        if not all(torch.equal(torch.cat(values), torch.cat(copies)) for values, copies in pairs):
            for layer in self.layers:
                layer.rewrite()


def _remove_hooks(model: nn.Module) -> None:
    for child in model.children():
        for key in [key for key, hook in child._forward_pre_hooks.items() if isinstance(hook, DataEdits)]:
            del child._forward_pre_hooks[key]
