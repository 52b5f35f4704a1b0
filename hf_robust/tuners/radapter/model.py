# SPDX-License-Identifier: Apache-2.0
"""R-Adapter as a PEFT tuner: wraps the last projections of attention and MLP."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...encoders.dual_encoder import family
from ..base import RobustTuner
from ..linears import find_linears
from ..loading import layers_of
from .config import RAdapterConfig
from .layer import RAdapterLayer


class RAdapterModel(RobustTuner):
    """The tuner behind [`RAdapterConfig`].

    R-Adapter: Efficient and Versatile Robust Fine-Tuning of Zero-shot Models (Kim et al., ECCV 2024,
    https://huggingface.co/papers/2408.05749).

    Args:
        model: the model to adapt.
        peft_config: its config, or a dict of configs by adapter name.
        adapter_name: name of the first adapter.

    Example:
        >>> from hf_robust import RAdapterConfig
        >>> from peft import get_peft_model
        >>> model = get_peft_model(clip, RAdapterConfig(r=4))  # doctest: +SKIP
        >>> model.print_trainable_parameters()  # doctest: +SKIP
    """

    prefix: str = "radapter_"
    tuner_layer_cls = RAdapterLayer

    def find_targets(self, model: nn.Module, config: RAdapterConfig) -> dict[str, nn.Linear]:
        """Returns the Linear modules that an adapter stands behind.

        Args:
            model: the model without its PEFT wrapper; it may already hold R-Adapters.
            config: the settings of the adapter to add.

        Raises:
            ConfigError: a name matches nothing, a tower has no projection of a known name, or one is quantised.
        """
        row = None if config.target_modules else family(model)
        attention, mlp = "output projections of attention", "last projections of the MLP"
        kinds = {} if row is None else {attention: row.out_proj, mlp: row.mlp_out}
        return find_linears(model, config, kinds, "R-Adapter")

    @classmethod
    def settings_of_adapter(cls, model: nn.Module, adapter_name: str) -> dict[str, Any]:
        """Returns nothing; looks whether the averages that are saved have followed the training.

        Args:
            model: the model.
            adapter_name: the adapter.

        Raises:
            ConfigError: they have not.
        """
        for layer in layers_of(cls, model).values():
            layer.check_followed()
        return {}

    def _create_and_replace(
        self,
        peft_config: RAdapterConfig,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        layer = target if isinstance(target, RAdapterLayer) else RAdapterLayer(target)
        place = list(self._targets).index(current_key)  # layers of one shape shall not begin alike
        layer.update_layer(adapter_name, peft_config, torch.Generator().manual_seed(peft_config.seed + place))
        if layer is not target:
            setattr(parent, target_name, layer)


def slow_averages(model: nn.Module, steps: int) -> dict[str, float]:
    """Returns the active adapters whose averages come less than half of the way in a training, and how far.

    Args:
        model: any model.
        steps: of an optimizer.

    Returns:
        1 - mᵗ, the share of a constant that its average comes to, by adapter.

    Example:
        >>> slow_averages(get_peft_model(clip, RAdapterConfig(average_decay=0.999)), steps=100)
        {'default': 0.0952...}
    """
    layers: Any = layers_of(RAdapterModel, model).values()
    configs = {
        name: layer.configs[name] for layer in layers for name in layer.active_adapters if name in layer.configs
    }
    decays = {name: config.average_decay for name, config in configs.items() if config.average_decay is not None}
    return {name: 1 - decay**steps for name, decay in decays.items() if decay**steps > 0.5}
