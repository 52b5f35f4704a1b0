# SPDX-License-Identifier: Apache-2.0
"""A-CLIP as a PEFT tuner: wraps the query, key and value projections of attention."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...encoders.dual_encoder import family
from ..base import RobustTuner
from ..linears import find_linears
from .config import ACLIPConfig
from .layer import ACLIPLayer


class ACLIPModel(RobustTuner):
    """The tuner behind [`ACLIPConfig`].

    A-CLIP: Quantified Task Misalignment to Inform PEFT (Niss, Vogt-Lowell and Tsiligkaridis, 2024,
    https://huggingface.co/papers/2402.09613).

    Args:
        model: the model to adapt.
        peft_config: its config, or a dict of configs by adapter name.
        adapter_name: name of the first adapter.

    Example:
        >>> from hf_robust import ACLIPConfig
        >>> from peft import get_peft_model
        >>> model = get_peft_model(clip, ACLIPConfig(towers="vision"))  # doctest: +SKIP
        >>> model.print_trainable_parameters()  # doctest: +SKIP
    """

    prefix: str = "aclip_"
    tuner_layer_cls = ACLIPLayer

    def find_targets(self, model: nn.Module, config: ACLIPConfig) -> dict[str, nn.Linear]:
        """Returns the Linear modules whose weights an adapter trains.

        Args:
            model: the model without its PEFT wrapper; it may already hold A-CLIP adapters.
            config: the settings of the adapter to add.

        Raises:
            ConfigError: a name matches nothing, a tower has no projection of a known name, or one is quantised.
        """
        row = None if config.target_modules else family(model)
        kinds = {} if row is None else {"query, key and value projections": row.qkv}
        if row is not None and config.train_out_proj:
            kinds["output projections of attention"] = row.out_proj
        return find_linears(model, config, kinds, "A-CLIP")

    def _create_and_replace(
        self,
        peft_config: ACLIPConfig,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        layer = target if isinstance(target, ACLIPLayer) else ACLIPLayer(target)
        layer.update_layer(adapter_name, peft_config)
        if layer is not target:
            setattr(parent, target_name, layer)
