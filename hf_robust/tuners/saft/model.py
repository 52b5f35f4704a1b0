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
from .edits import DataEdits, remove_hooks, residents
from .eligible import eligible_parameters
from .layer import SAFTLayer, saft_layers
from .resident import check_bases, see_edits


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
        layers = [layer for layer in saft_layers(model) if layer.has_entries(adapter_name)]
        return {"entry_counts": {layer.unit: len(layer.saft_values[adapter_name]) for layer in layers} or None}

    @classmethod
    def make_room(cls, layers: Any, adapter_name: str, tensors: Mapping[str, dict[str, Tensor]]) -> None:  # noqa: D102
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
        remove_hooks(model)
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

    # --- all units or none: an edit of the base that cannot be undone is found before anything is changed ---

    def train(self, mode: bool = True) -> SAFTModel:
        """Sets the mode, after which the weights of the base are those of the forward.

        Args:
            mode: training or evaluation.

        Raises:
            BaseWeightsError: weights of the base were changed where they held values.
        """
        see_edits(residents(self.model))
        super().train(mode)
        return self

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:  # noqa: D102
        check_bases(residents(self.model))
        super().set_adapter(*args, **kwargs)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        check_bases(residents(self.model))
        super()._enable_adapter_layers(enabled)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:  # noqa: D102
        check_bases(residents(self.model))
        super().merge_adapter(*args, **kwargs)

    def unmerge_adapter(self) -> None:  # noqa: D102
        check_bases(residents(self.model))
        super().unmerge_adapter()

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        check_bases(residents(self.model))
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        remove_hooks(model)
        return model
